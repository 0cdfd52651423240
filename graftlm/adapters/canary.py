"""Check that an adapter behaves as it did when it was saved: the same token ids, and nearly the same logits.

Fingerprint and checksums show that the files are the same. They do not show an edited chat template, another `rope_theta` in
the base's config, a library that computes something else, or a kernel that is wrong on this machine. So the manifest has two
samples of behaviour, which cost one small forward pass to check:

**Golden ids**: a fixed chat and a fixed text as token ids, and the tokens that end an answer.

**Canary**: the last logits of a few prompts, with the base alone and with the adapter. Each row of logits z (V,), minus its
mean (softmax ignores it), is projected to K numbers: P z with P (K, V) of +-1 / sqrt(K) by a fixed hash. Such a projection
preserves distances (Johnson and Lindenstrauss 1984; Achlioptas 2003, theorem 1.1): with 4 prompts and K = 16, 64 numbers give
the relative distance of two sets of logits to within about 10 % of itself.

    d(x, y) = |x - y| / |y|        y in the manifest, x now

Letters: N prompts, L tokens in each, V vocabulary, K numbers of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from graftlm.adapters.attach import Adapter, attach, detach
from graftlm.adapters.manifest import trained_compute_dtype
from graftlm.base.chat import Encoder, Message
from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base
from graftlm.config import ComputeDtype, Precision
from graftlm.errors import AdapterError, DataError
from graftlm.kernels.counter_rng import uniform_words
from graftlm.segments import Segments

PROMPTS, LENGTH, KEPT = 4, 12, 16
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
SCRATCH = 1 << 30
"""The slot in which an adapter is checked; nothing else uses it."""

TEXT = (
    "Grafted 3 scions (cv. 'Golden Noble'), 17.5 cm each:\n\n\tÅse's α-test\u2003costs 1,250 €; "
    'ok? 接ぎ木 🌱 {"a": [1, 2]}'
)
CHAT: tuple[Message, ...] = (
    {"role": "user", "content": f"  {TEXT}\n"},
    {"role": "assistant", "content": "Yes.\n```py\nx = 1\n```"},
    {"role": "user", "content": "Why? "},
)

# Tolerance t between two precisions of one base; measured by `bench/trust.py`, with a margin.
_TOLERANCE = {
    frozenset({"float32"}): 1e-3, frozenset({"bfloat16"}): 1e-3, frozenset({"int8"}): 1e-3, frozenset({"nf4"}): 1e-3,
    frozenset({"float32", "bfloat16"}): 0.1, frozenset({"float32", "int8"}): 0.15, frozenset({"bfloat16", "int8"}): 0.15,
}  # fmt: skip
_FOUR_BITS = 0.6
_DTYPE_TOLERANCE = {"float32": 3e-4, "bfloat16": 0.1, "bf16-mixed": 0.1}
"""Tolerance f of the same precision, for another order of summation, by compute dtype. With `bf16-mixed` the canary is
computed in float32."""


# ------------------------------------------------------------------------------------------------------- golden ids


def golden(encoder: Encoder) -> dict[str, Any]:
    """The fixed chat and text as ids, and the stop tokens; the chat is None if the template rejects it."""
    try:
        chat = encoder.prompt(CHAT)
    except DataError:
        chat = None
    return {"chat": chat, "text": encoder.prompt_text(TEXT), "stop": sorted(encoder.stop_ids)}


def check_golden(name: str, expected: Mapping[str, Any], encoder: Encoder, *, chats: bool) -> None:
    """Raise AdapterError if the tokenizer, or for an adapter of chats the template, gives other ids than in training."""
    found = golden(encoder)
    for key, what in (("text", "tokenizer"), ("chat", "chat template"), ("stop", "stop tokens")):
        if found[key] == expected[key] or (key != "text" and not chats):
            continue
        if key == "stop":
            raise AdapterError(
                f"{name} was trained with stop tokens {expected['stop']}, here they are {found['stop']}; "
                "use the tokenizer and template it was trained with"
            )
        raise AdapterError(
            f"{name} was trained with another {what}: the fixed {key} {_difference(expected[key], found[key])}; "
            f"use the {what} it was trained with"
        )


def _difference(expected: Sequence[int] | None, found: Sequence[int] | None) -> str:
    if expected is None or found is None:
        return "was refused then and is not now" if expected is None else "is refused now and was not then"
    at = next((i for i, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found)))
    here = [str(ids[at]) if at < len(ids) else "nothing" for ids in (expected, found)]
    return f"was {len(expected)} tokens and is {len(found)}, at position {at} token {here[0]} then and {here[1]} now"


# ------------------------------------------------------------------------------------------------------- canary


def prompts(base: Base, text: Sequence[int]) -> list[list[int]]:
    """N prompts of L ids: first the fixed text, then ids drawn by a hash from the whole vocabulary."""
    limit = base.structure.max_positions
    length = min(LENGTH, limit) if limit else LENGTH
    vocabulary = base.structure.vocabulary
    drawn = [(uniform_words(length, "canary", i) & 0x7FFFFFFF) % vocabulary for i in range(PROMPTS)]
    first = [i for i in text if i < vocabulary][:length]
    rows = [d.tolist() for d in drawn]
    return [*([first] if len(first) == length else rows[:1]), *rows[1:]]


@torch.no_grad()
def summaries(base: Base, adapter: Adapter, given: Sequence[Sequence[int]]) -> tuple[list[float], list[float]]:
    """The projected logits of N prompts of one length: of the base alone, and with the adapter; N K numbers each.

    One forward pass of 2 N L tokens in `base.activation_dtype`, with the adapter in a slot of its own.
    """
    lengths = tuple(len(ids) for ids in given)
    attach(base, adapter, slot=SCRATCH)
    try:
        segments = Segments(
            lengths=lengths * 2, slots=(0,) * len(lengths) + (SCRATCH,) * len(lengths), batched=not base.packs
        )
        ids = torch.tensor([i for one in given for i in one] * 2, device=base.device)  # (2 N L,)
        hidden = base.hidden(ids, ForwardContext(segments, bf16_matmul=False))  # (2 N L, width)
        ends = torch.tensor([start + n - 1 for start, n in zip(segments.starts, segments.lengths)], device=base.device)
        of_ends = Segments(lengths=(1,) * len(ends), slots=segments.slots)
        logits = base.logits(hidden[ends], ForwardContext(of_ends, bf16_matmul=False)).float()  # (2 N, V)
    finally:
        detach(base, slot=SCRATCH)
    kept = _project(logits)  # (2 N, K)
    half = len(lengths)
    return _rounded(kept[:half]), _rounded(kept[half:])


def _project(logits: Tensor) -> Tensor:
    """logits (n, V) -> (n, K), as the module's docstring says."""
    centred = (logits - logits.mean(dim=1, keepdim=True)).double()
    words = uniform_words(logits.shape[1], "canary directions", device=logits.device)  # (V,)
    bits = (words[:, None] >> torch.arange(KEPT, device=logits.device)) & 1  # (V, K)
    return centred @ (bits.double() * 2 - 1) / math.sqrt(KEPT)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.7g}") for value in values.flatten().tolist()]


