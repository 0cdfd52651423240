"""The engine: many requests, each with its own adapter, in one batch that they join and leave between steps.

    engine = Engine(base, limits)
    engine.submit(Request(...), folder)
    while engine.busy:
        for output in engine.step(): ...

A step lets waiting requests in while there is room, gives every sequence that is writing its next token, spends what is left of
the step on prompts that are still being read, chooses tokens, and returns what is new. It knows no clock but deadlines, no file
and no network. `submit` and `cancel` may be called from any thread, everything else from one.

What a request gets depends on nothing but itself: its adapter version is held from arrival to end, its random numbers are
hashes of its seed, and kept keys and values are named by adapter digest and tokens.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import Adapter
from graftlm.base.caches import Decoding, prove_decoding
from graftlm.base.kv_cache import bytes_per_token
from graftlm.base.loading import Base
from graftlm.errors import GraftError, RequestError
from graftlm.serving.engine import sampling
from graftlm.serving.engine.adapter_cache import AdapterCache
from graftlm.serving.engine.request import Request, RequestOutput, TokenLogprobs
from graftlm.serving.engine.runner import PagedRunner, Work, logits
from graftlm.serving.engine.scheduler import FairQueue
from graftlm.serving.engine.sequence import Sequence
from graftlm.serving.grouped import StackedRunner
from graftlm.serving.http.invalid import shown
from graftlm.serving.shares import StepCostModel, first_and_rest

BLOCK = 16  # tokens of a block of keys and values
LOOK = 0.02
"""Seconds between two looks through all that wait for who is out of time: a step may be shorter than that takes."""


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What an engine may use."""

    max_num_seqs: int = 16
    """Most sequences in a batch."""
    queue: int = 256
    """Most sequences that wait."""
    max_num_batched_tokens: int = 256
    """Most tokens in one step, prompts and answers together."""
    cache_tokens: int = 16384
    """Tokens whose keys and values there is memory for."""
    max_loras: int = 16
    """Adapters that can be at work at once."""
    adapter_bytes: int = 4 << 30
    """Memory for adapters: those in slots, and copies of others that were used lately."""
    shared: bool = False
    """Whether tenants share it: then none may take the last quarter of the batch, or more than half of the queue."""


@dataclass
class EngineCounters:
    """What an engine has done since it was made."""

    steps: int = 0
    prompt_tokens: int = 0
    prefix_cached_tokens: int = 0
    generated_tokens: int = 0
    preempted: int = 0
    step_seconds: float = 0.0
    finished: dict[str, int] = field(default_factory=dict[str, int])


