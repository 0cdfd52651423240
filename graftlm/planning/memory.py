"""Bytes: what each part of a training takes, and when most of them are in memory at once.

    weights      the base as it is stored             adapters     A, B and whole modules, in float32
    gradients    of what is trained                   optimizer    AdamW's two moments
    activations  what the backward pass needs         logits       of one chunk, and their gradients
    kv cache     of answers that are generated between steps (`--score`)
    workspace    what an operation needs while it runs, and what the allocator holds between tensors
    runtime      what libraries take once they are used (processors only)

A step has moments at which memory may be highest; the peak is the highest of them, and its parts sum to it:

    loss      all activations and a chunk of logits       backward   all activations and one layer's own gradients
    end       all gradients, the first layer's backward   update     all gradients and the optimizer's work
    answers   between steps, where answers are scored: no gradients, the KV cache (`answers.py`)

Every number below is a size that this implementation gives its tensors; `bench/memory.py` holds them against real runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Literal

from graftlm.config import Precision
from graftlm.planning.activations import FLOAT32, Workload, offloaded_bytes, saved_activations
from graftlm.planning.answers import AnswerLoad, answer_logit_bytes, answer_workspace_bytes, kv_cache_bytes
from graftlm.planning.full_step import HOST_SLAB, full_ends
from graftlm.planning.method import AdapterShape, TrainingSetting
from graftlm.planning.shapes import ModelShape, Weights

CHUNK_LOGITS, CHUNK_ROWS = 1 << 23, 96  # values, and fewest rows, of logits at once: those of `training/loss.py`
CHUNK_LOGITS_GPU, CHUNK_LOGITS_CAPPED = 1 << 27, 1 << 25
MOMENT_BLOCK, SMALL = 256, 4096  # of 8-bit moments: `kernels/moments.py`
NF4_BLOCK, NF4_GROUP = 64, 256  # `kernels/stored.py`
PANEL = 16 << 20  # bytes of an upcast weight at once on a processor: `kernels/native`
PROCESSORS = 148  # of the GPU that has the most (B200); an H200 has 132

# What a processor's run takes beyond its tensors: what libraries make once they are used. Where large tensors are mmap-
# backed, tensors and this are all there is (bench/memory.py: 30M, activation checkpointing, 212 MB measured, 202 MB of
# tensors).
RUNTIME_BYTES = 10_000_000
# The tokenizer, for each entry of the vocabulary: its text, its place in two tables and its merges, as the tokenizers library
# holds them (325 bytes for SmolLM2, which has a merge an entry, 503 for Gemma 3, which has two), and while its JSON is
# read, five times that (Gemma 3: 588 MB for 262,144 entries).
TOKENIZER_BYTES, TOKENIZER_READING_BYTES = 450, 2250
# A loaded base is tried on texts of 24 tokens (`base/attention.py`), whose logits exist four times at once: alone, all of them
# joined, packed, and their difference.
PROOF_TOKENS, PROOF_COPIES = 24, 4
# glibc gives tensors of 32 MB and more mmap-backed allocations; smaller ones share a heap, in which gaps stay between
# tensors that live long. Measured over runs of bench/memory.py as a share of what a forward pass saves there: 0.28 to 0.43. A
# product of gate and up that is not saved leaves a hole of its own size in each layer besides: it is freed between tensors
# that stay, and does not fit in there again. There are none where every large tensor is mmap-backed
# (`heap.py`).
HEAP_LIMIT, HEAP_HOLES = 32 << 20, 0.30

Device = Literal["cuda", "cpu", "mps"]


@dataclass(frozen=True, kw_only=True)
class MemoryParts:
    """Bytes of each part at one moment."""

    weights: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    kv_cache: int = 0
    workspace: int = 0
    runtime: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(int(getattr(self, f.name)) for f in fields(self))

    def to_json(self) -> dict[str, int]:
        """Every part by name, and their sum."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True, kw_only=True)
class MemoryRequirement:
    """What one way of training takes."""

    setting: TrainingSetting
    trained: int
    """Trained values."""
    parts: MemoryParts
    """At the moment of training at which they are most."""
    moment: str
    """Which moment that is."""
    moments: Mapping[str, MemoryParts]
    """The parts at every moment of a step."""
    loading: int
    """Bytes at the peak while the base is loaded."""
    host: int
    """Bytes of optimizer states, and of activations, in the host's memory instead."""
    saved: int
    """Bytes of the adapter, or of the trained model, on disk."""

    @property
    def training(self) -> int:
        """Bytes at the peak of training."""
        return self.parts.total

    @property
    def peak(self) -> int:
        """Bytes that have to be there: the higher of the two peaks."""
        return max(self.training, self.loading)