def distance(found: Sequence[float], expected: Sequence[float]) -> float:
    """d(found, expected); infinite if a value is not finite or the lengths differ."""
    if len(found) != len(expected):
        return math.inf
    top = math.dist(found, expected)
    d = top / max(math.hypot(*expected), 1e-30) if top else 0.0
    return d if math.isfinite(d) else math.inf


def check_finite(name: str, base: Base, adapter: Adapter) -> None:
    """Raise AdapterError for an adapter whose logits are not finite: the only check without a manifest."""
    _, on = summaries(base, adapter, prompts(base, ()))
    if not all(map(math.isfinite, on)):
        raise AdapterError(f"{name}: its logits are not finite; its tensors or its alpha are too large")


def take(base: Base, adapter: Adapter, text: Sequence[int]) -> dict[str, Any]:
    """The canary for the manifest, from one forward pass; `text` (ids) gives the first prompt.

    Raises AdapterError for logits that are not finite.
    """
    given = prompts(base, text)
    bare, on = summaries(base, adapter, given)
    if not all(map(math.isfinite, (*bare, *on))):
        raise AdapterError("the adapter's logits are not finite; it is not saved")
    tolerance = {kind: _tolerance(base.precision, kind) for kind in PRECISIONS}
    return {"prompts": given, "base": bare, "adapter": on, "tolerance": tolerance, "products": _canary_dtype(base)}


