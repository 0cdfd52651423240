"""A model's shape: how large its parts are and how often each occurs, without a single weight.

A shape is all that memory and time are computed from. It is made once from a config (`instantiate.py`), is a few
hundred bytes of JSON, and is the same for a checkpoint of 140 GB as for the empty architecture.

    Weights   matrices of one kind, `model.layers.*.self_attn.q_proj`: (out, in), how many, in which part of a layer
    Norms     normalizations of one kind: values each takes per token, how many
    Shape     all of them, and the embedding, the head and the rest

Letters: w width of the residual stream, V vocabulary, E experts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Part = Literal["attention", "mlp", "experts", "router", "other"]
"""Where in a layer a matrix stands; `experts` are the stacked weights of a mixture."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Stored matrices of one kind."""

    name: str
    """Their common name, with `*` for the number of the layer."""
    part: Part
    out: int
    inner: int
    """Features that come in."""
    count: int
    """How many of them the model has."""
    experts: int = 0
    """Matrices stacked in each; 0 for a plain one."""

    @property
    def values(self) -> int:
        """Values of all of them."""
        return self.count * max(1, self.experts) * self.out * self.inner

    @property
    def key(self) -> str:
        """Tells it from others of the same name and another size."""
        return f"{self.name} {self.out}x{self.inner}"

    @property
    def kind(self) -> str:
        """The last part of the name, by which `--targets` knows them."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Normalizations of one kind."""

    kind: Literal["rms", "layer"]
    width: int
    """Values that each of them takes per token."""
    count: int
    inside: bool
    """Whether they stand inside of the repeated layers."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything about a model that memory and time depend on."""

    architecture: str
    layers: int
    """Repeated layers, those that activation checkpointing runs again."""
    width: int
    vocabulary: int
    max_positions: int
    weights: tuple[Weights, ...]
    norms: tuple[Norms, ...]
    embedding: int
    """Values of the embedding matrix."""
    head: int
    """Values of the output head; 0 where it is tied to the embedding."""
    small: int
    """Values of norms, biases and position tables."""
    small_float32: int
    """Those among them that the model's class keeps in float32."""
    biases: int
    """Those of them that are biases of stored matrices."""
    heads: int
    gated: bool
    """Whether the feed-forward part multiplies by a gate, as in SwiGLU."""
    activation: str
    """Class of its nonlinearity."""
    rotary: int
    """Angles per token, for rotary positions; 0 where positions come in otherwise."""
    softcapped: bool
    """Whether attention's scores go through a soft cap, which no fused kernel computes."""
    plain_head: bool
    """Whether logits are the head's matmul and nothing else, so that they become their own gradient in place."""
    experts_per_token: int
    packs: bool
    """Whether examples are expected to run packed with our attention, rather than in stacks with the model's own."""

    gguf_bytes: int = 0
    """Bytes of all tensors in the GGUF file that the model is in; 0 where it is in a folder."""

    @property
    def stored(self) -> int:
        """Values of all stored matrices."""
        return sum(w.values for w in self.weights)

    @property
    def parameters(self) -> int:
        """Values of the whole model, tied ones once."""
        return self.stored + self.embedding + self.head + self.small

    @property
    def largest(self) -> int:
        """Values of the largest tensor that a checkpoint holds or that is trained."""
        return max(self.embedding, self.head, *(w.values // w.count for w in self.weights))

    @property
    def attention_width(self) -> int:
        """Values per token that attention gives on, heads times their width: what its output matrix takes."""
        found = [w for w in self.weights if w.part == "attention"]
        outputs = [w for w in found if w.out == self.width] or found
        return outputs[-1].inner if outputs else self.width

    @property
    def key_value_width(self) -> int:
        """Values per token of attention's keys, and of its values: with fewer heads than its queries where these share them."""
        found = [w for w in self.weights if w.part == "attention"]
        outputs = [w for w in found if w.out == self.width and w.inner == self.attention_width][-1:]
        most = max((w.count for w in found), default=0)
        given = sum(w.out for w in found if w not in outputs and w.count == most)
        return min(max(0, given - self.attention_width) // 2, self.attention_width) or self.attention_width

    @property
    def inner_width(self) -> int:
        """Values per token inside the feed-forward part (for a mixture, of one expert): what its last matrix takes."""
        found = [w for w in self.weights if w.part == "mlp"] or [w for w in self.weights if w.part == "experts"]
        return found[-1].inner if found else 0

    @property
    def mixture(self) -> bool:
        """Whether some layers route tokens to experts."""
        return any(w.part == "experts" for w in self.weights)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ModelShape:
        """What `to_json` gave."""
        fields = dict(values)
        fields["weights"] = tuple(Weights(**w) for w in values["weights"])
        fields["norms"] = tuple(Norms(**n) for n in values["norms"])
        return cls(**fields)
