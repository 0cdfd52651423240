"""Running models that cannot use our attention: sequences of equal length in lockstep, each group one stack.

Such a model keeps its past in transformers' own cache, which has one length for all of its rows. So sequences that begin with
equally many tokens form a group, read their prompts together and write together; one that ends leaves the stack. A model whose
past is of no kind that we know gets the whole text again for every token.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from graftlm.base import hf
from graftlm.base.context import ForwardContext
from graftlm.base.load import Base
from graftlm.segments import Segments
from graftlm.serving.paged import Work
from graftlm.serving.sequence import Sequence


class _Group:
    """Sequences of one length, and their past."""

    def __init__(self, sequences: list[Sequence], cache: Any) -> None:
        self.sequences, self.cache = sequences, cache

    def leave(self, sequence: Sequence) -> None:
        """Take one sequence's rows out of the stack."""
        at = self.sequences.index(sequence)
        del self.sequences[at]
        if self.cache is not None and self.sequences:
            kept = [i for i in range(len(self.sequences) + 1) if i != at]
            self.cache.batch_select_indices(torch.tensor(kept))


class Grouped:
    """The passes of a model that runs on stacks of equally long sequences."""

    splits_prompts = False

    def __init__(self, base: Base, *, tokens: int, seats: int) -> None:
        self.base, self.tokens, self.seats = base, tokens, seats
        self.most_tokens = min(base.anatomy.max_positions or tokens, tokens)
        self.reused = 0
        self._held = 0
        self._running = 0
        self._group_of: dict[Sequence, _Group] = {}
        # A model that keeps its past in another way gets the whole text again for every token.
        self._caches = "past_key_values" in inspect.signature(base.anatomy.body.forward).parameters
        if base.packs:  # it packs, and a past in blocks changes what it says
            hf.switch(base.model, base.own_attention)

    @property
    def bytes(self) -> int:
        return 0

    @property
    def occupied(self) -> float:
        """The share of the tokens that running sequences may grow to."""
        return self._held / self.tokens

    def admit(self, sequence: Sequence) -> bool:
        """Count a sequence in, at its longest, if it still fits."""
        if self._running >= self.seats or self._held + sequence.most_tokens > self.tokens:
            return False
        self._held += sequence.most_tokens
        self._running += 1
        sequence.seat = 0
        return True

    def reserve(self, sequence: Sequence, new: int) -> bool:
        return True

    def release(self, sequence: Sequence) -> None:
        """Give up a sequence's place in its group."""
        group = self._group_of.pop(sequence, None)
        if group is not None:
            group.leave(sequence)
        sequence.computed = 0
        sequence.states = None
        if sequence.seat >= 0:
            self._held -= sequence.most_tokens
            self._running -= 1
            sequence.seat = -1

    def forget(self) -> None:
        """Nothing is kept beyond a sequence's life."""

    def run(self, work: Work) -> tuple[list[Sequence], Tensor]:
        """One pass for each group; returns the sequences by slot, and the state behind each one's last token (n, width)."""
        fresh: dict[tuple[int, bool], list[Sequence]] = defaultdict(list)
        groups: dict[int, _Group] = {}
        for sequence, _ in work:
            if sequence in self._group_of:
                group = self._group_of[sequence]
                groups[id(group)] = group
            else:
                fresh[len(sequence.tokens), sequence.request.embed].append(sequence)
        for members in fresh.values():
            members.sort(key=lambda s: s.slot)
            group = _Group(members, DynamicCache(config=self.base.model.config) if self._caches else None)
            groups[id(group)] = group
            self._group_of.update((s, group) for s in members)
        done: list[tuple[Sequence, Tensor]] = []
        for group in groups.values():
            done += zip(list(group.sequences), self._step(group))
        done.sort(key=lambda pair: pair[0].slot)
        return [s for s, _ in done], torch.stack([state for _, state in done])

    def _step(self, group: _Group) -> Tensor:
        """One pass of a group; returns the states behind its sequences' last tokens (n, width)."""
        past = group.sequences[0].computed if self._caches else 0
        length = len(group.sequences[0].tokens) - past
        ids = torch.tensor([s.tokens[past:] for s in group.sequences], device=self.base.device)  # (n, L)
        slots = tuple(s.slot for s in group.sequences)
        given = {"past_key_values": group.cache} if self._caches else {}
        with ForwardContext(Segments(lengths=(length,) * len(slots), slots=slots, stacked=True)):
            output = self.base.anatomy.body(input_ids=ids, use_cache=self._caches, **given)
        hidden: Tensor = (
            output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        )  # (n, L, width)
        for sequence, states in zip(group.sequences, hidden):
            if sequence.request.embed:
                sequence.states = states.sum(0, dtype=torch.float32)
            sequence.computed = len(sequence.tokens)
        return hidden[:, -1]