def _tolerance(trained: Precision, here: Precision) -> float:
    # The blocks of a GGUF file are the values that float32 has of the same file.
    pair = frozenset("float32" if kind == "gguf" else kind for kind in (trained, here))
    return _TOLERANCE.get(pair, _FOUR_BITS)


def check_kept(name: str, kept: Mapping[str, Any], trained: Precision) -> None:
    """Raise AdapterError if a manifest allows more tolerance than Graft's own."""
    for kind in PRECISIONS:
        most = _tolerance(trained, kind)
        if kept["tolerance"].get(kind, most) > most:
            raise AdapterError(
                f"{name}: canary.tolerance.{kind} is {kept['tolerance'][kind]:g}, and between {trained} and {kind} at most "
                f"{most:g} is allowed; it is damaged, or from a newer graftlm"
            )


def _canary_dtype(base: Base) -> ComputeDtype:
    """The compute dtype of a base's canary."""
    return "float32" if base.compute_dtype == "bf16-mixed" else base.compute_dtype


def check(name: str, base: Base, adapter: Adapter, kept: Mapping[str, Any], trained: Mapping[str, Any]) -> float:
    """Compute the canary and compare it with the manifest's; returns d of the adapter's logits.

    With y the logits, D the adapter's part of them (y minus the base's), t the tolerance of this precision and f that of the
    compute dtype: the base's logits must be within (t + f) |y|, D within t |D| + f |y|. Raises AdapterError.
    """
    given: list[list[int]] = kept["prompts"]
    limit = base.structure.max_positions or LENGTH
    length = min(LENGTH, limit)
    if len({len(ids) for ids in given}) > 1 or len(given[0]) > limit:
        raise AdapterError(f"{name}: the canary's prompts are not of one length of at most {limit}; it is damaged")
    if len({tuple(ids) for ids in given}) < PROMPTS or len(given[0]) < length:
        raise AdapterError(
            f"{name}: the canary has {len({tuple(ids) for ids in given})} different prompts of {len(given[0])} tokens, "
            f"expected {PROMPTS} of {length}; it is damaged"
        )
    if max(map(max, given)) >= base.structure.vocabulary:
        last = base.structure.vocabulary - 1
        raise AdapterError(f"{name}: the canary has token {max(map(max, given))}, this base's last one is {last}")
    bare, on = summaries(base, adapter, given)
    if not len(kept["base"]) == len(kept["adapter"]) == len(on):
        raise AdapterError(
            f"{name}: the canary keeps {len(kept['adapter'])} numbers, expected {len(on)}; it is damaged"
        )
    t = kept["tolerance"].get(base.precision, _tolerance(trained["precision"], base.precision))
    f = max(
        _DTYPE_TOLERANCE[_canary_dtype(base)], _DTYPE_TOLERANCE[kept.get("products") or trained_compute_dtype(trained)]
    )
    off = distance(bare, kept["base"])
    if not off <= t + f:
        raise AdapterError(
            f"{name}: the canary failed on the base alone: its logits differ by {off:.2%} from training, {t + f:.2%} are "
            f"allowed in {base.precision}. The weights are the same, so compare its config.json and the versions of "
            f"transformers and torch with those of training"
        )
    size = math.hypot(*kept["adapter"])
    part, then = ([a - b for a, b in zip(x, y)] for x, y in ((on, bare), (kept["adapter"], kept["base"])))
    error, allowed = math.dist(part, then), t * math.hypot(*then) + f * size
    if not error <= allowed or not math.isfinite(error):  # also for a manifest that holds infinity itself
        raise AdapterError(
            f"{name}: the canary failed: what the adapter adds to the logits differs by {error / size:.2%} of their norm, "
            f"{allowed / size:.2%} are allowed in {base.precision}. It is not applied as it was trained; report this with "
            "the versions of graftlm, transformers and torch"
        )
    return distance(on, kept["adapter"])
