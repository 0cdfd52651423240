"""What a forward pass leaves for the backward pass: the tensors that each module saves, as a table.

Every entry is one line: which module, how many values per token. The table holds what this implementation saves
(`base/modules.py`, `adapters/bank.py`, `base/fused.py`, `base/attention.py`), not what a model needs in theory; a test runs
every architecture and compares with what autograd really saved.

Letters: w width of the residual stream, a heads times their width, f inner width of the feed-forward part, H heads,
L length of an example, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graftlm.planning.method import AdapterShape, TrainingSetting
from graftlm.planning.shapes import ModelShape, Norms, Weights

FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The heaviest micro-batch of a run: examples laid end to end, and how a step is made of micro-batches."""

    tokens: int
    target_tokens: int
    """Target tokens among them: those that get logits."""
    longest: int
    """Tokens of its longest example."""
    examples: int = 1
    micro_batches: int = 1
    """Micro-batches of one optimizer step."""
    small: bool = False
    """Whether its micro-batches have fewer tokens than the default, by choice or for lack of memory."""

    @property
    def mmap_allocations(self) -> bool:
        """Whether large tensors of a step are mmap-backed on a processor (`heap.py`): a third more time."""
        return self.small and self.micro_batches > 1

    @property
    def squares(self) -> int:
        """About the sum of the squared lengths: the values of attention's score matrices, where they are materialized."""
        return self.tokens * self.longest


@dataclass(frozen=True, kw_only=True)
class SavedActivations:
    """Bytes that autograd saves in the forward pass of a micro-batch."""

    layer: int
    """Of one layer."""
    layers: int
    """Of all layers together."""
    inputs: int
    """Of the layers' inputs alone: what activation checkpointing saves; two of them if they wait in the host's memory."""
    outside: int
    """Of the modules before and after the layers."""
    behind: int
    """Of the modules after the layers alone: freed when the layers' backward pass begins."""


def saved_activations(
    shape: ModelShape,
    setting: TrainingSetting,
    adapter_shape: AdapterShape,
    load: Workload,
    *,
    fused: bool,
    shares_keys: bool = False,
) -> SavedActivations:
    """What autograd saves in the forward pass of a micro-batch.

    `fused`: norms and gated products run as one operation each. `shares_keys`: attention reads keys and values as they are,
    where several heads of queries share one of theirs (`kernels/native/attention.c`); elsewhere they are repeated for each.
    """
    c = 2 if setting.compute_dtype == "bfloat16" else 4  # bytes of a value in the residual stream
    per_token = sum(_norm(n, setting.full, c, fused) * n.count for n in shape.norms if n.inside)
    per_token += _inputs(shape, setting, adapter_shape) * c
    per_token += (
        sum(adapter_shape.ranks.get(w.key, 0) * _tokens_share(shape, w) for w in shape.weights) * c
    )  # h = x A^T
    if setting.dora:  # what the ratio of magnitude and norm is multiplied with
        per_token += (
            sum(adapter_shape.layers.get(w.key, 0) * w.out * _tokens_share(shape, w) for w in shape.weights) * c
        )
    attentions = attention_modules(shape)
    per_token += attentions * _attention(shape, c, shares_keys)
    per_token += _feed_forward(shape, c, fused)
    layers = int(per_token * load.tokens)
    layers += attentions * _written_out(shape, load, c)
    count = max(1, shape.layers)
    unsaved = 0 if setting.full else int(_in_front(shape, adapter_shape, c, fused, shares_keys) * load.tokens)
    behind = sum(_norm(n, setting.full, c, fused) * n.count for n in shape.norms if not n.inside) * load.tokens
    front = (8 + 2 * shape.rotary * c) * load.tokens  # the token ids; cosines and sines of the positions
    if not setting.full:  # before the first adapter nothing requires a gradient
        front -= (
            sum(_norm(n, False, c, fused) for n in shape.norms if n.inside and n.width == shape.width) * load.tokens
        )
    return SavedActivations(
        layer=layers // count,
        layers=layers - unsaved,
        inputs=(min(2, count) if setting.offload_activations else count) * shape.width * c * load.tokens,
        outside=front + behind,
        behind=behind,
    )


def offloaded_bytes(shape: ModelShape, setting: TrainingSetting, load: Workload) -> int:
    """Of the layers' inputs, in the host's memory (`base/activation_offload.py`)."""
    c = 2 if setting.compute_dtype == "bfloat16" else 4
    return shape.layers * shape.width * c * load.tokens if setting.offload_activations else 0


# ---- the table: bytes per token, each module's own -------------------------------------------------------------------


def _norm(norm: Norms, trained: bool, c: int, fused: bool) -> int:
    """LayerNorm: its input, mean and deviation. RMSNorm fused: its input and one number; composed of PyTorch's operations
    it works in float32 and keeps its upcast input, and what the weight is multiplied with when that is trained."""
    if norm.kind == "layer":
        return norm.width * c + 2 * FLOAT32
    if fused:
        return norm.width * c + FLOAT32
    return norm.width * FLOAT32 + FLOAT32 + (norm.width * c if trained else 0)


