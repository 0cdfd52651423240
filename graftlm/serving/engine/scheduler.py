"""Which sequences take part in the next step, and with how many new tokens each: `Scheduler.schedule()` -> work.

1. Admit: waiting sequences join the batch while there are batch slots, KV cache and adapter slots, the tenant that has been
   served the fewest tokens first (`FairQueue`).
2. Decode: every running sequence gets its next token.
3. Prefill: what is left of the step's token budget goes to prompts, in chunks.
4. Where the KV cache is full, the newest sequence is preempted: it waits again, and computes its tokens once more when it is
   admitted.

Several tenants share an engine fairly (`EngineLimits.shared`): none fills the batch or the queue, and a small one does not
wait for a large one's batch. A step of n tokens takes about a + b n seconds. Where b is next to nothing, as on a GPU, all
take part in every step. On a CPU twelve tokens take several times as long as one, so a tenant with one answer beside another's
twelve would decode at a fraction of its speed. So the tenant with the fewest tokens to compute goes first; of the others'
sequences, one of each tenant in turn and the longest idle first, as many join as it has itself: max-min fairness a step at a
time. More join where they add little to the step: a SHARE of the time that its own steps take is saved up for them
(`StepCostModel`). When it has nothing to do the others have all of the engine, in steps no longer than MAX_PREFILL_SECONDS,
since a new request waits for the end of one.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

from graftlm.errors import RequestError
from graftlm.serving.engine.adapter_cache import AdapterCache
from graftlm.serving.engine.runner import ModelRunner, Work
from graftlm.serving.engine.sequence import Sequence

SHARE = 0.25
"""Seconds that others may add for each second of the smallest tenant's own steps."""
MAX_PREFILL_SECONDS = 0.1
"""Seconds of a step with prefill; where single tokens take long, those of four of them."""
MIN_CHUNK = 8
"""Tokens of a prompt that any step may compute."""
_REMEMBERED = 50  # steps of about as many tokens that an estimate is the mean of
_ENOUGH = 20  # steps before the estimates are used
_UNLIMITED = 1 << 30


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What an engine may use."""

    max_num_seqs: int = 16
    """Most sequences in a batch."""
    queue: int = 256
    """Most sequences that wait."""
    max_num_batched_tokens: int = 256
    """Most tokens in one step, prefill and decode together."""
    cache_tokens: int = 16384
    """Tokens that the KV cache has memory for."""
    max_loras: int = 16
    """Adapters in slots at once."""
    adapter_bytes: int = 4 << 30
    """Memory for adapters: those in slots, and copies of others that were used lately."""
    shared: bool = False
    """Whether tenants share it: then none may take the last quarter of the batch, or more than half of the queue."""


class FairQueue:
    """Waiting sequences: fair between tenants, first come first served within one.

    Each tenant has a line of its own and a count of the tokens it was served. The tenant with the lowest count goes first (the
    virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language Models"), so one that sends a hundred times
    as many requests waits behind its own, not the others behind it. One that was away comes back with the lowest count of
    those who are here, so absence saves nothing up.
    """

    def __init__(self) -> None:
        self._lines: dict[str, deque[Sequence]] = {}
        self._served: dict[str, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for tenant in self.tenants:
            yield from self._lines[tenant]

    def num_waiting(self, tenant: str) -> int:
        """How many sequences of a tenant wait."""
        return len(self._lines.get(tenant, ()))

    @property
    def tenants(self) -> list[str]:
        """Tenants with waiting sequences, the next one first."""
        return self.by_tokens_served(self._lines)

    def by_tokens_served(self, tenants: Iterable[str]) -> list[str]:
        """Tenants, the least served first; of two served alike the one with fewer waiting."""
        return sorted(set(tenants), key=lambda name: (self._served.get(name, 0.0), self.num_waiting(name), name))

    def waiting_of(self, tenant: str) -> list[Sequence]:
        """A tenant's waiting sequences, oldest first."""
        return list(self._lines.get(tenant, ()))

    def add(self, sequence: Sequence, running: set[str], *, first: bool = False) -> None:
        """Put a sequence at the end of its tenant's line, or `first` in it; `running` are tenants with running sequences."""
        tenant = sequence.request.tenant
        if tenant not in self._lines:
            here = [count for name, count in self._served.items() if name in self._lines or name in running]
            if tenant not in running:
                self._served[tenant] = max(self._served.get(tenant, 0.0), min(here, default=0.0))
            self._served.setdefault(tenant, 0.0)
            self._lines[tenant] = deque()
        if first:
            self._lines[tenant].appendleft(sequence)
        else:
            self._lines[tenant].append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        line = self._lines[sequence.request.tenant]
        line.remove(sequence)
        if not line:
            del self._lines[sequence.request.tenant]

    def count_tokens(self, tenant: str, tokens: float) -> None:
        """Count tokens that a tenant was served."""
        self._served[tenant] = self._served.get(tenant, 0.0) + tokens
        if len(self._served) > 10_000:  # tenants who left long ago
            here = self._lines.keys() | {tenant}
            self._served = {name: count for name, count in self._served.items() if name in here}


class StepCostModel:
    """Estimates a and b, the seconds of a step of n tokens being a + b n, and keeps what is saved up for other tenants.

    Steps of about as many tokens are averaged first and the averages fitted, with equal relative errors: while one tenant is
    alone all steps are alike, and a fit of these would be a fit of noise.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float, float]] = {}  # by the power of two: steps, mean tokens, mean seconds
        self._steps = 0
        self._saved = 0.0  # seconds
        self.cost: tuple[float, float] | None = None
        """a and b, in seconds; None as long as too little is known."""

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens has taken so long."""
        steps, n, t = self._seen.get(tokens.bit_length(), (0.0, 0.0, 0.0))
        steps = min(steps + 1, _REMEMBERED)
        self._seen[tokens.bit_length()] = (steps, n + (tokens - n) / steps, t + (seconds - t) / steps)
        self._steps += 1
        if self._steps >= _ENOUGH and len(self._seen) > 1:
            self.cost = self._fitted()

    def _fitted(self) -> tuple[float, float]:
        points = [(steps / (n * n), n, t) for steps, n, t in self._seen.values()]
        weight = sum(w for w, _, _ in points)
        mean_n, mean_t = sum(w * n for w, n, _ in points) / weight, sum(w * t for w, _, t in points) / weight
        spread = sum(w * (n - mean_n) ** 2 for w, n, _ in points)
        b = max(sum(w * (n - mean_n) * (t - mean_t) for w, n, t in points) / spread, 0.0)
        return max(mean_t - b * mean_n, 0.0), b

    def prefill_budget(self) -> int:
        """How many tokens a step with prefill may have."""
        if self.cost is None:
            return _UNLIMITED
        a, b = self.cost
        left = max(MAX_PREFILL_SECONDS, 4 * (a + b)) - a
        return max(int(min(left / b, _UNLIMITED)), MIN_CHUNK) if b > 0 else _UNLIMITED

    def budget_for_others(self, own: int) -> int:
        """How many tokens others may add now to a step of `own` tokens: as many again, or what is saved up for them."""
        if self.cost is None:
            return own
        a, b = self.cost
        alone = a + b * own
        self._saved = min(self._saved + SHARE * alone, max(alone, MIN_CHUNK * b))
        return max(own, min(int(self._saved / b), _UNLIMITED)) if b > 0 else _UNLIMITED

    def charge(self, tokens: int) -> None:
        """Others have added so many."""
        if self.cost is not None:
            self._saved = max(self._saved - tokens * self.cost[1], 0.0)


def fair_order(running: Iterable[Sequence]) -> tuple[list[Sequence], list[Sequence]]:
    """Those of the tenant that has the fewest tokens to compute; and the others', one of each tenant in turn, the longest
    idle first."""
    by_tenant: defaultdict[str, list[Sequence]] = defaultdict(list)
    for sequence in running:
        by_tenant[sequence.request.tenant].append(sequence)
    smallest = min(by_tenant, key=lambda tenant: (sum(s.num_uncomputed for s in by_tenant[tenant]), tenant))
    first = by_tenant.pop(smallest)
    turns = [
        (turn, sequence.last_step, sequence)
        for line in by_tenant.values()
        for turn, sequence in enumerate(sorted(line, key=lambda s: s.last_step))
    ]
    return first, [sequence for _, _, sequence in sorted(turns, key=lambda entry: entry[:2])]


class Scheduler:
    """The waiting and the running sequences of an engine. `check_room`, `expect`, `crowds` and `num_waiting` may be used from
    any thread, everything else from the engine's."""

    def __init__(self, limits: EngineLimits, runner: ModelRunner, adapter_cache: AdapterCache) -> None:
        self.limits, self.runner, self.adapter_cache = limits, runner, adapter_cache
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.step_cost = StepCostModel()
        self.num_preempted = 0
        self._expected: Counter[str] = Counter()  # by tenant: sequences that were let in and are not in the queue yet
        self._lock = threading.Lock()  # of `waiting` and `_expected`

    # ---- admission control -----------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, or are about to."""
        return len(self.waiting) + self._expected.total()

    def check_room(self, tenant: str, answers: int = 1, *, in_flight: int = 0) -> None:
        """Raise RequestError, with `full` set, where so many more answers of a tenant may not wait.

        `in_flight` others of the tenant are on their way and not expected yet.
        """
        with self._lock:
            self._check_room(tenant, answers, in_flight)

    def expect(self, tenant: str, answers: int) -> None:
        """Keep room for answers that `add` or `forget` will be called for. Raises RequestError as `check_room` does."""
        with self._lock:
            self._check_room(tenant, answers)
            self._expected[tenant] += answers

    def _check_room(self, tenant: str, answers: int, in_flight: int = 0) -> None:
        waiting = self.num_waiting + in_flight
        if waiting + answers > self.limits.queue:
            raise RequestError(
                f"the queue is full: {waiting} answers wait, the limit is {self.limits.queue}", full=True
            )
        share = max(self.limits.queue // 2, 1)
        own = in_flight + self.waiting.num_waiting(tenant) + self._expected[tenant]
        if self.limits.shared and own + answers > share:
            raise RequestError(
                f"your part of the queue is full: {own} answers wait, the limit for one key is {share}", full=True
            )

    def crowds(self, tenant: str) -> bool:
        """Whether a tenant wants more than it gets, on an engine that several share."""
        return self.limits.shared and self.waiting.num_waiting(tenant) > 0

    # ---- sequences come and go ---------------------------------------------------------------------------------------------

    def add(self, sequences: Sequences[Sequence]) -> None:
        """Queue sequences that were expected."""
        tenants = self._tenants
        with self._lock:
            for sequence in sequences:
                self.waiting.add(sequence, tenants)
                self._arrived(sequence.request.tenant, 1)

    def forget(self, tenant: str, answers: int) -> None:
        """Expect answers no more."""
        with self._lock:
            self._arrived(tenant, answers)

    def _arrived(self, tenant: str, answers: int) -> None:
        self._expected[tenant] -= answers
        if not self._expected[tenant]:
            del self._expected[tenant]

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, and give up the memory and the adapter slot it has."""
        if sequence.batch_slot >= 0:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            with self._lock:
                self.waiting.remove(sequence)

    @property
    def _tenants(self) -> set[str]:
        return {s.request.tenant for s in self.running}

    # ---- a step ------------------------------------------------------------------------------------------------------------

    def schedule(self) -> Work:
        """Which sequences run this step, and how many new tokens of each."""
        self._admit()
        if not self.runner.chunked_prefill:
            return [(sequence, sequence.num_uncomputed) for sequence in self.running]
        budget = self.limits.max_num_batched_tokens
        prefill_budget = min(budget, self.step_cost.prefill_budget()) if self.limits.shared else budget
        if not self.limits.shared or len(self._tenants) < 2:
            work = self._fill(list(self.running), budget, prefill_budget)
        else:
            first, rest = fair_order(self.running)
            work = self._fill(first, budget, prefill_budget)
            own = sum(n for _, n in work)
            left = min(budget - own, self.step_cost.budget_for_others(own))
            others = self._fill(rest, left, left)
            self.step_cost.charge(sum(n for _, n in others))
            work += others
        return [(s, n) for s, n in work if s.batch_slot >= 0]  # without those preempted meanwhile

    def count(self, work: Work, step: int) -> None:
        """Note who takes part in a step."""
        for sequence, n in work:
            self.waiting.count_tokens(sequence.request.tenant, n)
            sequence.last_step = step

    def _admit(self) -> None:
        """Move waiting sequences into the batch while batch slots, memory and adapter slots are there, the least served
        tenant's first."""
        limit = self.limits.max_num_seqs
        while len(self.running) < limit:
            admitted = False
            for tenant in self.waiting.tenants:
                own = sum(s.request.tenant == tenant for s in self.running)
                if self.limits.shared and own >= max(limit - max(limit // 4, 1), 1):
                    continue
                if self._admit_one(tenant):
                    admitted = True
                    break
            if not admitted:
                return

    def _admit_one(self, tenant: str) -> bool:
        """Admit the first of a tenant's sequences that can run now; False when none can."""
        for sequence in self.waiting.waiting_of(tenant):
            first = sequence.first_sibling
            if first is not None and not first.done and first.num_computed < first.prompt_length:
                continue  # the first answer computes the prompt for all
            adapter = sequence.request.adapter
            slot: int | None = 0
            if adapter:
                slot = self.adapter_cache.acquire_slot(adapter, sequence.times_skipped)
                if slot is None:
                    sequence.times_skipped += 1
                    continue
            sequence.slot = slot
            if not self.runner.admit(sequence):
                if adapter:
                    self.adapter_cache.release_slot(adapter)
                return False  # memory is short, and the oldest should get it
            with self._lock:
                self.waiting.remove(sequence)
            self.running.append(sequence)
            return True
        return False

    def _fill(self, sequences: list[Sequence], budget: int, prefill_budget: int) -> Work:
        """A token for each sequence in decode, at most `budget`; what is left of `prefill_budget` for prompts."""
        work: Work = []
        for sequence in sequences:
            if sequence.decoding and len(work) < budget and self._make_room(sequence, 1):
                work.append((sequence, 1))
        left = prefill_budget - len(work)
        # Prompts share it, the least served tenant's first, so one long prompt does not hold up the others'.
        prefill = [s for s in sequences if not s.decoding]
        order = {tenant: i for i, tenant in enumerate(self.waiting.by_tokens_served(s.request.tenant for s in prefill))}
        for sequence in sorted(prefill, key=lambda s: order[s.request.tenant]):
            new = min(sequence.num_uncomputed, left)
            if new > 0 and sequence in self.running and self._make_room(sequence, new):
                work.append((sequence, new))
                left -= new
        return work

    def _make_room(self, sequence: Sequence, new: int) -> bool:
        """Reserve memory for `new` tokens; preempts the newest sequences until there is enough."""
        if sequence.batch_slot < 0:  # it was preempted itself
            return False
        while not self.runner.reserve(sequence, new):
            newest = self.running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send a sequence back to the queue with what it has generated; it computes that again when it is admitted."""
        self.running.remove(sequence)
        self._release(sequence)
        self.num_preempted += 1
        with self._lock:
            self.waiting.add(sequence, self._tenants, first=True)

    def _release(self, sequence: Sequence) -> None:
        if sequence.request.adapter:
            self.adapter_cache.release_slot(sequence.request.adapter)
        sequence.slot = 0
        self.runner.release(sequence)
