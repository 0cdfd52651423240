"""Attention over segments, and the checks that decide whether a model may use it.

Queries, keys and values of a micro-batch are one row of tokens. On a CPU each run of equally long segments is one call of
PyTorch's fused attention, on a GPU all segments are one call of its variable-length kernel. No token attends to another example
and nothing is padded. transformers gives (1, heads, T, head width) and expects (1, T, heads, head width).

A model uses it only after three checks on its actual weights (`may_pack`): the logits equal those of its own attention on one
example, no token attends to a later one, no example attends to another. Some models ignore a registered attention, some mix
tokens elsewhere (convolutions, state spaces), some use position biases of their own. They fail a check and keep their own
attention on batches of equally long examples, which need no padding either.

Letters: T tokens, n segments of a run, L their length, H heads, K key-value heads, D head width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graftlm import kernels
from graftlm.base import context
from graftlm.base.context import ForwardContext
from graftlm.base.transformers_log import quiet
from graftlm.errors import ModelError
from graftlm.segments import Segments

if TYPE_CHECKING:
    from graftlm.base.loading import Base

ATTENTION = "graft_segments"  # its name in transformers' registry

# Keywords that do not change the result here: mask and cache are ours, and positions are already in q and k.
_IGNORED = {
    "attention_mask", "cache", "cache_position", "is_causal", "layer_idx", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings", "position_ids",
    "return_dict", "use_cache", "logits_to_keep", "deterministic",
}  # fmt: skip


class UnsupportedAttention(Exception):
    """A model needs attention that ours does not support; it then keeps its own."""


def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each current segment: q (1, H, T, D), k and v (1, K, T, D) -> (1, T, H, D).

    Raises UnsupportedAttention for every unknown keyword that is not None, since it may change the result.
    """
    segments = context.current().segments
    if segments.batched:
        raise UnsupportedAttention("packed segments; this micro-batch is (examples, length)")
    unknown = [name for name, given in others.items() if given is not None and name not in _IGNORED]
    if unknown:
        raise UnsupportedAttention(f"attention keyword '{unknown[0]}'")
    if dropout:
        raise UnsupportedAttention("attention dropout")
    if query.shape[2] != segments.tokens or key.shape[2] != segments.tokens:
        raise UnsupportedAttention(f"{query.shape[2]} queries for {segments.tokens} tokens")
    groups = query.shape[1] // key.shape[1]
    # The batch dimension is 1; indexing it would pad the gradient with zeros.
    q, k, v = (t.transpose(1, 2).squeeze(0) for t in (query, key, value))  # (T, H or K, D)
    if segments.kv_cache is not None:
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise UnsupportedAttention("a number for each layer (layer_idx)")
        return segments.kv_cache.attend(layer, q, k, v, scaling, sliding_window, softcap).unsqueeze(0), None
    if softcap is None and _has_varlen(q):
        return _varlen(q, k, v, segments, groups, scaling, sliding_window).unsqueeze(0), None
    if softcap is None and kernels.has_segment_attention(q):
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        out = _SegmentAttention.apply(q, k, v, (*segments.starts, segments.tokens), scale, sliding_window or 0)
        assert isinstance(out, Tensor)
        return out.unsqueeze(0), None
    runs = segments.equal_runs
    sizes = [count * length for _, count, length in runs]
    out: list[Tensor] = []
    # One split, whose backward is one concatenation; slices would allocate a full row of zeros for every run.
    for (_, count, length), *parts in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes)):
        run = [t.unflatten(0, (count, length)).transpose(1, 2) for t in parts]  # (n, heads, L, D)
        y = causal(run[0], run[1], run[2], groups, scaling, sliding_window, softcap)  # (n, H, L, D)
        out.append(y.transpose(1, 2).flatten(0, 1))  # (n L, H, D)
    joined = out[0] if len(out) == 1 else torch.cat(out)
    return joined.unsqueeze(0), None  # (1, T, H, D)


