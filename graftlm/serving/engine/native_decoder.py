"""All layers of a model in one call, where they are proven to be what that call computes.

    decoder, reason = native_decoder_of(base, store)
    states = decoder.hidden(ids, lengths, pasts, batch_slots, slots)     # None: this step needs the model's own code

A step of decoding is hundreds of short operations, and in Python each costs more than its work. Most models people serve are
of one family (Llama, Mistral, Qwen2 and 3, SmolLM, ...): norm, attention, norm, gated MLP. For those `kernels/native/layers.c`
goes through all layers at once, with every row's own adapter.

Nothing is taken from a model's name. Its layers are read by the names of their parts, which must be all there is in them;
norms and gated products must have been proven to be that (`base/fused.py`); scales and windows are those that its attention
asks for; angles come from its own module. Then both ways run the same texts over blocks of keys and values, and the states
must agree. What differs keeps its own code.

Letters: T tokens of a step, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftlm import kernels
from graftlm.adapters.bank import LayerBank, LowRank
from graftlm.base import fused
from graftlm.base.attention import UnsupportedAttention, short_windows
from graftlm.base.context import ForwardContext
from graftlm.base.kv_cache import AttentionSpec, LayerKVSpec, PagedAttention, PagedKVCache, attention_specs
from graftlm.base.loading import Base
from graftlm.base.modules import StoredLinear
from graftlm.segments import Segments

_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_LONG, _SEEN = 16, 1024  # segments longer than that which see more than that are answered faster by PyTorch's attention


SPLIT = "ranks share this model's weights, which are gathered layer by layer"


class _Other(Exception):
    """Why a model is none of the family."""


class NativeDecoder:
    """The layers of one base over one KV cache."""

    def __init__(
        self, base: Base, store: PagedKVCache, stack: kernels.DecoderStack, linears: Sequence[StoredLinear]
    ) -> None:
        self.base, self.store, self.stack, self.linears = base, store, stack, linears
        self._tables: dict[int, tuple[Any, Sequence[Any]] | None] = {}
        self._known = -1  # the state of all slots that `_tables` was made from

    def hidden(
        self,
        ids: Tensor,
        lengths: Sequence[int],
        pasts: Sequence[int],
        batch_slots: Sequence[int],
        slots: Sequence[int],
    ) -> Tensor | None:
        """ids (T,) of segments laid end to end -> their states behind the last norm (T, width), keys and values kept.

        Segment i is new tokens pasts[i] .. pasts[i] + lengths[i] of the sequence in batch slot batch_slots[i], under
        slot slots[i]. None where an adapter among them is no low-rank product, or a long text is better off with
        PyTorch's attention.
        """
        if any(n > _LONG and past + n > _SEEN for n, past in zip(lengths, pasts)):
            return None
        segments = Segments(lengths=tuple(lengths), slots=tuple(slots), cached=tuple(pasts))
        ranges: list[int] = []
        tables: list[Any] = []
        for slot, first, last in segments.slot_ranges:
            if slot:
                found = self._table(slot)
                if found is None:
                    return None
                ranges += (first, last)
                tables.append(found[0])
        with ForwardContext(segments):
            x = self.base.structure.embedding(ids).reshape(len(ids), self.stack.width).contiguous()
        rows = torch.tensor(batch_slots)
        if len(ids) > len(lengths):
            rows = rows.repeat_interleave(torch.tensor(lengths))  # (T,)
        most = max(past + n for past, n in zip(pasts, lengths))
        table = self.store.tables[rows, : -(-most // self.store.block)]  # (T, blocks)
        self.stack.run(x, segments.positions, table, ranges, tables)
        return x

    def _table(self, slot: int) -> tuple[Any, Sequence[Any]] | None:
        """What the adapter in a slot adds to each linear layer; None where it does something else as well."""
        now = self.base.adapter_changes
        if now != self._known:
            self._tables, self._known = {}, now
        if slot not in self._tables:
            self._tables[slot] = self._read(slot)
        return self._tables[slot]

    def _read(self, slot: int) -> tuple[Any, Sequence[Any]] | None:
        shares: list[kernels.Factors | None] = []
        for linear in self.linears:
            bank = linear.bank
            part = bank.adapters.get(slot) if isinstance(bank, LayerBank) else None
            if part is None:
                shares.append(None)
            elif (
                isinstance(part, LowRank)
                and part.magnitude is None
                and part.rank <= kernels.MOST_RANK
                and part.decode_ready
            ):
                shares.append(part.decode_factors)
            else:
                return None
        return kernels.adapter_table([None if share is None else share.at for share in shares]), shares  # kept alive


def native_decoder_of(base: Base, store: PagedKVCache, positions: int) -> tuple[NativeDecoder | None, str]:
    """The layers of a base over `store`, for texts of up to `positions` tokens; or None, and why its own code runs."""
    if base.structure.weights is not None:
        return None, SPLIT
    if base.compute_dtype != "float32" or not kernels.has_decoder_stack(base.device):
        return None, f"layers in one call are for float32 on a CPU; this is {base.compute_dtype} on {base.device}"
    try:
        with torch.no_grad():
            with short_windows(base.model, 5):
                distance = _distance(base, store.layers)
            if not distance <= 1e-4:
                return None, f"its states change by {distance:.2g} in one call"
            return _read(base, store, attention_specs(base), positions), ""
    except (_Other, UnsupportedAttention) as reason:
        return None, str(reason)


def _distance(base: Base, layers: dict[int, LayerKVSpec]) -> float:
    """How far the states of two texts are from those of the model's own code, grown in steps over blocks out of order."""
    own, ours = (
        PagedKVCache(layers, blocks=9, block=4, batch_slots=2, max_blocks=4, dtype=torch.float32, device=base.device)
        for _ in range(2)
    )
    for store in (own, ours):
        store.tables[0], store.tables[1] = torch.tensor([7, 2, 5, 0]), torch.tensor([1, 8, 3, 6])
    decoder = _read(base, ours, attention_specs(base), 16)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(base.structure.vocabulary, (n,), generator=generator) for n in (13, 11)]
    done, most = [0, 0], 0.0
    for step in ((6, 3), (1, 1), (3, 1), (1, 5), (2, 1)):
        ids = torch.cat([text[a : a + n] for text, a, n in zip(texts, done, step)])
        past = PagedAttention(own, step, done, (0, 1))
        segments = Segments(lengths=step, slots=(0, 0), cached=tuple(done), kv_cache=past)
        expected = base.hidden(ids, ForwardContext(segments))
        found = decoder.hidden(ids, step, done, (0, 1), (0, 0))
        assert found is not None
        most = max(most, float((found - expected).norm() / expected.norm().clamp_min(1e-30)))
        most = most if found.isfinite().all() else float("inf")
        done = [a + n for a, n in zip(done, step)]
    return most


