"""Runs whose peak memory is traced on the fake card, each beside what `graft plan` makes of it from the config alone.

    run = TracedRun(name="7B QLoRA", model={...}, method="qlora", tokens=2048, options={"activation_checkpointing": True})
    trace(worker, run)      bytes at the peak of a step, on the fake card (`scenarios.memory`)
    plan(run)               what the planner says

`test_traced_memory.py` holds both together for a small shape, `bench/traced.py` writes the table of 7B, 13B and 70B.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from fixtures import Worker
from transformers import LlamaConfig, MixtralConfig

from graftlm.config import Method, Precision
from graftlm.planning.activations import Workload
from graftlm.planning.instantiate import instantiate
from graftlm.planning.memory import MemoryRequirement, requirement
from graftlm.planning.method import NO_ADAPTER, TrainingSetting, adapter_shape
from graftlm.planning.shapes import ModelShape

PRECISIONS: dict[str, Precision] = {"full": "float32", "lora": "bfloat16", "qlora": "nf4"}


@dataclass(frozen=True, kw_only=True)
class TracedRun:
    """A step of one micro-batch, whose examples have one length and count all of their tokens but the first."""

    name: str
    model: dict[str, Any]
    """The values of a `LlamaConfig`; of a `MixtralConfig` where it has `num_local_experts`."""
    method: Method
    tokens: int
    """Of an example."""
    batch: int = 1
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further options of `graft train`."""

    @property
    def precision(self) -> Precision:
        """How the base is stored."""
        return self.options.get("base_precision", PRECISIONS[self.method])


def trace(worker: Worker, run: TracedRun) -> dict[str, int]:
    """Bytes on the card: `peak` of a step, the second, `base` of the base alone, `host` of pinned memory."""
    options = {**run.options, "base_precision": run.precision}
    return worker.ask("memory", model=run.model, method=run.method, lengths=[run.tokens] * run.batch, **options)


def plan(run: TracedRun, *, fused: bool = True) -> MemoryRequirement:
    """What the planner makes of the run on a GPU; `fused`: norms and gated products are one operation each (Triton)."""
    shape, given = _shape(tuple(run.model.items())), run.options
    setting = TrainingSetting(
        key=run.method, label=run.method, method=run.method, precision=run.precision,
        optimizer=given.get("optimizer", "adamw"), optimizer_in_backward=given.get("optimizer_in_backward", False),
        offload_optimizer=given.get("offload_optimizer", False),
        activation_checkpointing=given.get("activation_checkpointing", False),
        offload_activations=given.get("offload_activations", False), dora=given.get("dora", False),
        dropout="lora_dropout" in given,
    )  # fmt: skip
    adapter = (
        NO_ADAPTER if setting.full else adapter_shape(shape, ["all-linear"], given.get("rank", 16), dora=setting.dora)
    )
    load = Workload(
        tokens=run.tokens * run.batch,
        target_tokens=(run.tokens - 1) * run.batch,
        longest=run.tokens,
        examples=run.batch,
    )
    return requirement(shape, setting, adapter, load, "cuda", fused=fused)


@cache
def _shape(model: tuple[tuple[str, Any], ...]) -> ModelShape:
    given = dict(model)
    return instantiate((MixtralConfig if "num_local_experts" in given else LlamaConfig)(**given))
