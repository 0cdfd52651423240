"""Segments: the one description of a ragged batch.

Examples of different lengths are laid end to end in one row of tokens, never padded:

    tokens    [ a a a a | b b b b | c c ]        T = 10 tokens, 3 segments
    starts      0         4         8
    lengths     4         4         2            attention sees one segment; positions restart in each
    slots       1         1         2            which adapter of the bank each segment uses (0: the bare base)

Training packs examples into it, serving the prompts and next tokens of many requests; attention and the bank of adapters read
it from the context of the forward pass (`base/context.py`).

Segments are sorted by slot (one range of rows per adapter), and within a slot by length (one attention call per run of equal
lengths).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from graftlm.errors import ModelError
from graftlm.kernels.counter_rng import hash_words
from graftlm.kernels.transfer import to_device


class KVCache(Protocol):
    """The KV cache of the segments (`base.kv_cache` implements it)."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, window: int | None,
        softcap: float | None,
    ) -> torch.Tensor: ...  # fmt: skip


class RowsOnDevice(Protocol):
    """What the rows of a decoding step are, told on the device alone (`serving.engine.graph_decoder` implements it)."""

    @property
    def positions(self) -> torch.Tensor:
        """(T,) on the device."""
        ...

    def add_adapters(self, module: Any, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add to y (T, out), the output of a layer for x (T, in), the low-rank term of each row's own adapter."""
        ...


@dataclass(frozen=True, kw_only=True)
class Segments:
    """A packed batch; all tuples have one entry for each segment."""

    lengths: tuple[int, ...]
    """New tokens of each segment."""
    slots: tuple[int, ...]
    """The adapter slot of each segment; 0 is the base alone."""
    cached: tuple[int, ...] = ()
    """Number of each segment's tokens that are in the KV cache already; empty means none."""
    kv_cache: KVCache | None = None
    """The KV cache; None if no segment has cached tokens."""
    rng_keys: tuple[tuple[int, int], ...] = ()
    """(trial seed, draw) of each segment: the key of its random numbers; empty without dropout."""
    on_device: RowsOnDevice | None = None
    """Where the rows' positions and adapters are known; `slots` and `cached` then say nothing. None: here."""
    batched: bool = False
    """True if the input is (examples, length) with the model's own attention instead of (1, tokens) with ours."""

    def __post_init__(self) -> None:
        assert len(self.lengths) == len(self.slots)
        assert all(length > 0 for length in self.lengths)
        assert not self.batched or len(set(self.lengths)) == 1, (
            "a batch (examples, length) needs examples of equal length"
        )

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Index of each segment's first token."""
        starts: list[int] = []
        at = 0
        for length in self.lengths:
            starts.append(at)
            at += length
        return tuple(starts)

    @cached_property
    def tokens(self) -> int:
        """Number of tokens, T."""
        return sum(self.lengths)

    @cached_property
    def positions(self) -> torch.Tensor:
        """Position of each token within its own segment, (T,)."""
        if self.on_device is not None:
            return self.on_device.positions
        pasts = self.cached or (0,) * len(self.lengths)
        if max(self.lengths) == 1:
            return torch.tensor(pasts)
        return torch.cat([torch.arange(past, past + n) for past, n in zip(pasts, self.lengths)])

    @cached_property
    def equal_runs(self) -> tuple[tuple[int, int, int], ...]:
        """(first token, segments, length) of each run of neighbouring segments with the same length."""
        runs: list[tuple[int, int, int]] = []
        for start, length in zip(self.starts, self.lengths):
            if runs and runs[-1][2] == length:
                first, count, _ = runs[-1]
                runs[-1] = (first, count + 1, length)
            else:
                runs.append((start, 1, length))
        return tuple(runs)

    def of_rows(self, rows: int) -> Segments:
        """The same examples in a layer that gets `rows` rows for them: as many for each, one after another.

        Most layers get one row a token, and this is it. In a batched layout a layer may get others: a pooled state an example,
        or all of its past when it decodes. Raises ModelError where the rows cannot be shared out.
        """
        count = len(self.lengths)
        if rows == self.tokens:
            return self
        if not self.batched or not rows or rows % count:
            raise ModelError(
                f"a layer of this model gets {rows} rows in a micro-batch of {self.tokens} tokens and {count} examples, so an "
                "adapter on it cannot tell whose they are; leave it out with --targets, such as attention or mlp"
            )
        spread: dict[int, Segments] = self.__dict__.setdefault("_of_rows", {})
        if rows not in spread:
            spread[rows] = Segments(
                lengths=(rows // count,) * count, slots=self.slots, rng_keys=self.rng_keys, batched=True
            )
        return spread[rows]

    @cached_property
    def slot_ranges(self) -> tuple[tuple[int, int, int], ...]:
        """(slot, first token, past the last token) of each run of neighbouring segments with the same slot."""
        ranges: list[tuple[int, int, int]] = []
        for slot, start, length in zip(self.slots, self.starts, self.lengths):
            if ranges and ranges[-1][0] == slot:
                ranges[-1] = (slot, ranges[-1][1], start + length)
            else:
                ranges.append((slot, start, start + length))
        return tuple(ranges)

    @cached_property
    def token_keys(self) -> torch.Tensor:
        """A 32-bit key for each token from (trial seed, draw, position), (T,) int32: where dropout gets its numbers.

        It depends on nothing else, so splitting a batch otherwise, running a layer again, resuming, or training beside
        other trials gives every token the same random numbers.
        """
        assert self.rng_keys, "these segments carry no random rng_keys"
        heads = torch.tensor([hash_words(seed, draw) for seed, draw in self.rng_keys], dtype=torch.int64)
        per_token = torch.repeat_interleave(heads, torch.tensor(self.lengths))  # (T,)
        return (per_token + self.positions * 0x9E3779B1).to(torch.int32)  # wraps: a Weyl step a position

    def rows(self, slot: int) -> Iterator[tuple[int, int]]:
        """The token ranges that use `slot`."""
        return ((start, stop) for s, start, stop in self.slot_ranges if s == slot)

    def token_keys_on(self, device: torch.device) -> torch.Tensor:
        """`token_keys` on a device, copied there once."""
        return self._kept("keys", device, lambda: to_device([self.token_keys], device)[0])

    def ends_on(self, device: torch.device) -> torch.Tensor:
        """0 and the end of every segment, (segments + 1,) int32: what variable-length attention kernels want."""
        return self._kept(
            "ends", device, lambda: to_device([torch.tensor([*self.starts, self.tokens], dtype=torch.int32)], device)[0]
        )

    def _kept(self, name: str, device: torch.device, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        kept: dict[tuple[str, torch.device], torch.Tensor] = self.__dict__.setdefault("_on_devices", {})
        if (name, device) not in kept:
            kept[name, device] = make()
        return kept[name, device]


def pack(
    lengths: Sequence[int], slots: Sequence[int], micro_batch_tokens: int, *, equal_lengths: bool = False
) -> list[list[int]]:
    """Split examples into micro-batches of at most `micro_batch_tokens` tokens; a longer example gets a micro-batch of its own.

    Returns the examples' indices for each micro-batch, ordered by slot and then by length. With `equal_lengths` a
    micro-batch holds one length only, for models without packing. First fit over examples from the longest to the
    shortest, so the micro-batches are few and even.
    """
    assert micro_batch_tokens > 0
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    micro_batches: list[list[int]] = []
    used: list[int] = []
    for i in order:
        for p, tokens in enumerate(used):
            if tokens + lengths[i] <= micro_batch_tokens and (
                not equal_lengths or lengths[micro_batches[p][0]] == lengths[i]
            ):
                micro_batches[p].append(i)
                used[p] += lengths[i]
                break
        else:
            micro_batches.append([i])
            used.append(lengths[i])
    for group in micro_batches:
        group.sort(key=lambda i: (slots[i], lengths[i], i))
    return micro_batches