# ---- reading a model ---------------------------------------------------------------------------------------------------


def _read(base: Base, store: PagedKVCache, attention: dict[int, AttentionSpec], positions: int) -> NativeDecoder:
    """The layers as C takes them. Raises _Other where a part is missing or there is one too many."""
    norms: set[tuple[float, float]] = set()
    gates: set[str] = set()
    sizes: set[tuple[Any, ...]] = set()
    heads = 0
    linears: list[StoredLinear] = []
    layers: list[kernels.DecoderLayer] = []
    for index, module in enumerate(base.structure.layers):
        parts = _parts(module, {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"})
        attn, mlp = parts["self_attn"], parts["mlp"]
        inside = _parts(attn, set(_ATTENTION.values()), {"q_norm", "k_norm"})
        gated = fused.gate_of(mlp)
        if gated is None or len(gated[0]) != 3:
            raise _Other(f"its {type(mlp).__name__} is not a gated product of three projections")
        gate, up, down = gated[0]
        gates.add(gated[1])
        names = {"gate": gate, "up": up, "down": down}
        kept = store.layers.get(index)
        if getattr(attn, "layer_idx", None) != index or kept is None or kept.width != kept.value_width:
            raise _Other(f"its layer {index} keeps keys and values of its own kind")
        of_layer = {name: _linear(inside[part]) for name, part in _ATTENTION.items()}
        of_layer |= {name: _linear(mlp.get_submodule(part)) for name, part in names.items()}
        linears += of_layer.values()
        heads = of_layer["q"].out_features // kept.width
        sizes.add((kept, *(linear.shape for linear in of_layer.values())))
        weights: dict[str, Tensor | None] = {
            "norm": _norm(parts["input_layernorm"], norms), "norm_again": _norm(parts["post_attention_layernorm"], norms),
            "query_norm": _norm(inside.get("q_norm"), norms), "key_norm": _norm(inside.get("k_norm"), norms),
        }  # fmt: skip
        if any(w is not None and len(w) != kept.width for w in (weights["query_norm"], weights["key_norm"])):
            raise _Other("its norms of queries and keys are not a head wide")
        how = attention[index]
        layers.append(
            kernels.DecoderLayer(
                **weights,  # type: ignore[arg-type]
                linears={name: (linear.value, linear.bias) for name, linear in of_layer.items()},
                keys=store.keys[index], values=store.values[index], scale=how.scale, softcap=how.softcap,
                window=how.window,
            )
        )  # fmt: skip
    body = base.structure.body
    last = _norm(getattr(body, "norm", None), norms)
    others = {
        name for name, stored in base.stored().items() if stored not in linears and stored is not base.structure.head
    }
    if not layers or last is None or others or any(len(kinds) != 1 for kinds in (norms, gates, sizes)):
        raise _Other(f"it has other parts than layers of one kind and a norm{': ' + min(others) if others else ''}")
    cosine, sine = _angles(body, len(last), positions)
    ((epsilon, offset),) = norms
    stack = kernels.DecoderStack(
        layers, heads=heads, block=store.block, epsilon=epsilon, offset=offset, gelu=gates == {"gelu_tanh"}, last_norm=last,
        cosine=cosine, sine=sine,
    )  # fmt: skip
    return NativeDecoder(base, store, stack, linears)


def _parts(module: nn.Module, wanted: set[str], allowed: set[str] = frozenset()) -> dict[str, nn.Module]:  # type: ignore[assignment]
    """A module's children, which must be the wanted ones, and beside them only allowed ones and such without weights."""
    children = dict(module.named_children())
    missing = wanted - children.keys()
    extra = {
        name for name, child in children.items()
        if name not in wanted | allowed and any(True for _ in child.parameters())
    }  # fmt: skip
    if missing or extra or any(True for _ in module.parameters(recurse=False)):
        what = f"no {min(missing)}" if missing else f"also {min(extra)}" if extra else "weights of its own"
        raise _Other(f"its {type(module).__name__} has {what}")
    return children


def _linear(module: nn.Module) -> StoredLinear:
    if not isinstance(module, StoredLinear):
        raise _Other(f"one of its projections is a {type(module).__name__}")
    weight = module.value
    if isinstance(weight, Tensor) and (
        weight.dtype not in (torch.float32, torch.bfloat16) or not weight.is_contiguous()
    ):
        raise _Other(f"one of its weights is {weight.dtype}, or turned")
    return module


def _norm(module: nn.Module | None, known: set[tuple[float, float]]) -> Tensor | None:
    if module is None:
        return None
    found = fused.norm_of(module)
    if found is None:
        raise _Other(f"its {type(module).__name__} was not proven to be x / rms(x) * w")
    known.add(found)
    return module.get_parameter("weight")


def _angles(body: nn.Module, width: int, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, (P, turned) each, from the model's own module."""
    rotary = getattr(body, "rotary_emb", None)
    if rotary is None:
        raise _Other("it has no rotary positions of one kind for all layers")
    try:
        cosine, sine = rotary(torch.zeros(1, 1, width), torch.arange(positions)[None])  # (1, P, turned) each
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise _Other(f"its rotary positions want to be asked otherwise ({type(error).__name__})") from None
    if cosine.ndim != 3 or cosine.shape != sine.shape or cosine.shape[2] % 2:
        raise _Other(f"its rotary positions come as {tuple(cosine.shape)}")
    return cosine[0], sine[0]
