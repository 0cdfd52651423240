"""How a base decodes: with paged KV caches, with its class's own cache, or by running the whole text for every token.

    way = prove_decoding(base)      the first of the three whose logits equal those of the whole text, on the actual weights
    past = Past(base, way.cache)    one group of sequences of equal length
    hidden = past.step(ids)         (n, L) -> (n, L, width): the prompts first, then one token of each sequence
    past.keep([0, 2])               continue with these sequences

Recurrent and hybrid models cache states of convolutions and scans, some in a class of their own (MiniMax, DeepSeek V4, xLSTM).
The model creates its cache itself if it gets none, so the cache has the right class. Rows are removed by indexing every tensor
in the cache that has a row for each sequence: transformers' own `batch_select_indices` is missing or incomplete in several of
these classes.

Letters: n sequences, L new tokens of each, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from graftlm.base.attention import distance, original_attention, prove_stacks, short_windows, tolerance
from graftlm.base.context import ForwardContext
from graftlm.base.kv_cache import LayerKVSpec, check_kv_cache
from graftlm.base.loading import Base
from graftlm.segments import Segments

ARGUMENTS = ("cache", "past_key_values", "cache_params", "state")
"""The cache's argument and output names in transformers' models: the first since 5.24, before that the second; the third for
Mamba and xLSTM, the last for RWKV."""


@dataclass(frozen=True)
class Asking:
    """How a body takes its cache and returns it."""

    argument: str
    """The argument for the cache, and the output field with the updated cache."""
    positions: bool
    """Whether it gets the positions of the new tokens; MiniMax counts them in its first layer's cache, which may be empty."""


@dataclass(frozen=True)
class Decoding:
    """The verified way in which a base decodes, and why not a faster one."""

    layers: dict[int, LayerKVSpec]
    """Each layer's KV cache, if paged KV caches work; else empty."""
    why_not_blocks: str = ""
    cache: Asking | None = None
    """How the class's own cache is used; None if it is not."""
    why_not_cache: str = ""

    @property
    def paged(self) -> bool:
        return bool(self.layers)


class Past:
    """The model's own cache for one group of sequences of equal length."""

    def __init__(self, base: Base, asking: Asking) -> None:
        self._body, self._asking = base.structure.body, asking
        self._cache: Any = None
        self._rows = self._done = 0

    def step(self, ids: Tensor) -> Tensor:
        """ids (n, L) after the cached tokens -> hidden states (n, L, width). Raises TypeError if no cache is returned."""
        argument = self._asking.argument
        given: dict[str, Any] = {} if self._cache is None else {argument: self._cache}
        rows, length = ids.shape
        if self._asking.positions:
            positions = torch.arange(self._done, self._done + length, device=ids.device)
            given["position_ids"] = positions.expand(rows, length)
        output = self._body(input_ids=ids, use_cache=True, **given)
        self._cache = getattr(output, argument, None)
        if self._cache is None:
            raise TypeError(f"its body returns no '{argument}'")
        self._rows, self._done = rows, self._done + length
        return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these rows only."""
        if self._cache is not None:
            self._cache = _rows_of(self._cache, self._rows, list(rows), {})
        self._rows = len(rows)


def _rows_of(value: Any, count: int, rows: list[int], seen: dict[int, Any]) -> Any:
    """`value` with the given rows of every tensor that has `count` rows; containers and cache objects change in place."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) != count:
            return value
        if id(value) not in seen:  # DeepSeek's keys and values are one tensor
            seen[id(value)] = value, value[torch.tensor(rows, device=value.device)]
        return seen[id(value)][1]
    if isinstance(value, dict):
        for key, part in value.items():
            value[key] = _rows_of(part, count, rows, seen)
        return value
    if type(value) in (list, tuple):
        return type(value)(_rows_of(part, count, rows, seen) for part in value)
    if (
        hasattr(value, "__dict__")
        and not isinstance(value, (type, nn.Module, PreTrainedConfig))
        and id(value) not in seen
    ):
        seen[id(value)] = value, value
        for name, part in list(vars(value).items()):
            vars(value)[name] = _rows_of(part, count, rows, seen)
    return value


