"""What is trained, and how: the methods and rungs that a plan compares, and what an adapter adds to a model.

    Setting     one way to train: method, precision of the base, optimizer, checkpointing
    METHODS     the ways that `graft plan` shows: full training down its memory ladder, LoRA on two bases, QLoRA
    Adapted     how many layers of each kind carry an adapter, and of which ranks together

A rung of the ladder keeps what the rungs above it saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from graftlm.adapters.patterns import matches, refused_by_peft
from graftlm.config import ComputeDtype, Method, Precision
from graftlm.errors import ConfigError, nearest
from graftlm.planning.shapes import ModelShape, Weights

Optimizer = Literal["adamw", "adamw-8bit"]


@dataclass(frozen=True, kw_only=True)
class TrainingSetting:
    """One way to train."""

    key: str
    """Names it in JSON and in sentences: `full-8bit`."""
    label: str
    method: Method
    precision: Precision
    compute_dtype: ComputeDtype = "bfloat16"
    optimizer: Optimizer = "adamw"
    optimizer_in_backward: bool = False
    offload_optimizer: bool = False
    activation_checkpointing: bool = False
    offload_activations: bool = False
    """Whether what activation checkpointing saves waits in the host's memory."""
    dora: bool = False
    dropout: bool = False
    """Whether adapters drop some of their inputs."""
    deterministic: bool = False
    """Whether a GPU's results are the same bits in every repeat."""

    @property
    def full(self) -> bool:
        return self.method == "full"

    @property
    def flags(self) -> str:
        """The options of `graft train` that ask for it."""
        default = {"full": "float32", "lora": "bfloat16", "qlora": "nf4"}[self.method]
        parts = [f"--method {self.method}"]
        parts += [f"--base-precision {self.precision}"] if self.precision not in (default, "gguf") else []
        parts += [f"--optimizer {self.optimizer}"] if self.optimizer != "adamw" else []
        parts += ["--optimizer-in-backward"] if self.optimizer_in_backward else []
        parts += ["--offload-optimizer"] if self.offload_optimizer else []
        parts += ["--activation-checkpointing"] if self.activation_checkpointing else []
        parts += ["--offload-activations"] if self.offload_activations else []
        return " ".join(parts)

    def checkpointed(self) -> TrainingSetting:
        """The same with activation checkpointing."""
        return replace(self, activation_checkpointing=True)


_FULL = TrainingSetting(key="full", label="full", method="full", precision="float32")
METHODS: tuple[TrainingSetting, ...] = (
    _FULL,
    replace(_FULL, key="full-bfloat16", label="full, bfloat16 weights", precision="bfloat16"),
    replace(_FULL, key="full-8bit", label="  + 8-bit AdamW", precision="bfloat16", optimizer="adamw-8bit"),
    replace(
        _FULL,
        key="full-in-backward",
        label="  + steps in backward",
        precision="bfloat16",
        optimizer="adamw-8bit",
        optimizer_in_backward=True,
    ),
    replace(
        _FULL,
        key="full-offload",
        label="  + states on the host",
        precision="bfloat16",
        optimizer="adamw-8bit",
        optimizer_in_backward=True,
        offload_optimizer=True,
    ),
    TrainingSetting(key="lora", label="LoRA on bfloat16", method="lora", precision="bfloat16"),
    TrainingSetting(key="lora-int8", label="LoRA on int8", method="lora", precision="int8"),
    TrainingSetting(key="qlora", label="QLoRA (on nf4)", method="qlora", precision="nf4"),
)


def methods_of(shape: ModelShape) -> tuple[TrainingSetting, ...]:
    """The methods for a model. On one in a GGUF file LoRA is trained on the file's own blocks."""
    if not shape.gguf_bytes:
        return METHODS
    return tuple(replace(m, label="LoRA on GGUF blocks", precision="gguf") if m.key == "lora" else m for m in METHODS)


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """What an adapter puts beside a model's matrices, by the keys of `Weights`."""

    layers: Mapping[str, int] = field(default_factory=dict[str, int])
    """Adapted matrices (or stacks) of each kind."""
    ranks: Mapping[str, int] = field(default_factory=dict[str, int])
    """The sum of their ranks."""
    whole: int = 0
    """Values of modules that are trained whole, in float32, of trained embedding rows, and of DoRA's magnitudes."""

    def values(self, shape: ModelShape) -> int:
        """Trained values: r (in + out) for each matrix (Hu et al. 2021, section 4.2), times the experts of a stack."""
        pairs = sum(self.ranks.get(w.key, 0) * max(1, w.experts) * (w.inner + w.out) for w in shape.weights)
        return pairs + self.whole


NO_ADAPTER = AdapterShape()
"""Full training has no adapter."""


def adapter_shape(shape: ModelShape, targets: Sequence[str], rank: int, *, dora: bool = False) -> AdapterShape:
    """The adapter that `--targets`, `--rank` and `--dora` ask for; ConfigError for a target that matches nothing.

    Targets as `graft train` has them: `all-linear`, `attention`, `mlp`, a layer's last name, or a glob over whole names.
    """
    chosen: list[Weights] = []
    for target in targets:
        hit = [w for w in shape.weights if _matches(shape.architecture, w, target)]
        if not hit:
            known = sorted({w.kind for w in shape.weights} | {"all-linear", "attention", "mlp"})
            raise ConfigError(
                f"target '{target}' matches no layer of {shape.architecture}{nearest(target, known)} known: {', '.join(known)}"
            )
        chosen += [w for w in hit if w not in chosen]
    return AdapterShape(
        layers={w.key: w.count for w in chosen},
        ranks={w.key: rank * w.count for w in chosen},
        whole=sum(w.count * w.out for w in chosen) if dora else 0,
    )


def _matches(architecture: str, weights: Weights, target: str) -> bool:
    if target == "all-linear":
        return not refused_by_peft(architecture, weights.name)
    if target in ("attention", "mlp"):
        return not refused_by_peft(architecture, weights.name) and (weights.part == "attention") == (
            target == "attention"
        )
    return matches(weights.name, target)