class _SegmentAttention(torch.autograd.Function):
    """All segments in one call of our own kernel: q (T, H, D), k and v (T, K, D) -> (T, H, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: tuple[int, ...], scale: float, window: int) -> Tensor:
        out, sums = kernels.attention(q, k, v, ends, scale, window)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.rest = ends, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return *kernels.attention_backward(grads[0], *ctx.saved_tensors, *ctx.rest), None, None, None


@cache
def _varlen_call() -> tuple[Any, frozenset[str]]:
    """PyTorch's variable-length attention, and the names of its parameters; (None, none) without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, frozenset()
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def _has_varlen(q: Tensor) -> bool:
    """Whether one kernel takes all segments at once: 16-bit types on a GPU since Ampere, heads up to 256 wide."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] > 256 or q.shape[-1] % 8:
        return False
    return _varlen_call()[0] is not None and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, groups: int, scaling: float | None, window: int | None
) -> Tensor:
    """All segments in one call: q (T, H, D), k and v (T, K, D) -> (T, H, D)."""
    call, parameters = _varlen_call()
    shared = {"enable_gqa": True} if groups > 1 and "enable_gqa" in parameters else {}
    if groups > 1 and not shared:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (T, H, D)
    ends = segments.ends_on(q.device)  # (segments + 1,)
    longest = max(segments.lengths)
    windowed = window is not None and window < longest
    if "window_size" not in parameters:
        if windowed:
            raise UnsupportedAttention(f"a window of {window} with this version of PyTorch")
        return call(q, k, v, ends, ends, longest, longest, is_causal=True, scale=scaling, **shared)
    left = window - 1 if windowed and window is not None else -1
    return call(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(left, 0), **shared)


def causal(
    q: Tensor, k: Tensor, v: Tensor, groups: int, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """q (n, H, L, D), k and v (n, K, M, D) with H = K groups and M >= L -> (n, H, L, D); queries are the last L of M."""
    on_gpu = kernels.causal_attention(q, k, v, scaling, window, softcap)
    if on_gpu is not None:
        return on_gpu
    length, total = q.shape[2], k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (n, H, M, D)
    if window is not None and window >= total:
        window = None
    if window is None and softcap is None and length in (1, total):
        return F.scaled_dot_product_attention(q, k, v, scale=scaling, is_causal=length > 1)
    at = torch.arange(total, device=q.device)
    queries_at = at[total - length :]
    allowed = queries_at[:, None] >= at[None, :]  # (L, M)
    if window is not None:
        allowed &= queries_at[:, None] - at[None, :] < window
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scaling)
    scores = q @ k.transpose(-1, -2) * (scaling if scaling is not None else q.shape[-1] ** -0.5)  # (n, H, L, L)
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


# ---- switching a model -----------------------------------------------------------------------------------------------


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, segment_attention)


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Set the attention of a model and of every part of it."""
    with quiet():
        model.set_attn_implementation(implementation)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_attn_implementation", None) not in (None, implementation):
            config._attn_implementation = implementation