class Engine:
    """Continuous batching over one base and its adapters."""

    def __init__(
        self, base: Base, limits: EngineLimits, *, load: Callable[[Path], Adapter] | None = None,
        decoding: Decoding | None = None, wake: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`load` reads an adapter's folder; `decoding` is what was proven of this base, if it was asked already.

        Raises ModelError for a base that cannot decode.
        """
        self.base, self.limits, self.wake = base, limits, wake
        self.decoding = decoding or prove_decoding(base)
        self.paged = self.decoding.paged
        self.runner: PagedRunner | StackedRunner
        if self.paged:
            blocks = max(limits.cache_tokens // BLOCK, 2)
            layers = self.decoding.layers
            self.runner = PagedRunner(base, layers, blocks=blocks, block=BLOCK, batch_slots=limits.max_num_seqs)
            self.bytes_per_token = bytes_per_token(layers, base.activation_dtype)
        else:
            self.runner = StackedRunner(
                base, cache=self.decoding.cache, tokens=limits.cache_tokens, batch_slots=limits.max_num_seqs
            )
            self.bytes_per_token = 0
        self.adapter_cache = AdapterCache(
            base, slots=limits.max_loras, bytes=limits.adapter_bytes,
            load=load or (lambda folder: adapter_format.load(base, folder)), arrived=wake,
        )  # fmt: skip
        self.counts = EngineCounters()
        self._arrivals: deque[tuple[Request, Path | None]] = deque()
        self._cancelled: deque[str] = deque()
        self._queue = FairQueue()
        self._step_cost = StepCostModel()
        self._running: list[Sequence] = []
        self._of_request: dict[str, list[Sequence]] = {}
        self._pending = 0  # sequences that were submitted and are not in the queue yet
        self._lock = threading.Lock()
        self._looked, self._failures = (
            -math.inf,
            0,
        )  # when `_give_up` last went through all, and what had failed by then

    # ---- from any thread --------------------------------------------------------------------------------------------

    def submit(self, request: Request, folder: Path | None = None) -> None:
        """Ask; `folder` holds the adapter whose digest the request names. Raises RequestError for what will never fit.

        A full queue raises RequestError with `full` set.
        """
        self.check(request)
        with self._lock:
            self._check_room(request.tenant, request.n)
            self._pending += request.n
            self._arrivals.append((request, folder))
        self.wake()

    def check_room(self, tenant: str, answers: int = 1, *, in_flight: int = 0) -> None:
        """Raise RequestError, with `full` set, where so many more answers of a tenant may not wait.

        `submit` asks the same; a server asks before it spends anything on a request, and has `in_flight` others of the tenant
        that it has not submitted yet.
        """
        with self._lock:
            self._check_room(tenant, answers, in_flight)

    def _check_room(self, tenant: str, answers: int, in_flight: int = 0) -> None:
        waiting = len(self._queue) + self._pending + in_flight
        if waiting + answers > self.limits.queue:
            raise RequestError(
                f"the queue is full: {waiting} answers wait, the limit is {self.limits.queue}", full=True
            )
        share = max(self.limits.queue // 2, 1)
        mine = in_flight + self._queue.waiting(tenant) + sum(r.n for r, _ in self._arrivals if r.tenant == tenant)
        if self.limits.shared and mine + answers > share:
            raise RequestError(
                f"your part of the queue is full: {mine} answers wait, the limit for one key is {share}", full=True
            )

    def check(self, request: Request) -> None:
        """Raise RequestError for a request that cannot be answered however long it waits."""
        if not request.prompt:
            raise RequestError("the prompt is empty: 0 tokens; give at least one", field="prompt")
        most = self.runner.most_tokens
        if len(request.prompt) + min(request.max_tokens, 1) > most:
            raise RequestError(
                f"the prompt has {len(request.prompt)} tokens, and {most} fit with the answer; shorten the prompt",
                field="prompt",
            )
        if len(request.prompt) + request.max_tokens > most:
            raise RequestError(
                f"the prompt has {len(request.prompt)} tokens and max_tokens is {request.max_tokens}; together at most {most} "
                f"fit, so ask for at most {most - len(request.prompt)}",
                field="max_tokens",
            )
        self.check_tokens("prompt", request.prompt)
        if request.n > self.limits.queue:
            raise RequestError(f"n is {request.n}, and at most {self.limits.queue} answers may wait", field="n")

    def check_tokens(self, field: str, ids: Iterable[int]) -> None:
        """Raise RequestError for the first id that is none of this model's vocabulary; `field` holds them."""
        size = self.base.structure.vocabulary
        unknown = next((token for token in ids if not 0 <= token < size), None)
        if unknown is not None:
            raise RequestError(
                f"{field} has the token id {shown(unknown)}, and this model's vocabulary has ids from 0 to {size - 1}",
                field=field,
            )

    def cancel(self, id: str) -> None:
        """Give up a request; its last outputs say so."""
        self._cancelled.append(id)
        self.wake()

    def crowds(self, tenant: str) -> bool:
        """Whether a tenant wants more than it gets, on an engine that several share."""
        return self.limits.shared and self._queue.waiting(tenant) > 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do now or soon."""
        return bool(self._arrivals or self._running or len(self._queue) or self._cancelled)

    @property
    def waiting(self) -> int:
        """Sequences that wait."""
        return len(self._queue) + self._pending

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    # ---- from the engine's thread -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Do one step; returns what is new, in no order between requests."""
        begun, worked = time.perf_counter(), time.thread_time()
        outputs: list[RequestOutput] = []
        self.adapter_cache.settle()
        self._take_arrivals(outputs)
        self._give_up(outputs)
        self._admit()
        work = self._plan()
        if work:
            read = sum(n for s, n in work if not s.decoding)
            self.counts.prompt_tokens += read
            for sequence, n in work:
                self._queue.serve(sequence.request.tenant, n)
                sequence.worked = self.counts.steps
            sequences, states = self.runner.run(work)
            self._answer(sequences, states, outputs)
            # Of its own thread: what it waits for others' use of the processor or the interpreter is not for its tokens.
            self._step_cost.learn(sum(n for _, n in work), time.thread_time() - worked)
            self.counts.steps += 1
            self.counts.step_seconds += time.perf_counter() - begun
        return outputs

    @property
    def stalled(self) -> bool:
        """Whether a step can do nothing until an adapter has been loaded, or somebody calls."""
        return not (self._running or self._arrivals or self._cancelled)

    def run(self, asked: Sequences[tuple[Request, Path | None]]) -> Iterator[RequestOutput]:
        """Ask, each with the folder of its adapter, and step until all answers are complete: for a caller without a thread."""
        news = threading.Event()
        before, self.wake = self.wake, news.set
        self.adapter_cache.on_arrival(news.set)
        left = 0
        try:
            for request, folder in asked:
                self.submit(request, folder)
                left += request.n
            while left:
                news.clear()
                outputs = self.step()
                for output in outputs:
                    left -= output.finish_reason is not None
                    yield output
                if not outputs and self.stalled:
                    news.wait(0.1)
        finally:
            if left:  # the caller has left: nothing of it goes on
                for request, _ in asked:
                    self.cancel(request.id)
                self.step()
            self.wake = before
            self.adapter_cache.on_arrival(before)

    def fail(self, message: str) -> list[RequestOutput]:
        """End everything that runs, after a step that went wrong; what waits goes on with a clean state."""
        outputs: list[RequestOutput] = []
        for sequence in list(self._running):
            self._end(
                sequence,
                outputs,
                RequestOutput(id=sequence.request.id, index=sequence.index, finish_reason="error", error=message),
            )
        self.runner.forget()
        return outputs

    def close(self) -> None:
        """End the thread that loads adapters, and take them off the base."""
        self.adapter_cache.close()

    # ---- the parts of a step ----------------------------------------------------------------------------------------

    def _take_arrivals(self, outputs: list[RequestOutput]) -> None:
        with self._lock:
            arrivals = list(self._arrivals)
            self._arrivals.clear()
        for request, folder in arrivals:
            try:
                sequences = self._begin(request, folder)
            except Exception as error:
                # Its own fault, such as a version that was removed since it was found: the others go on.
                with self._lock:
                    self._pending -= request.n
                said = str(error) if isinstance(error, GraftError) else f"{type(error).__name__}: {error}"
                outputs += [
                    RequestOutput(id=request.id, index=i, finish_reason="error", error=said) for i in range(request.n)
                ]
                continue
            self._of_request[request.id] = sequences
            tenants = self._tenants
            with self._lock:
                for sequence in sequences:
                    self._queue.add(sequence, tenants)
                    self._pending -= 1

    def _begin(self, request: Request, folder: Path | None) -> list[Sequence]:
        """The answers that a request wants, its adapter held for each of them."""
        tokenizer = request.tokenizer or self.base.tokenizer
        first = Sequence(request, 0, tokenizer, None)
        sequences = [first, *(Sequence(request, i, tokenizer, first) for i in range(1, request.n))]
        if request.adapter:
            for _ in sequences:
                self.adapter_cache.hold(request.adapter, folder or Path())
        return sequences

    @property
    def _tenants(self) -> set[str]:
        return {s.request.tenant for s in self._running}

    def _give_up(self, outputs: list[RequestOutput]) -> None:
        """Drop what was cancelled, what is too late, and what waits for an adapter that cannot be loaded."""
        cancelled = bool(self._cancelled)
        while self._cancelled:
            for sequence in self._of_request.get(self._cancelled.popleft(), []):
                sequence.cancelled = True
        now, failures = time.monotonic(), self.adapter_cache.counters.failures
        if not cancelled and failures == self._failures and now < self._looked + LOOK:
            return
        self._looked, self._failures = now, failures
        for sequence in [*self._running, *self._queue]:
            request = sequence.request
            if sequence.cancelled:
                self._end(
                    sequence, outputs, RequestOutput(id=request.id, index=sequence.index, finish_reason="cancelled")
                )
            elif request.deadline is not None and now > request.deadline:
                self._end(
                    sequence, outputs, RequestOutput(id=request.id, index=sequence.index, finish_reason="timeout")
                )
            elif request.adapter and self.adapter_cache.error(request.adapter):
                error = self.adapter_cache.error(request.adapter)
                self._end(
                    sequence,
                    outputs,
                    RequestOutput(id=request.id, index=sequence.index, finish_reason="error", error=error),
                )

    def _admit(self) -> None:
        """Move waiting sequences into the batch while batch slots, memory and slots are there, the least served
        tenant's first."""
        most = self.limits.max_num_seqs
        while len(self._running) < most:
            admitted = False
            for tenant in self._queue.tenants:
                mine = sum(s.request.tenant == tenant for s in self._running)
                if self.limits.shared and mine >= max(most - max(most // 4, 1), 1):
                    continue
                if self._admit_one(tenant):
                    admitted = True
                    break
            if not admitted:
                return

    def _admit_one(self, tenant: str) -> bool:
        """Let in the first of a tenant's sequences that can run now; False when none can."""
        for sequence in self._queue.line(tenant):
            first = sequence.after
            if first is not None and not first.done and first.computed < first.prompt_length:
                continue  # the first answer reads the prompt for all
            adapter = sequence.request.adapter
            slot: int | None = 0
            if adapter:
                slot = self.adapter_cache.run(adapter, sequence.passed_over)
                if slot is None:
                    sequence.passed_over += 1
                    continue
            sequence.slot = slot
            if not self.runner.admit(sequence):
                if adapter:
                    self.adapter_cache.stop(adapter)
                return False  # memory is short, and who is first should get it
            with self._lock:
                self._queue.remove(sequence)
            self._running.append(sequence)
            return True
        return False

    def _plan(self) -> Work:
        """Which sequences run this step, and how many new tokens of each; interrupts the newest where memory is short."""
        if not self.runner.chunked_prefill:
            return [(sequence, sequence.left) for sequence in self._running]
        budget = self.limits.max_num_batched_tokens
        reading = min(budget, self._step_cost.reading()) if self.limits.shared else budget
        if not self.limits.shared or len(self._tenants) < 2:
            work = self._fill(list(self._running), budget, reading)
        else:
            first, rest = first_and_rest(self._running)
            work = self._fill(first, budget, reading)
            taken = sum(n for _, n in work)
            room = min(budget - taken, self._step_cost.room(taken))
            others = self._fill(rest, room, room)
            self._step_cost.spend(sum(n for _, n in others))
            work += others
        return [(s, n) for s, n in work if s.batch_slot >= 0]

    def _fill(self, sequences: list[Sequence], budget: int, reading_budget: int) -> Work:
        """New tokens for those that write, at most `budget`; and with what is left of the other one prompts are read."""
        work: Work = []
        for sequence in sequences:
            if sequence.decoding and len(work) < budget and self._make_place(sequence, 1):
                work.append((sequence, 1))
        left = reading_budget - len(work)
        # Prompts share it, the least served tenant's first, so one long prompt does not hold up the others'.
        reading = [s for s in sequences if not s.decoding]
        order = {tenant: i for i, tenant in enumerate(self._queue.by_service(s.request.tenant for s in reading))}
        for sequence in sorted(reading, key=lambda s: order[s.request.tenant]):
            new = min(sequence.left, left)
            if new > 0 and sequence in self._running and self._make_place(sequence, new):
                work.append((sequence, new))
                left -= new
        return work

    def _make_place(self, sequence: Sequence, new: int) -> bool:
        """Hold memory for `new` tokens; sends the newest sequences back to wait until there is enough."""
        if sequence.batch_slot < 0:  # it was sent back itself
            return False
        while not self.runner.reserve(sequence, new):
            newest = self._running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send a sequence back to the queue with what it has written; it reads that again when it is let in."""
        self._running.remove(sequence)
        self._leave_slot(sequence)
        self.runner.release(sequence)
        self.counts.preempted += 1
        with self._lock:
            self._queue.add(sequence, self._tenants, first=True)

    def _leave_slot(self, sequence: Sequence) -> None:
        if sequence.request.adapter:
            self.adapter_cache.stop(sequence.request.adapter)
        sequence.slot = 0

    def _answer(self, sequences: list[Sequence], states: Tensor, outputs: list[RequestOutput]) -> None:
        """Choose the next token of each sequence whose tokens are all computed."""
        places = [i for i, s in enumerate(sequences) if s.left == 0 and not s.request.embed]
        for sequence in sequences:
            if sequence.request.embed and sequence.left == 0:
                self._embed(sequence, outputs)
        if not places:
            return
        chosen = [sequences[i] for i in places]
        if len(places) < len(sequences):
            states = states[torch.tensor(places, device=states.device)]
        rows = logits(self.base, states, [s.slot for s in chosen]).float()  # (n, V)
        for sequence, (token, said) in zip(chosen, self._choose(chosen, rows)):
            self._write(sequence, token, said, outputs)

    def _choose(self, sequences: list[Sequence], rows: Tensor) -> list[tuple[int, TokenLogprobs | None]]:
        """A token for each row of logits (n, V), and the report that its request wants."""
        raw = rows
        if any(s.request.sampling.changes_logits or s.matcher is not None for s in sequences):
            rows = rows.clone()
            for row, sequence in zip(rows, sequences):
                if sequence.request.sampling.changes_logits:
                    sampling.change(row, sequence.request.sampling, sequence.request.prompt, sequence.answer)
                if sequence.matcher is not None:
                    sequence.matcher.restrict(row)
        tokens = rows.argmax(-1).tolist()
        drawn = [i for i, s in enumerate(sequences) if not s.request.sampling.greedy]
        if drawn:
            samplings = [sequences[i].request.sampling for i in drawn]
            numbers = [
                sampling.uniform(sequences[i].request.sampling.seed, sequences[i].index, sequences[i].written)
                for i in drawn
            ]
            of_drawn = rows if len(drawn) == len(rows) else rows[torch.tensor(drawn, device=rows.device)]
            for i, token in zip(drawn, sampling.draw(of_drawn, samplings, numbers)):
                tokens[i] = token
        wanted = [s.request.logprobs for s in sequences]
        return [
            (token, None if count is None else sampling.report(row, token, count))
            for token, row, count in zip(tokens, raw, wanted)
        ]

    def _write(self, sequence: Sequence, token: int, said: TokenLogprobs | None, outputs: list[RequestOutput]) -> None:
        """Add a token to a sequence, and end it where it ends."""
        request = sequence.request
        sequence.tokens.append(token)
        self.counts.generated_tokens += 1
        if sequence.first_token is None:
            sequence.first_token = time.monotonic()
        output = RequestOutput(id=request.id, index=sequence.index, tokens=[token])
        if said is not None:
            output.logprobs.append(said)
        matcher = sequence.matcher
        over = matcher is not None and matcher.accept(token)
        if matcher is not None and matcher.failure:
            output.finish_reason, output.refused = "error", True
            output.error = f"the schema cannot be followed to the end of an answer: {matcher.failure}"
        elif token in request.stop_ids:
            output.finish_reason = "stop"
        else:
            output.text = sequence.detokenizer.push(token)
            if sequence.detokenizer.stopped or over:
                output.finish_reason = "stop"
            elif sequence.written >= request.max_tokens:
                output.finish_reason = "length"
        if output.finish_reason is not None:
            self._end(sequence, outputs, output)
        else:
            outputs.append(output)

    def _embed(self, sequence: Sequence, outputs: list[RequestOutput]) -> None:
        assert sequence.states is not None
        mean = sequence.states / sequence.prompt_length  # (width,)
        output = RequestOutput(
            id=sequence.request.id, index=sequence.index, finish_reason="stop", embedding=mean.tolist()
        )
        self._end(sequence, outputs, output)

    def _end(self, sequence: Sequence, outputs: list[RequestOutput], output: RequestOutput) -> None:
        """Tell the last of a sequence and give up what it holds."""
        output.text += sequence.detokenizer.flush()
        output.prompt_tokens = sequence.prompt_length
        output.cached_tokens = sequence.cached_prompt_tokens
        output.completion_tokens = sequence.written
        outputs.append(output)
        sequence.done = True
        assert output.finish_reason is not None
        self.counts.finished[output.finish_reason] = self.counts.finished.get(output.finish_reason, 0) + 1
        self.counts.prefix_cached_tokens += sequence.cached_prompt_tokens
        if sequence.batch_slot >= 0:
            self._running.remove(sequence)
            self._leave_slot(sequence)
            self.runner.release(sequence)
        else:
            with self._lock:
                self._queue.remove(sequence)
        if sequence.request.adapter:
            self.adapter_cache.leave(sequence.request.adapter)
        group = self._of_request[sequence.request.id]
        if all(s.done for s in group):
            del self._of_request[sequence.request.id]