# ---- one formula for each part ---------------------------------------------------------------------------------------


def stored_bytes(weights: Weights, precision: Precision) -> int:
    """Bytes of all matrices of one kind in their stored form.

    nf4: a 4-bit code a value, an 8-bit scale for 64 values, a float32 scale for 256 of these, one float32 mean a tensor:
    4 + 8 / 64 + 32 / (64 x 256) = 4.127 bits (Dettmers et al. 2023, section 3). int8: a code a value and a float32 scale a
    row (`kernels/stored.py`). Routers keep 16 bits at least (`base/surgery.py`).
    """
    values = weights.values // weights.count
    if precision in ("int8", "nf4") and weights.part == "router":
        precision = "bfloat16"
    if precision == "nf4":
        blocks = math.ceil(values / NF4_BLOCK)
        one = math.ceil(values / 2) + blocks + 4 * math.ceil(blocks / NF4_GROUP) + 4
    elif precision == "int8":
        one = values + 4 * values // weights.inner
    else:
        one = values * (4 if precision == "float32" else 2)
    return one * weights.count


def weight_bytes(shape: ModelShape, setting: TrainingSetting) -> int:
    """Bytes of the whole base: its matrices as stored, embedding and head in 16 or 32 bits, the rest in the compute dtype."""
    if setting.precision == "gguf":
        return shape.gguf_bytes
    wide = 4 if setting.precision == "float32" else 2
    small = 4 if setting.precision == "float32" or setting.compute_dtype == "float32" else 2
    matrices = sum(stored_bytes(w, setting.precision) for w in shape.weights)
    rest = shape.small_float32 * 4 + (shape.small - shape.small_float32) * small
    return matrices + (shape.embedding + shape.head) * wide + rest


def bytes_per_value(shape: ModelShape, setting: TrainingSetting) -> int:
    """Bytes of a trained value and of its gradient: those of the stored weight in full training, 4 in an adapter."""
    return 2 if setting.full and setting.precision == "bfloat16" else FLOAT32


def _copied(shape: ModelShape, setting: TrainingSetting, device: Device) -> int:
    """Bytes of the copy of an adapter's value in the compute dtype that a GPU keeps (`adapters/factor_copies.py`)."""
    if device != "cuda" or shape.mixture:
        return 0
    return 2 if setting.compute_dtype == "bfloat16" else FLOAT32


def optimizer_bytes(trained: int, setting: TrainingSetting) -> int:
    """AdamW's mean and mean square: 4 bytes each, or one each and a float32 scale for 256 (Dettmers et al. 2022)."""
    per_value = 1 + 4 / MOMENT_BLOCK if setting.optimizer == "adamw-8bit" else FLOAT32
    return int(2 * per_value * trained)


