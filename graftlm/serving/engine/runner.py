"""The two ways to run a step's work through the base: packed over a paged KV cache, or in batches of equally long sequences.

    work             [(sequence, new tokens), ...] from the scheduler: one token of each sequence in decode, a part of the
                     prompt of each in prefill
    execute_model    -> the sequences in the order of their rows, and the hidden state of each one's last token (n, width)

`PagedRunner` is for models that run on our attention: sequences of any lengths in one packed forward pass, laid out by slot
and length. `StackedRunner` is for the others. Their class's own cache (`base/caches.py`) has one length for all of its rows, so
sequences that begin with equally many tokens form a group, prefill together and decode together; one that ends leaves the
group. A model whose cache was not proven to change nothing computes the whole text again for every token.

Letters: n sequences, T tokens of a step, L tokens of each sequence of a stack, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Sequences

import torch
from torch import Tensor

from graftlm.base.attention import set_attention
from graftlm.base.caches import Asking, Past
from graftlm.base.context import ForwardContext
from graftlm.base.kv_cache import LayerKVSpec, PagedAttention, PagedKVCache
from graftlm.base.loading import Base
from graftlm.kernels import to_device
from graftlm.segments import Segments
from graftlm.serving.engine.graph_decoder import GraphDecoder, graph_decoder_of
from graftlm.serving.engine.kv_cache import BlockPool, hash_block, hash_root
from graftlm.serving.engine.native_decoder import NativeDecoder, native_decoder_of
from graftlm.serving.engine.sampling import logprobs_of
from graftlm.serving.engine.sequence import Sequence

_PROMPT_ROWS = 64
"""Tokens of a prompt whose logits are in memory at once."""
Work = list[tuple[Sequence, int]]


class PagedRunner:
    """Runs a model on our attention, over a paged KV cache."""

    chunked_prefill = True

    def __init__(
        self, base: Base, layers: dict[int, LayerKVSpec], *, blocks: int, block: int, batch_slots: int
    ) -> None:
        self.base = base
        self.blocks = BlockPool(blocks, block)
        limit = base.structure.max_positions
        max_blocks = min(blocks, -(-limit // block)) if limit else blocks
        self.kv_cache = PagedKVCache(
            layers, blocks=blocks, block=block, batch_slots=batch_slots, max_blocks=max_blocks,
            dtype=base.activation_dtype, device=base.device, spare=base.device.type == "cuda",
        )  # fmt: skip
        self.max_model_len = min(limit or blocks * block, blocks * block)
        """Tokens of the longest sequence that the memory and the model take."""
        positions = min(self.max_model_len, max_blocks * block)
        self.decoder: NativeDecoder | GraphDecoder | None
        if base.device.type == "cuda":
            self.decoder, self.why_no_decoder = graph_decoder_of(base, self.kv_cache, batch_slots)
        else:
            self.decoder, self.why_no_decoder = native_decoder_of(base, self.kv_cache, positions)
        self._batch_slots = list(range(batch_slots - 1, -1, -1))

    @property
    def bytes(self) -> int:
        return self.kv_cache.bytes

    @property
    def kv_cache_usage(self) -> float:
        """The share of the blocks that running sequences hold."""
        return self.blocks.used / self.blocks.count

    def warm_up(self) -> None:
        """What the first requests would wait for."""
        if isinstance(self.decoder, GraphDecoder):
            self.decoder.capture_all()

    def admit(self, sequence: Sequence) -> bool:
        """Give a sequence a batch slot and the cached beginning of its tokens, if there are blocks for the rest."""
        if not self._batch_slots:
            return False
        size = self.blocks.size
        # The last token is always computed, and all of them where something of each is wanted.
        wanted = sequence.request.embed or sequence.prompt_logprobs is not None
        reusable = 0 if wanted else (len(sequence.tokens) - 1) // size
        self._hash_blocks(sequence, reusable)
        cached = self.blocks.find_cached_prefix(sequence.block_hashes[:reusable])
        new = min(sequence.request.max_tokens, 1)
        needed = -(-(len(sequence.tokens) + new) // size) - len(cached)
        if needed > self.blocks.available:
            self.blocks.free(cached)
            return False
        sequence.batch_slot = self._batch_slots.pop()
        sequence.num_computed = len(cached) * size
        if sequence.num_generated == 0:
            sequence.cached_prompt_tokens = sequence.num_computed
        for block in cached:
            self._add_block(sequence, block)
        return True

    def reserve(self, sequence: Sequence, new: int) -> bool:
        """Allocate blocks for `new` more tokens; False, and nothing is allocated, when there are not enough."""
        needed = -(-(sequence.num_computed + new) // self.blocks.size) - len(sequence.blocks)
        if needed > self.blocks.available:
            return False
        for _ in range(needed):
            block = self.blocks.allocate()
            assert block is not None
            self._add_block(sequence, block)
        return True

    def release(self, sequence: Sequence) -> None:
        """Give up everything a sequence holds; its full blocks stay in the prefix cache."""
        self.blocks.free(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
        sequence.hidden_sum = None
        if sequence.batch_slot >= 0:
            self._batch_slots.append(sequence.batch_slot)
            sequence.batch_slot = -1

    def reset_prefix_cache(self) -> None:
        """Evict what no running sequence holds."""
        self.blocks.reset_prefix_cache()

    def _add_block(self, sequence: Sequence, block: int) -> None:
        self.kv_cache.tables[sequence.batch_slot, len(sequence.blocks)] = block
        sequence.blocks.append(block)

    def _hash_blocks(self, sequence: Sequence, count: int) -> None:
        size = self.blocks.size
        while len(sequence.block_hashes) < count:
            at = len(sequence.block_hashes)
            before = sequence.block_hashes[-1] if at else hash_root(sequence.request.adapter)
            sequence.block_hashes.append(hash_block(before, sequence.tokens[at * size : (at + 1) * size]))

    def execute_model(self, work: Work) -> tuple[list[Sequence], Tensor]:
        """One forward pass; returns the sequences in the order of their rows, and each one's last state (n, width)."""
        work.sort(key=lambda item: (item[0].adapter_slot, item[1], item[0].batch_slot))
        sequences = [sequence for sequence, _ in work]
        hidden = self._hidden(work)  # (T, width)
        ends: list[int] = []
        end = 0
        for sequence, n in work:
            start, end = end, end + n
            ends.append(end - 1)
            report_prompt(self.base, sequence, hidden[start:end], sequence.num_computed)
            if sequence.request.embed:
                total = hidden[start : start + n].sum(0, dtype=torch.float32)  # (width,)
                sequence.hidden_sum = total if sequence.hidden_sum is None else sequence.hidden_sum + total
            full = (sequence.num_computed + n) // self.blocks.size
            if full > sequence.num_computed // self.blocks.size:
                self._hash_blocks(sequence, full)
                for at in range(sequence.num_computed // self.blocks.size, full):
                    self.blocks.register(sequence.blocks[at], sequence.block_hashes[at])
            sequence.num_computed += n
        if len(hidden) == len(work):
            return sequences, hidden
        return sequences, hidden[to_device([torch.tensor(ends)], hidden.device)[0]]

    def _hidden(self, work: Work) -> Tensor:
        """The states of all new tokens (T, width): by the decoder where it can, else by the model's own code."""
        lengths = tuple(n for _, n in work)
        computed = tuple(s.num_computed for s, _ in work)
        batch_slots, slots = [s.batch_slot for s, _ in work], tuple(s.adapter_slot for s, _ in work)
        new = [t for s, n in work for t in s.tokens[s.num_computed : s.num_computed + n]]
        ids = torch.tensor(new)  # (T,)
        if self.decoder is not None:
            hidden = self.decoder.hidden(ids, lengths, computed, batch_slots, slots)
            if hidden is not None:
                return hidden
        attention = PagedAttention(self.kv_cache, lengths, computed, batch_slots)
        segments = Segments(lengths=lengths, slots=slots, cached=computed, kv_cache=attention)
        return self.base.hidden(to_device([ids], self.base.device)[0], ForwardContext(segments))


class _Group:
    """Sequences of one length, and their cache."""

    def __init__(self, sequences: list[Sequence], cache: Past | None) -> None:
        self.sequences, self.cache = sequences, cache

    def remove(self, sequence: Sequence) -> None:
        """Take one sequence's rows out of the stack."""
        at = self.sequences.index(sequence)
        del self.sequences[at]
        if self.cache is not None and self.sequences:
            self.cache.keep([i for i in range(len(self.sequences) + 1) if i != at])


class StackedRunner:
    """Runs a model on batches of equally long sequences, with its own attention and its own cache."""

    chunked_prefill = False

    def __init__(self, base: Base, *, cache: Asking | None, tokens: int, batch_slots: int) -> None:
        """`cache` says how the class's own cache is used, None where it is not (`prove_decoding`)."""
        self.base, self.cache, self.tokens, self.batch_slots = base, cache, tokens, batch_slots
        self.max_model_len = min(base.structure.max_positions or tokens, tokens)
        self._reserved = 0  # tokens that the running sequences may grow to
        self._running = 0
        self._group_of: dict[Sequence, _Group] = {}
        if base.packs:  # it packs, but a paged KV cache changes its logits
            set_attention(base.model, base.original_attention)

    @property
    def bytes(self) -> int:
        return 0

    @property
    def kv_cache_usage(self) -> float:
        """The share of the tokens that running sequences may grow to."""
        return self._reserved / self.tokens

    def warm_up(self) -> None:
        """Nothing is made before it is needed."""

    def admit(self, sequence: Sequence) -> bool:
        """Count a sequence in, at its longest, if it still fits."""
        if self._running >= self.batch_slots or self._reserved + sequence.max_total_tokens > self.tokens:
            return False
        self._reserved += sequence.max_total_tokens
        self._running += 1
        sequence.batch_slot = 0
        return True

    def reserve(self, sequence: Sequence, new: int) -> bool:
        return True

    def release(self, sequence: Sequence) -> None:
        """Take a sequence out of its group."""
        group = self._group_of.pop(sequence, None)
        if group is not None:
            group.remove(sequence)
        sequence.num_computed = 0
        sequence.hidden_sum = None
        if sequence.batch_slot >= 0:
            self._reserved -= sequence.max_total_tokens
            self._running -= 1
            sequence.batch_slot = -1

    def reset_prefix_cache(self) -> None:
        """Nothing is kept beyond a sequence's life."""

    def execute_model(self, work: Work) -> tuple[list[Sequence], Tensor]:
        """One forward pass for each group; returns the sequences by slot, and each one's last state (n, width)."""
        fresh: dict[tuple[int, bool], list[Sequence]] = defaultdict(list)
        groups: dict[int, _Group] = {}
        for sequence, _ in work:
            if sequence in self._group_of:
                group = self._group_of[sequence]
                groups[id(group)] = group
            else:
                fresh[len(sequence.tokens), sequence.request.embed].append(sequence)
        for members in fresh.values():
            members.sort(key=lambda s: s.adapter_slot)
            group = _Group(members, Past(self.base, self.cache) if self.cache is not None else None)
            groups[id(group)] = group
            self._group_of.update((s, group) for s in members)
        done: list[tuple[Sequence, Tensor]] = []
        for group in groups.values():
            done += zip(list(group.sequences), self._run_group(group))
        done.sort(key=lambda pair: pair[0].adapter_slot)
        return [s for s, _ in done], torch.stack([state for _, state in done])

    def _run_group(self, group: _Group) -> Tensor:
        """One forward pass of a group; returns the states of its sequences' last tokens (n, width)."""
        computed = group.sequences[0].num_computed if group.cache is not None else 0
        length = len(group.sequences[0].tokens) - computed
        ids = torch.tensor([s.tokens[computed:] for s in group.sequences], device=self.base.device)  # (n, L)
        slots = tuple(s.adapter_slot for s in group.sequences)
        context = ForwardContext(Segments(lengths=(length,) * len(slots), slots=slots, batched=True))
        if group.cache is not None:
            with context, self.base.alone():
                hidden = group.cache.step(ids)  # (n, L, width)
        else:
            hidden = self.base.hidden(ids.reshape(-1), context).view(*ids.shape, -1)
        for sequence, states in zip(group.sequences, hidden):
            report_prompt(self.base, sequence, states, computed)
            if sequence.request.embed:
                sequence.hidden_sum = states.sum(0, dtype=torch.float32)
            sequence.num_computed = len(sequence.tokens)
        return hidden[:, -1]


ModelRunner = PagedRunner | StackedRunner


def report_prompt(base: Base, sequence: Sequence, states: Tensor, first: int) -> None:
    """Keep the log probabilities that a request wants of its prompt, from the states (n, width) of tokens from `first` on.

    The state of a token tells of the next one. What was told before the sequence was preempted is not told again.
    """
    told, count = sequence.prompt_logprobs, sequence.request.prompt_logprobs
    if told is None or count is None:
        return
    end = min(first + len(states), sequence.prompt_length - 1)
    for at in range(max(first, len(told)), end, _PROMPT_ROWS):
        until = min(at + _PROMPT_ROWS, end)
        rows = logits(base, states[at - first : until - first], [sequence.adapter_slot] * (until - at))  # (n, V)
        told += logprobs_of(rows, sequence.tokens[at + 1 : until + 1], [count] * len(rows))


def logits(base: Base, states: Tensor, slots: Sequences[int]) -> Tensor:
    """From states (n, width), each under its slot, to logits (n, V)."""
    context = ForwardContext(Segments(lengths=(1,) * len(states), slots=tuple(slots)))
    if not base.structure.head_is_plain_matmul:
        return base.logits(states, context)
    with base.structure.with_head(), context:
        return base.structure.head(states)
