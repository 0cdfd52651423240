"""How long a step takes: a roofline of what is computed and what is moved (Williams et al. 2009).

    seconds of a micro-batch = max(FLOP / (rate x EFFICIENCY), bytes / (bandwidth x BANDWIDTH_REACHED))

Rates are those of the data sheets, and training reaches a part of them; which part is stated here, and printed with the
plan. It is an estimate to compare methods and cards by, within about a factor of two; memory is predicted, time is estimated.

Letters: T tokens of a micro-batch, r rank, as in `activations.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from graftlm.planning.activations import Workload, saved_activations
from graftlm.planning.hardware import Card
from graftlm.planning.memory import weight_bytes
from graftlm.planning.method import AdapterShape, TrainingSetting
from graftlm.planning.shapes import ModelShape

EFFICIENCY = {"cuda": 0.40, "cpu": 0.45, "mps": 0.35}
"""Part of the sheet's rate that a whole training step reaches."""
BANDWIDTH_REACHED = 0.75
HOST_BANDWIDTH = 20e9  # bytes a second between a GPU and the host's memory (PCIe 4, 16 lanes)
_TOUCHED = 4  # times that a saved activation is written or read, forward and backward


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds, and what they are made of."""

    step: float
    tokens_per_second: float
    flop: float
    """Of one step."""
    bound: str
    """What limits it: `compute` or `bandwidth`."""


def flop(shape: ModelShape, setting: TrainingSetting, adapter_shape: AdapterShape, load: Workload) -> float:
    """FLOP of one micro-batch forward and back.

    A matrix of P values takes 2 P a token forward, 2 P for the gradient of its input, and 2 P for its own where it is
    trained (Kaplan et al. 2020, section 2.1); an adapter's A and B take 6 r (in + out). Recomputed layers are one
    more forward pass. Attention takes 4 a L / 2 a token forward, and 2.5 times that back (Dao 2023). Only target tokens
    meet the head.
    """
    active = sum(
        w.count * w.out * w.inner * (shape.experts_per_token if w.part == "experts" else 1) for w in shape.weights
    )
    again = 1 if setting.activation_checkpointing else 0
    matrices = 2 * active * load.tokens * (2 + again + (1 if setting.full else 0))
    pairs = sum(adapter_shape.ranks.get(w.key, 0) * (w.inner + w.out) for w in shape.weights)
    narrow = 2 * pairs * load.tokens * (3 + again)
    scores = shape.layers * 4 * shape.attention_width * load.squares / 2 * (3.5 + again)
    head = 2 * shape.vocabulary * shape.width * load.target_tokens * (3 if setting.full else 2)
    return matrices + narrow + scores + head


def bytes_moved(
    shape: ModelShape, setting: TrainingSetting, adapter_shape: AdapterShape, load: Workload, *, fused: bool
) -> float:
    """Bytes that one micro-batch moves: every weight as it is stored once forward and once back, and where it is upcast
    the wide copy written and read each time; and what is saved, a few times."""
    again = 1 if setting.activation_checkpointing else 0
    weights = weight_bytes(shape, setting) * (2 + again)
    if setting.precision != setting.compute_dtype:
        weights += 2 * (2 if setting.compute_dtype == "bfloat16" else 4) * shape.stored * (2 + again)
    saved = saved_activations(shape, setting, adapter_shape, load, fused=fused)
    return weights + _TOUCHED * (saved.layers + saved.outside) * (1 + again / 2)


def update_seconds(setting: TrainingSetting, trained: int, card: Card) -> float:
    """The optimizer's own time: parameters, gradients and both moments read and written once."""
    value = 2 if setting.full and setting.precision == "bfloat16" else 4
    states = 2 if setting.optimizer == "adamw-8bit" else 8
    seconds = trained * (3 * value + 2 * states) / (card.bandwidth * BANDWIDTH_REACHED)
    if setting.offload_optimizer:
        seconds += trained * 2 * states / HOST_BANDWIDTH
    return seconds


def step_time(
    shape: ModelShape,
    setting: TrainingSetting,
    adapter_shape: AdapterShape,
    load: Workload,
    card: Card,
    trained: int,
    *,
    fused: bool,
    cards: int = 1,
) -> StepTime | None:
    """Seconds of an optimizer step; None for a card of which only the memory is known.

    On several cards a step's micro-batches are shared out, so the micro-batches that one card runs take the time.
    """
    if not card.rate or not card.bandwidth:
        return None
    work = flop(shape, setting, adapter_shape, load)
    compute_seconds = work / (card.rate * EFFICIENCY[card.kind])
    bandwidth = bytes_moved(shape, setting, adapter_shape, load, fused=fused) / (card.bandwidth * BANDWIDTH_REACHED)
    each = max(1, -(-load.micro_batches // cards))
    step = each * max(compute_seconds, bandwidth) + update_seconds(setting, trained, card) / cards
    done = min(cards, load.micro_batches) * each if load.micro_batches >= cards else load.micro_batches
    return StepTime(
        step=step,
        tokens_per_second=load.tokens * done / step,
        flop=work * load.micro_batches,
        bound="compute" if compute_seconds >= bandwidth else "bandwidth",
    )