def prove_decoding(base: Base) -> Decoding:
    """The fastest way of decoding that gives the same logits as the whole text without a cache.

    Raises ModelError, with what failed, for a base that cannot decode at all.
    """
    layers, why_not_blocks = check_kv_cache(base)
    if layers:
        return Decoding(layers)
    cache, why_not_cache = may_cache(base)
    if cache is None and base.packs:  # otherwise this was checked when the base was loaded
        prove_stacks(base)
    return Decoding({}, why_not_blocks, cache, why_not_cache)


@torch.no_grad()
def may_cache(base: Base) -> tuple[Asking | None, str]:
    """How the class's own cache is used, if decoding with it gives the logits of the whole text; else None and the reason.

    Three texts are decoded together, from prompts longer and shorter than any convolution of a mixer; one of them ends early.
    """
    parameters = inspect.signature(base.structure.body.forward).parameters
    argument = next((name for name in ARGUMENTS if name in parameters), None)
    if argument is None or "use_cache" not in parameters:
        return None, "its body takes no cache"
    why = ""
    for positions in (True, False) if base.structure.takes_positions else (False,):
        asking = Asking(argument, positions)
        with original_attention(base), short_windows(base.model, 5):
            found = _cache_fault(base, asking)
        if not found:
            return asking, ""
        why = why or found
    return None, why


def _cache_fault(base: Base, asking: Asking) -> str:
    try:
        groups = [_Texts(base, asking, prompt) for prompt in (9, 2)]
        # Alternately: RecurrentGemma keeps states in its modules, where one group would overwrite another's.
        apart = max(group.step() for _ in range(_STEPS) for group in groups)
        if apart >= tolerance(exact=base.compute_dtype == "float32"):
            return f"its cache changes its logits (by {apart:.2g})"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own code may raise anything: its cache does not work here
        return f"its cache fails ({type(error).__name__}: {str(error).strip()[:120]})"
    return ""


_STEPS = 6


class _Texts:
    """Three texts that are decoded together: their prompts, two tokens, and three more after the second text has ended."""

    def __init__(self, base: Base, asking: Asking, prompt: int) -> None:
        generator = torch.Generator().manual_seed(prompt)
        ids = torch.randint(base.structure.vocabulary, (3, prompt + _STEPS - 1), generator=generator)
        self.base, self.prompt, self.ids = base, prompt, ids.to(base.device)
        self.whole = [_whole(base, text) for text in self.ids]  # (tokens, V) each
        self.kv_cache, self.going, self.done = Past(base, asking), [0, 1, 2], 0

    def step(self) -> float:
        """Decode one step; returns the largest relative distance between its logits and those of the whole texts."""
        if self.done == self.prompt + 2:
            self.going = [0, 2]
            self.kv_cache.keep(self.going)
        first, self.done = self.done, self.done + 1 if self.done else self.prompt
        with _stack(len(self.going), self.done - first):
            hidden = self.kv_cache.step(self.ids[self.going, first : self.done])  # (n, L, width)
        return max(
            distance(_logits(self.base, states), self.whole[at][first : self.done])
            for at, states in zip(self.going, hidden)
        )


def _stack(count: int, length: int) -> ForwardContext:
    return ForwardContext(Segments(lengths=(length,) * count, slots=(0,) * count, stacked=True))


def _whole(base: Base, text: Tensor) -> Tensor:
    """The logits of a text (tokens,) without a cache, (tokens, V)."""
    context = _stack(1, len(text))
    return base.logits(base.hidden(text, context), context)


def _logits(base: Base, hidden: Tensor) -> Tensor:
    return base.logits(hidden, _stack(1, len(hidden)))


__all__ = ["Asking", "Decoding", "Past", "may_cache", "prove_decoding"]