def _inputs(shape: ModelShape, setting: TrainingSetting, adapter_shape: AdapterShape) -> float:
    """Inputs of linear layers, values per token over all layers: saved for the gradient of W, or of A.

    Layers that read the same input share it: q, k and v; gate and up. What attention gives on is counted there.
    """
    total = 0.0
    for part in ("attention", "mlp", "router", "other"):
        taken = [w for w in shape.weights if w.part == part and (setting.full or adapter_shape.layers.get(w.key))]
        outputs = {w.key for w in _outputs(shape, part)}
        readers = [w for w in taken if w.key not in outputs]
        layers = {(_layer(w), w.inner): w.count for w in readers}
        shared = part == "mlp" and _parallel(shape) and total > 0
        total += 0 if shared else sum(inner * count for (_, inner), count in layers.items())
        if part != "attention":
            total += sum(w.inner * w.count for w in taken if w.key in outputs)
    return total


def _parallel(shape: ModelShape) -> bool:
    """Whether one norm feeds attention and the feed-forward part beside it."""
    return sum(n.count for n in shape.norms if n.inside and n.width == shape.width) == shape.layers


def _in_front(shape: ModelShape, adapter_shape: AdapterShape, c: int, fused: bool, shares_keys: bool) -> float:
    """Of the first layer, what lies between its first norm and its first adapter: nothing there requires a
    gradient, so nothing of it is saved. Most with `--targets mlp`: all of that layer's attention."""

    def carry(weights: Sequence[Weights]) -> bool:
        return any(adapter_shape.layers.get(w.key) for w in weights)

    attention, outputs = [w for w in shape.weights if w.part == "attention"], _outputs(shape, "attention")
    feed_forward, last = [w for w in shape.weights if w.part in ("mlp", "experts", "router")], _outputs(shape, "mlp")
    if carry([w for w in attention if w not in outputs]):
        return 0.0
    inside = [n for n in shape.norms if n.inside]
    gone = _attention(shape, c, shares_keys)
    gone += sum(_norm(n, False, c, fused) * n.count for n in inside if n.width != shape.width) // max(1, shape.layers)
    if carry(outputs):
        return gone - shape.attention_width * c  # its result is what the adapter behind it reads
    # Half of a layer's norms stand around its attention, and one in front of the feed-forward part; the first is counted.
    gone += sum(_norm(n, False, c, fused) * (n.count // shape.layers // 2) for n in inside if n.width == shape.width)
    if carry([w for w in feed_forward if w not in last]):
        return gone
    return gone + _feed_forward(shape, c, fused) / max(1, shape.layers)


def _layer(weights: Weights) -> str:
    """The module that a matrix stands in."""
    return weights.name.rpartition(".")[0]


def _outputs(shape: ModelShape, part: str) -> list[Weights]:
    """The matrices of a part that give the residual stream: o_proj, down_proj."""
    found = [w for w in shape.weights if w.part == part and w.out == shape.width]
    last: dict[str, Weights] = {_layer(w): w for w in found}  # q_proj may have the same size and stands in front
    return list(last.values())


def attention_modules(shape: ModelShape) -> int:
    """Attention modules of the model."""
    return sum(w.count for w in _outputs(shape, "attention"))


def _attention(shape: ModelShape, c: int, shares_keys: bool) -> int:
    """Queries and the result, 2 a; keys and values, 2 a where they are repeated to all heads; a sum a head in float32."""
    keys = shape.key_value_width if shares_keys else shape.attention_width
    return 2 * (shape.attention_width + keys) * c + shape.heads * FLOAT32


def _written_out(shape: ModelShape, load: Workload, c: int) -> int:
    """Score matrices of whole examples where no fused kernel computes them: H L^2, and as many again under a soft cap."""
    times = 2 if shape.softcapped else 0 if shape.packs else 1
    return times * shape.heads * load.squares * c - bool(times) * shape.heads * FLOAT32 * load.tokens


def _feed_forward(shape: ModelShape, c: int, fused: bool) -> float:
    """What stands between the matrices of the feed-forward part.

    gated, fused        gate and up, 2 f
    gated               gate, its activation, up, 3 f
    GELU by formula     four parts of it, 4 f
    GELU or SiLU        its input, f
    ReLU                its result, which is the next matrix's input
    """
    gated = 2 if fused and shape.activation in ("silu", "swish", "gelu_pytorch_tanh") else 3
    plain = {"relu": 0, "gelu_new": 4, "gelu_fast": 4}.get(shape.activation, 1)
    factor = gated if shape.gated else plain
    total = sum(factor * w.inner * w.count for w in _outputs(shape, "mlp")) * c
    for w in shape.weights:
        if w.part == "experts" and w.out == shape.width:
            # Of each token that is sent to an expert: its state, what stands between, the input of the last matrix, and
            # the result before and after its weight.
            total += shape.experts_per_token * ((factor + 1) * w.inner + 3 * shape.width) * w.count * c
        elif w.part == "router":
            total += w.count * w.out * FLOAT32  # its probabilities
    return total


def _tokens_share(shape: ModelShape, weights: Weights) -> int:
    """How often a token passes a matrix: once, or through as many experts as it is sent to."""
    return shape.experts_per_token if weights.part == "experts" else 1
