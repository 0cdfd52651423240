"""Running sequences of any lengths in one packed pass, over keys and values in blocks.

A step takes work from the engine, a list of (sequence, new tokens): one token of each that is writing, a part of a prompt of
each that is still being read. They are laid out by slot and length, run once, and come back with the state behind the last
token of each.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences

import torch
from torch import Tensor

from graftlm.base.context import ForwardContext
from graftlm.base.kv_cache import LayerKVSpec, PagedAttention, PagedKVCache
from graftlm.base.loading import Base
from graftlm.segments import Segments
from graftlm.serving.engine.kv_cache import BlockPool, chain, root
from graftlm.serving.engine.native_decoder import native_decoder_of
from graftlm.serving.engine.sequence import Sequence

Work = list[tuple[Sequence, int]]


class PagedRunner:
    """The passes of a model that runs on our attention."""

    chunked_prefill = True

    def __init__(
        self, base: Base, layers: dict[int, LayerKVSpec], *, blocks: int, block: int, batch_slots: int
    ) -> None:
        self.base = base
        self.blocks = BlockPool(blocks, block)
        limit = base.structure.max_positions
        most = min(blocks, -(-limit // block)) if limit else blocks
        self.store = PagedKVCache(
            layers,
            blocks=blocks,
            block=block,
            batch_slots=batch_slots,
            max_blocks=most,
            dtype=base.activation_dtype,
            device=base.device,
        )
        self.most_tokens = min(limit or blocks * block, blocks * block)
        """Longest sequence that the memory and the model take."""
        self.decoder, self.why_own_code = native_decoder_of(base, self.store, min(self.most_tokens, most * block))
        self._batch_slots = list(range(batch_slots - 1, -1, -1))
        self.reused = 0
        """Tokens of prompts whose keys and values were kept, since the start."""

    @property
    def bytes(self) -> int:
        return self.store.bytes

    @property
    def occupied(self) -> float:
        """The share of the blocks that running sequences hold."""
        return self.blocks.used / self.blocks.count

    def admit(self, sequence: Sequence) -> bool:
        """Give a sequence a batch slot and the kept beginning of its tokens, if the rest of them will find blocks."""
        if not self._batch_slots:
            return False
        size = self.blocks.size
        reusable = (
            0 if sequence.request.embed else (len(sequence.tokens) - 1) // size
        )  # the last token is always computed
        self._name(sequence, reusable)
        found = self.blocks.find(sequence.names[:reusable])
        wanted = -(-(len(sequence.tokens) + 1) // size) - len(found)
        if wanted > self.blocks.available:
            self.blocks.leave(found)
            return False
        sequence.batch_slot = self._batch_slots.pop()
        sequence.computed = len(found) * size
        if sequence.written == 0:
            sequence.cached_prompt_tokens = sequence.computed
        self.reused += sequence.computed
        for block in found:
            self._hold(sequence, block)
        return True

    def reserve(self, sequence: Sequence, new: int) -> bool:
        """Hold blocks for `new` more tokens; False, holding no more than before, when there are not enough."""
        wanted = -(-(sequence.computed + new) // self.blocks.size) - len(sequence.blocks)
        if wanted > self.blocks.available:
            return False
        for _ in range(wanted):
            block = self.blocks.take()
            assert block is not None
            self._hold(sequence, block)
        return True

    def release(self, sequence: Sequence) -> None:
        """Give up everything a sequence holds; what it computed may be found again."""
        self.blocks.leave(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        sequence.states = None
        if sequence.batch_slot >= 0:
            self._batch_slots.append(sequence.batch_slot)
            sequence.batch_slot = -1

    def forget(self) -> None:
        """Forget what no running sequence holds."""
        self.blocks.forget()

    def _hold(self, sequence: Sequence, block: int) -> None:
        self.store.tables[sequence.batch_slot, len(sequence.blocks)] = block
        sequence.blocks.append(block)

    def _name(self, sequence: Sequence, count: int) -> None:
        size = self.blocks.size
        while len(sequence.names) < count:
            at = len(sequence.names)
            before = sequence.names[-1] if at else root(sequence.request.adapter)
            sequence.names.append(chain(before, sequence.tokens[at * size : (at + 1) * size]))

    def run(self, work: Work) -> tuple[list[Sequence], Tensor]:
        """One pass; returns the sequences in the order of their rows, and the state behind each one's last token (n, width)."""
        work.sort(key=lambda item: (item[0].slot, item[1], item[0].batch_slot))
        sequences = [sequence for sequence, _ in work]
        hidden = self._hidden(work)  # (T, width)
        ends: list[int] = []
        end = 0
        for sequence, n in work:
            start, end = end, end + n
            ends.append(end - 1)
            if sequence.request.embed:
                states = hidden[start : start + n].sum(0, dtype=torch.float32)
                sequence.states = states if sequence.states is None else sequence.states + states
            full = (sequence.computed + n) // self.blocks.size
            if full > sequence.computed // self.blocks.size:
                self._name(sequence, full)
                for at in range(sequence.computed // self.blocks.size, full):
                    self.blocks.name(sequence.blocks[at], sequence.names[at])
            sequence.computed += n
        if len(hidden) == len(work):
            return sequences, hidden
        return sequences, hidden[torch.tensor(ends, device=hidden.device)]

    def _hidden(self, work: Work) -> Tensor:
        """The states of all new tokens (T, width): by the decoder where it can, else by the model's own code."""
        lengths = tuple(n for _, n in work)
        pasts = tuple(s.computed for s, _ in work)
        batch_slots, slots = [s.batch_slot for s, _ in work], tuple(s.slot for s, _ in work)
        ids = torch.tensor([t for s, n in work for t in s.tokens[s.computed : s.computed + n]], device=self.base.device)
        if self.decoder is not None:
            hidden = self.decoder.hidden(ids, lengths, pasts, batch_slots, slots)
            if hidden is not None:
                return hidden
        kv_cache = PagedAttention(self.store, lengths, pasts, batch_slots)
        segments = Segments(lengths=lengths, slots=slots, cached=pasts, kv_cache=kv_cache)
        return self.base.hidden(ids, ForwardContext(segments))


def logits(base: Base, states: Tensor, slots: Sequences[int]) -> Tensor:
    """From states (n, width), each under its slot, to logits (n, V)."""
    context = ForwardContext(Segments(lengths=(1,) * len(states), slots=tuple(slots)))
    if not base.structure.plain_head:
        return base.logits(states, context)
    with context:
        return base.structure.head(states)
