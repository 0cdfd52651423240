"""The memory figures that are usually quoted for 7B, 13B and 70B, beside what this implementation takes.

They are quoted without settings. Here each has a setting under which it holds, and one under which Graft takes less. Neither
shapes.json nor models.toml holds them: they are ranges from elsewhere, and `graft plan llama-2-7b` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from graftlm.planning.activations import Workload
from graftlm.planning.fitting import PlanCase
from graftlm.planning.memory import requirement, saved_bytes
from graftlm.planning.method import METHODS, TrainingSetting, adapter_shape
from graftlm.planning.shapes import ModelShape

GB = 1e9
_BY_KEY = {m.key: m for m in METHODS}


@dataclass(frozen=True, kw_only=True)
class QuotedRange:
    """A quoted range in GB, and a setting to compare it with."""

    what: str
    low: float
    high: float
    setting: TrainingSetting
    load: Workload
    under: str
    """That setting in words."""


@dataclass(frozen=True, kw_only=True)
class QuotedFigure:
    """A quoted range beside what this implementation takes."""

    claim: QuotedRange
    ours: float
    """GB under the claim's settings."""

    @property
    def verdict(self) -> str:
        """Whether the range holds here."""
        if self.ours < 0.995 * self.claim.low:
            return "ours is lower"
        return "holds" if self.ours <= 1.005 * self.claim.high else "ours is higher"

    def to_json(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "claim": self.claim.what, "low_gb": self.claim.low, "high_gb": self.claim.high, "ours_gb": round(self.ours, 4),
            "under": self.claim.under, "verdict": self.verdict,
        }  # fmt: skip


def _one(tokens: int) -> Workload:
    return Workload(tokens=tokens, target_tokens=tokens, longest=tokens)


def _claims(model: str) -> list[QuotedRange]:
    full, lora, int8, qlora = (_BY_KEY[k] for k in ("full-bfloat16", "lora", "lora-int8", "qlora"))
    eight = _BY_KEY["full-8bit"]

    def claim(
        what: str,
        low: float,
        high: float,
        setting: TrainingSetting,
        tokens: int,
        how: str,
        *,
        checkpointed: bool = True,
    ) -> QuotedRange:
        setting = setting.checkpointed() if checkpointed else setting
        run = f"{how}, one example of {tokens:,} tokens" + (", activation checkpointing" if checkpointed else "")
        return QuotedRange(what=what, low=low, high=high, setting=setting, load=_one(tokens), under=run)

    states = "bfloat16 weights and gradients, float32 AdamW states"
    nf4, dense, narrow = (f"{base} base, rank 16 on all linear layers" for base in ("an nf4", "a bfloat16", "an int8"))
    if model == "llama-2-7b":
        return [
            claim("7B full, 56 to 84 GB", 56, 84, full, 2048, f"{states} (12 bytes a value; 56 GB is 8)"),
            claim("7B full, 56 to 84 GB", 56, 84, eight, 2048, "the same with 8-bit states"),
            claim("7B LoRA, 16 to 20 GB", 16, 20, lora, 512, dense, checkpointed=False),
            claim("7B LoRA, 16 to 20 GB", 16, 20, lora, 2048, dense),
            claim("7B QLoRA, 6 to 8 GB", 6, 8, qlora, 512, nf4, checkpointed=False),
            claim("7B QLoRA, 6 to 8 GB", 6, 8, qlora, 2048, nf4),
        ]
    if model == "llama-2-13b":
        return [
            claim("13B QLoRA, 10 to 14 GB", 10, 14, qlora, 512, nf4, checkpointed=False),
            claim("13B QLoRA, 10 to 14 GB", 10, 14, qlora, 2048, nf4),
        ]
    if model == "llama-2-70b":
        return [
            claim("70B full, about 560 GB", 530, 590, full, 2048, f"{states} (12 bytes a value; 560 GB is 8)"),
            claim("70B full, about 560 GB", 530, 590, eight, 2048, "the same with 8-bit states"),
            claim("70B LoRA, 80 to 90 GB", 80, 90, lora, 2048, "a bfloat16 base, whose weights alone are 138 GB"),
            claim("70B LoRA, 80 to 90 GB", 80, 90, int8, 512, narrow, checkpointed=False),
            claim("70B LoRA, 80 to 90 GB", 80, 90, int8, 2048, narrow),
            claim("70B QLoRA, 36 to 48 GB", 36, 48, qlora, 2048, nf4),
        ]
    return []


def quoted_figures(name: str, case: PlanCase) -> list[QuotedFigure]:
    """The quoted ranges of a model, each beside ours on a GPU with the extra `gpu`; empty for other models."""
    found: list[QuotedFigure] = []
    for claim in _claims(name):
        how = replace(claim.setting, compute_dtype="bfloat16")
        adapter = replace(case, rank=16, targets=("all-linear",)).adapter_shape(how)
        took = requirement(case.shape, how, adapter, claim.load, "cuda", fused=True).training
        found.append(QuotedFigure(claim=claim, ours=took / GB))
    return [*found, *_adapter_sizes(name, case.shape)]


def _adapter_sizes(name: str, shape: ModelShape) -> list[QuotedFigure]:
    """Adapters of 10 to 50 MB at 7B and of 50 to 200 MB at 70B, at ranks 8 to 16."""
    ranges = {
        "llama-2-7b": ("7B adapter, 10 to 50 MB", 0.010, 0.050),
        "llama-2-70b": ("70B adapter, 50 to 200 MB", 0.050, 0.200),
    }
    if name not in ranges:
        return []
    what, low, high = ranges[name]
    lora = _BY_KEY["lora"]
    found: list[QuotedFigure] = []
    for rank, targets, words in (
        (8, ("q_proj", "v_proj"), "rank 8 on queries and values"),
        (16, ("q_proj", "v_proj"), "rank 16 on queries and values"),
        (16, ("attention",), "rank 16 on attention"),
        (16, ("all-linear",), "rank 16 on all linear layers"),
    ):
        size = saved_bytes(shape, lora, adapter_shape(shape, targets, rank)) / GB
        under = f"{words}, in float32 as Graft saves it ({size * 500:,.0f} MB in 16 bits)"
        found.append(QuotedFigure(
            claim=QuotedRange(what=what, low=low, high=high, setting=lora, load=_one(1), under=under), ours=size,
        ))  # fmt: skip
    return found
