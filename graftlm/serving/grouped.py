"""Running models that cannot use our attention: sequences of equal length in lockstep, each group one stack.

Such a model keeps its past in its class's own cache (`base/caches.py`), which has one length for all of its rows. So sequences
that begin with equally many tokens form a group, prefill together and decode together; one that ends leaves the stack. A model
whose cache was not proven to change nothing gets the whole text again for every token.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from graftlm.base.attention import set_attention
from graftlm.base.caches import Asking, Past
from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base
from graftlm.segments import Segments
from graftlm.serving.engine.runner import Work
from graftlm.serving.engine.sequence import Sequence


class _Group:
    """Sequences of one length, and their past."""

    def __init__(self, sequences: list[Sequence], past: Past | None) -> None:
        self.sequences, self.past = sequences, past

    def leave(self, sequence: Sequence) -> None:
        """Take one sequence's rows out of the stack."""
        at = self.sequences.index(sequence)
        del self.sequences[at]
        if self.past is not None and self.sequences:
            self.past.keep([i for i in range(len(self.sequences) + 1) if i != at])


class StackedRunner:
    """The passes of a model that runs on stacks of equally long sequences."""

    chunked_prefill = False

    def __init__(self, base: Base, *, cache: Asking | None, tokens: int, batch_slots: int) -> None:
        """`cache` says how the class's own cache is used, None where it is not (`prove_decoding`)."""
        self.base, self.cache, self.tokens, self.batch_slots = base, cache, tokens, batch_slots
        self.most_tokens = min(base.structure.max_positions or tokens, tokens)
        self.reused = 0
        self._held = 0
        self._running = 0
        self._group_of: dict[Sequence, _Group] = {}
        if base.packs:  # it packs, and a past in blocks changes what it says
            set_attention(base.model, base.original_attention)

    @property
    def bytes(self) -> int:
        return 0

    @property
    def occupied(self) -> float:
        """The share of the tokens that running sequences may grow to."""
        return self._held / self.tokens

    def admit(self, sequence: Sequence) -> bool:
        """Count a sequence in, at its longest, if it still fits."""
        if self._running >= self.batch_slots or self._held + sequence.most_tokens > self.tokens:
            return False
        self._held += sequence.most_tokens
        self._running += 1
        sequence.batch_slot = 0
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
        if sequence.batch_slot >= 0:
            self._held -= sequence.most_tokens
            self._running -= 1
            sequence.batch_slot = -1

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
            group = _Group(members, Past(self.base, self.cache) if self.cache is not None else None)
            groups[id(group)] = group
            self._group_of.update((s, group) for s in members)
        done: list[tuple[Sequence, Tensor]] = []
        for group in groups.values():
            done += zip(list(group.sequences), self._step(group))
        done.sort(key=lambda pair: pair[0].slot)
        return [s for s, _ in done], torch.stack([state for _, state in done])

    def _step(self, group: _Group) -> Tensor:
        """One pass of a group; returns the states behind its sequences' last tokens (n, width)."""
        done = group.sequences[0].computed if group.past is not None else 0
        length = len(group.sequences[0].tokens) - done
        ids = torch.tensor([s.tokens[done:] for s in group.sequences], device=self.base.device)  # (n, L)
        slots = tuple(s.slot for s in group.sequences)
        context = ForwardContext(Segments(lengths=(length,) * len(slots), slots=slots, stacked=True))
        if group.past is not None:
            with context, self.base.alone():
                hidden = group.past.step(ids)  # (n, L, width)
        else:
            hidden = self.base.hidden(ids.reshape(-1), context).view(*ids.shape, -1)
        for sequence, states in zip(group.sequences, hidden):
            if sequence.request.embed:
                sequence.states = states.sum(0, dtype=torch.float32)
            sequence.computed = len(sequence.tokens)
        return hidden[:, -1]