def chunk_rows(shape: ModelShape, load: Workload, device: Device) -> int:
    """Tokens whose logits exist at once: the trained ones in pieces of one size."""
    most = CHUNK_LOGITS if device != "cuda" else CHUNK_LOGITS_GPU if shape.plain_head else CHUNK_LOGITS_CAPPED
    pieces = math.ceil(load.target_tokens / max(CHUNK_ROWS, most // shape.vocabulary))
    return math.ceil(load.target_tokens / max(1, pieces))


def logit_bytes(
    shape: ModelShape,
    setting: TrainingSetting,
    adapter_shape: AdapterShape,
    load: Workload,
    device: Device,
    *,
    fused_dequant: bool = False,
    late: bool = False,
) -> int:
    """A chunk of logits; the body's states, those of the target tokens, and their gradients; what the head's matmuls take.

    Logits of a plain head become their own gradient in place (`training/loss.py`); through a soft cap or a scale autograd
    keeps them, their upcast copy and probabilities, and makes their gradient: four times. The head is upcast for its
    matmuls where it is stored in another dtype than they run in. Where it is trained its gradient is made a chunk at a
    time, in the compute dtype: of several the sum so far is there too, in float32. `late`: it is made at another moment.
    """
    c = 2 if setting.compute_dtype == "bfloat16" else 4
    rows = chunk_rows(shape, load, device)
    chunk = rows * shape.vocabulary * (c if shape.plain_head else c + 3 * FLOAT32)
    states = (load.tokens + 2 * load.target_tokens) * shape.width * c
    head = shape.vocabulary * shape.width
    stored = 4 if setting.precision == "float32" else 2
    wide = head * c if stored != c and not (device == "cpu" and fused_dequant) else 0
    if late or (not setting.full and adapter_shape.whole < head):
        return chunk + states + wide
    if load.target_tokens > rows:
        return chunk + states + head * FLOAT32 + max(wide, head * c)
    return chunk + states + max(wide, head * bytes_per_value(shape, setting))


def backward_bytes(shape: ModelShape, setting: TrainingSetting, adapter_shape: AdapterShape, load: Workload) -> int:
    """What a layer's backward pass has beyond what was saved, at its highest.

    The gradients of gate and up while that of their product is still there, and the gradient that travels past the layer.
    The product itself is gone by then, if it was saved, which it is for the gradient of the matrix behind it. DoRA: two
    products of its scale, for the gradients to what it multiplies. Dropout: the widest input's gradient, and what was kept of
    it; masks are made a few tokens at a time (`kernels/counter_rng.py`) or not at all (`kernels/triton`).
    """
    c = 2 if setting.compute_dtype == "bfloat16" else 4
    gates = (2 if shape.gated else 1) + (0 if _saves_product(shape, setting, adapter_shape) else 1)
    values = (gates + (2 if setting.dora else 0)) * _inner(shape) + shape.width
    if setting.dropout:
        widest = max((w.inner for w in shape.weights if adapter_shape.layers.get(w.key)), default=0)
        values = max(values, 2 * widest + shape.width)
    return values * c * load.tokens


def deterministic_bytes(shape: ModelShape, setting: TrainingSetting, load: Workload, device: Device) -> int:
    """What attention's backward pass on a GPU takes beyond the usual for the same bits in every repeat, in one layer.

    Flash attention keeps ceil(processors / (examples x heads)) float32 sums of the queries' gradients instead of one (Dao
    2023).
    """
    if not setting.deterministic or device != "cuda":
        return 0
    sums = math.ceil(PROCESSORS / max(1, load.examples * shape.heads))
    queries = max(
        (w.inner for w in shape.weights if w.part == "attention" and w.out == shape.width), default=shape.width
    )
    return (sums - 1) * load.tokens * queries * FLOAT32


def _inner(shape: ModelShape) -> int:
    """Values of a token inside a feed-forward part."""
    return shape.inner_width * (shape.experts_per_token if shape.mixture else 1)


def _product_bytes(shape: ModelShape, setting: TrainingSetting, load: Workload) -> int:
    """The gradient of the product of gate and up, and the one that it is made from, beside which a weight is upcast."""
    return (_inner(shape) + shape.width) * (2 if setting.compute_dtype == "bfloat16" else 4) * load.tokens


def _saves_product(shape: ModelShape, setting: TrainingSetting, adapter_shape: AdapterShape) -> bool:
    """Whether the product of gate and up is saved: for the gradient of the matrix behind it, or of its adapter."""
    last = [w for w in shape.weights if w.part in ("mlp", "experts") and w.out == shape.width]
    return setting.full or any(adapter_shape.layers.get(w.key) for w in last)


def upcast_bytes(shape: ModelShape, setting: TrainingSetting, device: Device, *, fused_dequant: bool = False) -> int:
    """One weight upcast to the compute dtype: whole on a GPU (`kernels/triton`) and where it is stored in 16 bits, a panel of
    a compressed one on a processor, and none where matmuls read weights as they are stored (`fused_dequant`:
    `native/gemm.c`)."""
    if setting.precision == setting.compute_dtype or (device == "cpu" and fused_dequant):
        return 0
    c = 2 if setting.compute_dtype == "bfloat16" else 4
    largest = max((w.out * w.inner for w in shape.weights), default=0) * c
    compressed = setting.precision in ("int8", "nf4", "gguf")
    return min(largest, PANEL) if device == "cpu" and compressed else largest


def saved_bytes(shape: ModelShape, setting: TrainingSetting, adapter_shape: AdapterShape) -> int:
    """Bytes on disk: an adapter in float32 (PEFT's layout), a model in the type that it was trained in."""
    if setting.full:
        return shape.parameters * bytes_per_value(shape, setting)
    return adapter_shape.values(shape) * FLOAT32


def runtime_bytes(shape: ModelShape, device: Device) -> int:
    """What is there beside a run's tensors on a processor: what libraries make, and the tokenizer."""
    return RUNTIME_BYTES + TOKENIZER_BYTES * shape.vocabulary if device == "cpu" else 0


def loading_bytes(shape: ModelShape, setting: TrainingSetting, device: Device, *, checkpoint_bytes: int = 2) -> int:
    """The higher of two moments: the tokenizer is read, before any weight; all weights are there, and the last of them are
    stored (`_on_the_way`) or the base is tried. `checkpoint_bytes` are those of a value in a model folder."""
    c = 2 if setting.compute_dtype == "bfloat16" else 4
    proof = PROOF_COPIES * PROOF_TOKENS * shape.vocabulary * c
    stored = weight_bytes(shape, setting) + runtime_bytes(shape, device)
    reading = RUNTIME_BYTES + TOKENIZER_READING_BYTES * shape.vocabulary if device == "cpu" else 0
    return max(reading, stored + max(_on_the_way(shape, setting, checkpoint_bytes), proof))


def _on_the_way(shape: ModelShape, setting: TrainingSetting, checkpoint_bytes: int) -> int:
    """Bytes of the largest tensor before it has its stored form; tensors are read one by one.

    From a model folder (`base/quantizer.py`): as it was read, and once more as it is stored. From a GGUF file
    (`base/gguf_loading.py`): its blocks, beside the dense form that stays; what is quantized anew is dense in float32 first.
    """
    if not shape.gguf_bytes:
        return shape.largest * (checkpoint_bytes + (4 if setting.precision == "float32" else 2))
    if setting.precision == "gguf":
        return 0  # they are what stays
    blocks = shape.gguf_bytes / shape.parameters  # bytes of a value
    wide = FLOAT32 if setting.precision in ("int8", "nf4") else 0
    linear = max(w.values // w.count for w in shape.weights)
    return int(max(blocks * shape.largest, (blocks + wide) * linear))


# ---- all of them together --------------------------------------------------------------------------------------------


def requirement(
    shape: ModelShape,
    setting: TrainingSetting,
    adapter_shape: AdapterShape,
    load: Workload,
    device: Device,
    *,
    fused: bool,
    fused_dequant: bool = False,
    beside: int = 0,
    answers: AnswerLoad | None = None,
) -> MemoryRequirement:
    """What training takes at its peak, in parts, and while loading. `fused`: see `activations.saved_activations`;
    `fused_dequant`: see `upcast_bytes`; `answers` are those that are generated between steps.

    `beside` are the values of other adapters that are trained on the same base, each token passing one of them all.
    """
    trained = (shape.parameters if setting.full else adapter_shape.values(shape)) + beside
    moments = _moments(shape, setting, adapter_shape, load, device, trained, fused, fused_dequant)
    if answers is not None:
        moments["answers"] = _answering(shape, setting, moments["update"], answers)
    at, parts = max(moments.items(), key=lambda m: m[1].total)
    states = optimizer_bytes(trained, setting)
    return MemoryRequirement(
        setting=setting,
        trained=trained,
        parts=parts,
        moment=at,
        moments=moments,
        loading=loading_bytes(shape, setting, device),
        host=(states if setting.offload_optimizer else 0) + offloaded_bytes(shape, setting, load),
        saved=saved_bytes(shape, setting, adapter_shape),
    )


def _moments(
    shape: ModelShape, setting: TrainingSetting, adapter_shape: AdapterShape, load: Workload, device: Device, trained: int,
    fused: bool, fused_dequant: bool,
) -> dict[str, MemoryParts]:  # fmt: skip
    """The parts at each moment of a step."""
    value = bytes_per_value(shape, setting)
    gradients = trained * value
    largest = shape.largest * value if setting.full else 0
    shares_keys = device == "cpu" and _own_attention(shape, setting)
    saved = saved_activations(shape, setting, adapter_shape, load, fused=fused, shares_keys=shares_keys)
    held = saved.outside + (saved.inputs if setting.activation_checkpointing else saved.layers)
    again = saved.layer if setting.activation_checkpointing else 0
    beside = max(backward_bytes(shape, setting, adapter_shape, load), deterministic_bytes(shape, setting, load, device))
    wide = upcast_bytes(shape, setting, device, fused_dequant=fused_dequant)
    alone = wide + (_product_bytes(shape, setting, load) if device == "cuda" else 0)
    logits = partial(logit_bytes, shape, setting, adapter_shape, load, device, fused_dequant=fused_dequant)
    # Made once more where it is tied, or looked up; but one tensor with the head's where rows are upcast (`embedding.py`).
    shared = device == "cpu" and not shape.head and setting.precision != setting.compute_dtype
    embedding = shape.embedding * value if setting.full and not shared else 0
    late = shared and setting.full and setting.optimizer_in_backward  # made when the layers have run back
    present = MemoryParts(
        weights=weight_bytes(shape, setting),
        adapters=0 if setting.full else trained * (FLOAT32 + _copied(shape, setting, device)),
        optimizer=0 if setting.offload_optimizer else optimizer_bytes(trained, setting),
        runtime=runtime_bytes(shape, device),
    )
    # Earlier micro-batches of the step have left their gradients; the optimizer inside the backward pass leaves none.
    before = gradients if load.micro_batches > 1 and not setting.optimizer_in_backward else 0
    after = largest if setting.optimizer_in_backward else gradients
    found = {
        "loss": replace(present, gradients=before, activations=held, logits=logits(late=late)),
        "backward": replace(
            present,
            gradients=before + (0 if late else _held_back(shape, setting, value, more=before > 0)),
            activations=held - saved.behind + again,
            workspace=max(beside, alone),
        ),
        "end": replace(
            present,
            gradients=0 if late else after,
            activations=saved.outside + saved.layer,
            workspace=max(beside, alone) if device == "cuda" else beside + wide + embedding,
            logits=logits() if late else 0,
        ),
        "update": replace(present, gradients=after),
    }
    if device == "cuda" and setting.full:
        states = optimizer_bytes(min(2 * HOST_SLAB, shape.largest), setting) if setting.offload_optimizer else 0
        found.update(full_ends(shape, setting, load, present, saved, value, max(beside, alone), states))
    if device == "cpu" and not _mmap_allocations(setting, load):
        head = shape.vocabulary * shape.width * value if setting.full else 0
        left = 0 if before or setting.optimizer_in_backward else gradients - (head if head >= HEAP_LIMIT else 0)
        found = {
            name: _with_holes(shape, setting, adapter_shape, load, parts, left if name in ("loss", "backward") else 0)
            for name, parts in found.items()
        }
    return found


def _answering(shape: ModelShape, setting: TrainingSetting, update: MemoryParts, answers: AnswerLoad) -> MemoryParts:
    """The parts while answers are generated: what an `update` leaves, without gradients, and what the engine takes."""
    c = 2 if setting.compute_dtype == "bfloat16" else 4
    return replace(
        update,
        gradients=0,
        kv_cache=kv_cache_bytes(shape, answers.cache_tokens, c),
        logits=answer_logit_bytes(shape, answers),
        workspace=answer_workspace_bytes(shape, c),
    )


def _held_back(shape: ModelShape, setting: TrainingSetting, value: int, *, more: bool) -> int:
    """Bytes of the head's own gradient while the layers run back. A tied one waits for the embedding's; another is used up
    where the optimizer is inside the backward pass, and where there are `more` micro-batches: added to what earlier
    ones left."""
    if not setting.full or (shape.head and (setting.optimizer_in_backward or more)):
        return 0
    return shape.vocabulary * shape.width * value


def _own_attention(shape: ModelShape, setting: TrainingSetting) -> bool:
    """Whether attention runs in C on a processor (`kernels/native/attention.py`): float32, heads of whole registers."""
    width = shape.attention_width // shape.heads
    return setting.compute_dtype != "bfloat16" and shape.packs and not shape.softcapped and width % 16 == 0


def _mmap_allocations(setting: TrainingSetting, load: Workload) -> bool:
    """Whether large tensors are mmap-backed on a processor: as `training/run.py` decides."""
    return setting.activation_checkpointing or setting.optimizer_in_backward or load.mmap_allocations


def _with_holes(
    shape: ModelShape, setting: TrainingSetting, adapter_shape: AdapterShape, load: Workload, parts: MemoryParts, gradients: int
) -> MemoryParts:  # fmt: skip
    """With what glibc's heap holds between the tensors of a forward pass, as long as these are small enough to live there.

    `gradients` are those of the step before, whose places between the optimizer's states the tensors have to fit into.
    """
    c = 2 if setting.compute_dtype == "bfloat16" else 4
    widths = (shape.width, shape.attention_width, shape.inner_width)
    small = sum(w for w in widths if w * c * load.tokens < HEAP_LIMIT) / sum(widths)
    holes = int(HEAP_HOLES * (small * (parts.activations + parts.workspace) + gradients))
    product = _inner(shape) * c * load.tokens
    if parts.activations and product < HEAP_LIMIT and not _saves_product(shape, setting, adapter_shape):
        holes += shape.layers * product
    return replace(parts, workspace=parts.workspace + holes)