@contextmanager
def short_windows(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Shorten every attention window and chunk to `length` tokens within the block, so that short examples exceed it.

    This detects a model that applies its window only through the mask, which our attention does not read.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    changed: list[tuple[Any, str, int]] = []
    for owner in (*configs.values(), *model.modules()):
        for name in ("sliding_window", "attention_chunk_size"):
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > length:
                changed.append((owner, name, value))
                setattr(owner, name, length)
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def position_dependent_rotary(config: Any) -> str | None:
    """The rotary type whose frequencies depend on the longest position in the batch, or None."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [parameters] if "rope_type" in parameters or "type" in parameters else list(parameters.values())
    for kind in kinds:
        if isinstance(kind, dict):
            name = kind.get("rope_type", kind.get("type"))
            if name in ("longrope", "dynamic"):
                return str(name)
    return None


# ---- checks -----------------------------------------------------------------------------------------------------------


def may_pack(
    own: Callable[[Tensor], Tensor],
    packed: Callable[[Tensor, Segments], Tensor],
    vocabulary: int,
    *,
    exact: bool = True,
) -> tuple[bool, str]:
    """Run the three checks; returns whether the model may use our attention, and the reason if not.

    `own(ids (1, L))` gives the original model's logits (L, vocabulary) for one example, `packed(ids (1, T), segments)` those
    with our attention, (T, vocabulary). Logits count as equal if their relative distance is below 1e-3 with float32 matmuls
    (`exact`), and below 0.15 in 16 bits.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, 24), generator=generator)
    first, second = ids[:, :13], ids[:, 13:]
    two = Segments(lengths=(13, 11), slots=(0, 0))
    try:
        expected = torch.cat([own(first), own(second)])  # (24, vocabulary)
        found = packed(ids, two)

        def differ(a: Tensor, b: Tensor) -> bool:
            return distance(a, b) >= tolerance(exact=exact)

        if found.shape != expected.shape or differ(found[:13], expected[:13]):
            return False, "its logits change under packed attention"
        if differ(found[13:], expected[13:]):
            return False, "a packed example attends to its neighbour"
        later = ids.clone()
        later[0, 12] = (later[0, 12] + 1) % vocabulary
        if differ(packed(later, two)[:12], expected[:12]):
            return False, "a token attends to a later one"
        other = ids.clone()
        other[0, :13] = (other[0, :13] + 7) % vocabulary
        if differ(packed(other, two)[13:], expected[13:]):
            return False, "a packed example attends to its neighbour"
    except torch.OutOfMemoryError:
        raise
    except UnsupportedAttention as error:
        return False, f"it needs {error}"
    except (KeyError, TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
        return False, f"packed attention fails in it ({type(error).__name__}: {str(error)[:80]})"
    return True, ""


def may_stack(own: Callable[[Tensor], Tensor], vocabulary: int, *, exact: bool = True) -> str:
    """Check a model on batches of equally long examples with its own attention; returns the reason if it fails, or "".

    `own(ids (n, L))` gives logits (n, L, vocabulary). An example must get the same logits as alone, and no token may attend
    to a later one: a bidirectional model (BERT without `is_decoder`) has no next-token loss and cannot decode.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 13), generator=generator)
    try:
        expected = own(ids)  # (2, 13, vocabulary)
        for i in range(2):
            if distance(own(ids[i : i + 1])[0], expected[i]) >= tolerance(exact=exact):
                return "an example's logits depend on the others in its batch"
        later = ids.clone()
        later[:, 8:] = (later[:, 8:] + 7) % vocabulary
        if distance(own(later)[:, :8], expected[:, :8]) >= tolerance(exact=exact):
            return "a token attends to later ones"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the model's own code raises
        return f"it fails on two examples of equal length ({type(error).__name__}: {str(error).strip()[:120]})"
    return ""


def distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; infinite if that is not finite, or the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    a, b = found.float(), expected.float()
    relative = (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-30)).item()
    return relative if relative == relative else math.inf


def tolerance(*, exact: bool) -> float:
    """The distance above which logits count as different, with matmuls in float32 (`exact`) or in 16 bits.

    Rounding errors grow with depth (measured: 0.03 over 16 layers in bfloat16), attention to wrong tokens gives about 1.
    """
    return 1e-3 if exact else 0.15


@torch.no_grad()
def choose_attention(base: Base) -> None:
    """Use our attention if the three checks pass on these weights; else keep the model's own, with the reason.

    Raises ModelError for a model whose own attention fails its check too.
    """
    own = base.original_attention = base.model.config._attn_implementation
    base.packs, base.no_packing_reason = _may_pack(base, own)
    set_attention(base.model, ATTENTION if base.packs else own)
    if not base.packs:
        prove_stacks(base)


def _may_pack(base: Base, own: str) -> tuple[bool, str]:
    rotary = position_dependent_rotary(base.model.config)
    if rotary is not None:
        return False, f"its rotary frequencies ({rotary}) depend on the longest position in a batch"
    if not base.structure.takes_positions:
        return False, "it takes no position ids"

    def alone(ids: Tensor) -> Tensor:
        set_attention(base.model, own)
        return _stack_logits(base, ids)[0]

    def packed(ids: Tensor, segments: Segments) -> Tensor:
        set_attention(base.model, ATTENTION)
        forward_context = ForwardContext(segments)
        return base.logits(base.hidden(ids[0].to(base.device), forward_context), forward_context)

    with short_windows(base.model, 5):
        return may_pack(alone, packed, base.structure.vocabulary, exact=base.compute_dtype != "bfloat16")


@torch.no_grad()
def prove_stacks(base: Base) -> None:
    """Raise ModelError unless an example in a batch gets the same logits as alone, with the base's own attention.

    Such a base can be trained, and it can decode at least by running the whole text for every token.
    """
    with original_attention(base):
        why = may_stack(
            lambda ids: _stack_logits(base, ids), base.structure.vocabulary, exact=base.compute_dtype != "bfloat16"
        )
    if why:
        reads = getattr(base.model.config, "is_decoder", None) is False
        raise ModelError(
            f"{type(base.model).__name__} can neither be trained nor generated with: {why}. "
            + ("Its config.json has is_decoder false; a causal language model has true. " if reads else "")
            + "Graft needs models that predict each token from those before it"
        )


@contextmanager
def original_attention(base: Base) -> Iterator[None]:
    """Use the base's own attention within the block."""
    before = base.model.config._attn_implementation
    set_attention(base.model, base.original_attention)
    try:
        yield
    finally:
        set_attention(base.model, before)


def _stack_logits(base: Base, ids: Tensor) -> Tensor:
    """The logits (n, L, vocabulary) of examples (n, L), with the current attention."""
    forward_context = ForwardContext(Segments(lengths=(ids.shape[1],) * len(ids), slots=(0,) * len(ids), batched=True))
    return base.logits(base.hidden(ids.reshape(-1).to(base.device), forward_context), forward_context).view(
        *ids.shape, -1
    )
