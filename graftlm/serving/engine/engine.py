"""The engine: many requests, each with its own adapter, in one batch that they join and leave between steps.

    engine = Engine(base, limits)
    engine.add_request(Request(...), folder)
    while engine.busy:
        for output in engine.step(): ...

One step: schedule (`scheduler.py`: which sequences, how many new tokens each), run the model (`runner.py`), sample
(`sampling.py`), deliver what is new. The engine knows no clock but deadlines, no file and no network. `add_request` and
`abort_request` may be called from any thread, everything else from one.

What a request gets depends on nothing but itself: its adapter version is held from arrival to end, its random numbers are
hashes of its seed, and cached blocks are found by adapter digest and tokens.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import Adapter
from graftlm.base.caches import Decoding, prove_decoding
from graftlm.base.kv_cache import bytes_per_token
from graftlm.base.loading import Base
from graftlm.errors import GraftError, RequestError
from graftlm.formatting import quote
from graftlm.kernels import to_device
from graftlm.serving.engine import sampling
from graftlm.serving.engine.adapter_cache import AdapterCache
from graftlm.serving.engine.kv_cache import BLOCK_TOKENS
from graftlm.serving.engine.request import FinishReason, Request, RequestOutput, TokenLogprobs
from graftlm.serving.engine.runner import ModelRunner, PagedRunner, StackedRunner, logits
from graftlm.serving.engine.scheduler import EngineLimits, Scheduler
from graftlm.serving.engine.sequence import Sequence

ABORT_CHECK_SECONDS = 0.02
"""Seconds between two looks through all sequences for expired ones: a step may be shorter than that takes."""


@dataclass
class EngineCounters:
    """What an engine has done since it was made."""

    steps: int = 0
    prompt_tokens: int = 0
    prefix_cached_tokens: int = 0
    generated_tokens: int = 0
    step_seconds: float = 0.0
    finished: dict[str, int] = field(default_factory=dict[str, int])


class Engine:
    """Continuous batching over one base and its adapters."""

    def __init__(
        self, base: Base, limits: EngineLimits, *, load: Callable[[Path], Adapter] | None = None,
        decoding: Decoding | None = None, wake: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`load` reads an adapter's folder; `decoding` is what was proven of this base, if it was proven already.

        Raises ModelError for a base that cannot decode.
        """
        self.base, self.limits, self.wake = base, limits, wake
        self.decoding = decoding or prove_decoding(base)
        self.paged = self.decoding.paged
        self.runner: ModelRunner
        if self.paged:
            blocks = max(limits.cache_tokens // BLOCK_TOKENS, 2)
            layers = self.decoding.layers
            self.runner = PagedRunner(base, layers, blocks=blocks, block=BLOCK_TOKENS, batch_slots=limits.max_num_seqs)
            self.bytes_per_token = bytes_per_token(layers, base.activation_dtype)
        else:
            self.runner = StackedRunner(
                base, cache=self.decoding.cache, tokens=limits.cache_tokens, batch_slots=limits.max_num_seqs
            )
            self.bytes_per_token = 0
        self.adapter_cache = AdapterCache(
            base, slots=limits.max_loras, bytes=limits.adapter_bytes,
            load=load or (lambda folder: adapter_format.load(base, folder)), on_loaded=wake,
        )  # fmt: skip
        self.scheduler = Scheduler(limits, self.runner, self.adapter_cache)
        self.counts = EngineCounters()
        self._arrivals: deque[tuple[Request, Path | None]] = deque()
        self._to_abort: deque[str] = deque()
        self._sequences_of: dict[str, list[Sequence]] = {}
        self._last_abort_check = -math.inf
        self._failed_loads = 0  # when that was

    def limit_step(self, tokens: int) -> None:
        """Take at most so many tokens in a step; before the first one."""
        self.limits = self.scheduler.limits = replace(self.limits, max_num_batched_tokens=tokens)

    # ---- from any thread --------------------------------------------------------------------------------------------

    def add_request(self, request: Request, folder: Path | None = None) -> None:
        """Queue a request; `folder` holds the adapter whose digest it names. Raises RequestError for what will never fit.

        A full queue raises RequestError with `full` set.
        """
        self.check(request)
        self.scheduler.reserve_queue_slots(request.tenant, request.n)
        self._arrivals.append((request, folder))
        self.wake()

    def abort_request(self, id: str) -> None:
        """End a request; its last outputs say so."""
        self._to_abort.append(id)
        self.wake()

    def check(self, request: Request) -> None:
        """Raise RequestError for a request that cannot be answered however long it waits."""
        if not request.prompt:
            raise RequestError("the prompt is empty: 0 tokens; give at least one", field="prompt")
        limit = self.runner.max_model_len
        if len(request.prompt) + min(request.max_tokens, 1) > limit:
            raise RequestError(
                f"the prompt has {len(request.prompt)} tokens, and {limit} fit with the answer; shorten the prompt",
                field="prompt",
            )
        if len(request.prompt) + request.max_tokens > limit:
            raise RequestError(
                f"the prompt has {len(request.prompt)} tokens and max_tokens is {request.max_tokens}; together at most {limit} "
                f"fit, so ask for at most {limit - len(request.prompt)}",
                field="max_tokens",
            )
        self.check_tokens("prompt", request.prompt)
        if request.n > self.limits.max_queued_seqs:
            raise RequestError(
                f"n is {request.n}, and at most {self.limits.max_queued_seqs} completions may be queued", field="n"
            )

    def check_tokens(self, field: str, ids: Iterable[int]) -> None:
        """Raise RequestError for the first id that is not in this model's vocabulary; `field` holds them."""
        size = self.base.structure.vocabulary
        unknown = next((token for token in ids if not 0 <= token < size), None)
        if unknown is not None:
            raise RequestError(
                f"{field} has the token id {quote(unknown)}, and this model's vocabulary has ids from 0 to {size - 1}",
                field=field,
            )

    @property
    def busy(self) -> bool:
        """Whether there is anything to do now or soon."""
        return bool(self._arrivals or self.scheduler.running or len(self.scheduler.waiting) or self._to_abort)

    @property
    def stalled(self) -> bool:
        """Whether a step can do nothing until an adapter has been loaded, or another thread calls."""
        return not (self.scheduler.running or self._arrivals or self._to_abort)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return self.scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self.scheduler.running)

    # ---- from the engine's thread -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Make what the first requests would wait for: a GPU's graphs, seconds."""
        self.runner.warm_up()

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Do one step; returns what is new, in no order between requests."""
        began, cpu_began = time.perf_counter(), time.thread_time()
        outputs: list[RequestOutput] = []
        self.adapter_cache.collect_loaded()
        self._start_arrivals(outputs)
        self._end_aborted(outputs)
        work = self.scheduler.schedule()
        if work:
            self.counts.prompt_tokens += sum(n for s, n in work if not s.decoding)
            self.scheduler.record_step(work, self.counts.steps)
            sequences, states = self.runner.execute_model(work)
            self._sample(sequences, states, outputs)
            # This thread's own time: waiting for a processor or the interpreter is not what its tokens cost.
            self.scheduler.step_cost.observe(sum(n for _, n in work), time.thread_time() - cpu_began)
            self.counts.steps += 1
            self.counts.step_seconds += time.perf_counter() - began
        return outputs

    def generate(self, requests: Sequences[tuple[Request, Path | None]]) -> Iterator[RequestOutput]:
        """Add requests, each with the folder of its adapter, and step until all answers are complete: for a caller without
        a thread. A caller that leaves early aborts them."""
        news = threading.Event()
        before, self.wake = self.wake, news.set
        self.adapter_cache.on_loaded = news.set
        left = 0
        try:
            for request, folder in requests:
                self.add_request(request, folder)
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
            if left:
                for request, _ in requests:
                    self.abort_request(request.id)
                self.step()
            self.wake = self.adapter_cache.on_loaded = before

    def fail(self, message: str) -> list[RequestOutput]:
        """End everything that runs, after a step that went wrong; what waits goes on with a clean state."""
        outputs: list[RequestOutput] = []
        for sequence in list(self.scheduler.running):
            self._end(sequence, "error", outputs, error=message)
        self.runner.reset_prefix_cache()
        return outputs

    def close(self) -> None:
        """End the thread that loads adapters, and take them off the base."""
        self.adapter_cache.close()

    # ---- the parts of a step ----------------------------------------------------------------------------------------

    def _start_arrivals(self, outputs: list[RequestOutput]) -> None:
        """Queue the sequences of new requests."""
        while self._arrivals:
            request, folder = self._arrivals.popleft()
            try:
                sequences = self._start(request, folder)
            except Exception as error:
                # Its own fault, such as a version that was removed since it was found: the others go on.
                self.scheduler.cancel_reservation(request.tenant, request.n)
                message = str(error) if isinstance(error, GraftError) else f"{type(error).__name__}: {error}"
                outputs += [
                    RequestOutput(id=request.id, index=i, finish_reason="error", error=message)
                    for i in range(request.n)
                ]
                continue
            self._sequences_of[request.id] = sequences
            self.scheduler.add(sequences)

    def _start(self, request: Request, folder: Path | None) -> list[Sequence]:
        """The sequences that a request wants; its adapter is acquired for each of them."""
        tokenizer = request.tokenizer or self.base.tokenizer
        first = Sequence(request, 0, tokenizer, None)
        sequences = [first, *(Sequence(request, i, tokenizer, first) for i in range(1, request.n))]
        if request.adapter:
            for _ in sequences:
                self.adapter_cache.acquire(request.adapter, folder or Path())
        return sequences

    def _end_aborted(self, outputs: list[RequestOutput]) -> None:
        """End what was aborted, what is past its deadline, and what waits for an adapter that cannot be loaded."""
        aborted = bool(self._to_abort)
        while self._to_abort:
            for sequence in self._sequences_of.get(self._to_abort.popleft(), []):
                sequence.aborted = True
        now, failed_loads = time.monotonic(), self.adapter_cache.counters.failures
        if not aborted and failed_loads == self._failed_loads and now < self._last_abort_check + ABORT_CHECK_SECONDS:
            return
        self._last_abort_check, self._failed_loads = now, failed_loads
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            request = sequence.request
            if sequence.aborted:
                self._end(sequence, "cancelled", outputs)
            elif request.deadline is not None and now > request.deadline:
                self._end(sequence, "timeout", outputs)
            elif request.adapter and self.adapter_cache.error(request.adapter):
                self._end(sequence, "error", outputs, error=self.adapter_cache.error(request.adapter))

    def _sample(self, sequences: list[Sequence], states: Tensor, outputs: list[RequestOutput]) -> None:
        """The next token of each sequence whose tokens are all computed; the embedding of each that wants that."""
        rows = [i for i, s in enumerate(sequences) if s.num_uncomputed == 0 and not s.request.embed]
        for sequence in sequences:
            if sequence.request.embed and sequence.num_uncomputed == 0:
                assert sequence.hidden_sum is not None
                mean = sequence.hidden_sum / sequence.prompt_length  # (width,)
                self._end(sequence, "stop", outputs, embedding=mean.tolist())
        if not rows:
            return
        ready = [sequences[i] for i in rows]
        if len(rows) < len(sequences):
            states = states[to_device([torch.tensor(rows)], states.device)[0]]
        row_logits = logits(self.base, states, [s.adapter_slot for s in ready]).float()  # (n, V)
        for sequence, (token, logprobs) in zip(ready, sampling.sample_all(row_logits, ready)):
            self._append_token(sequence, token, logprobs, outputs)

    def _append_token(
        self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None, outputs: list[RequestOutput]
    ) -> None:
        """Add a token to a sequence, and end the sequence where its answer ends."""
        request = sequence.request
        sequence.tokens.append(token)
        self.counts.generated_tokens += 1
        if sequence.first_token is None:
            sequence.first_token = time.monotonic()
        output = RequestOutput(id=request.id, index=sequence.index, tokens=[token])
        if logprobs is not None:
            output.logprobs.append(logprobs)
        matcher = sequence.matcher
        complete = matcher is not None and matcher.accept(token)
        if matcher is not None and matcher.failure:
            output.finish_reason, output.refused = "error", True
            output.error = f"the schema cannot be followed to the end of an answer: {matcher.failure}"
        elif token in request.stop_ids:
            output.finish_reason = "stop"
        else:
            output.text = sequence.detokenizer.push(token)
            if sequence.detokenizer.stopped or complete:
                output.finish_reason = "stop"
            elif sequence.num_generated >= request.max_tokens:
                output.finish_reason = "length"
        if output.finish_reason is None:
            outputs.append(output)
        else:
            self._deliver_last(sequence, output, outputs)

    def _end(
        self, sequence: Sequence, finish_reason: FinishReason, outputs: list[RequestOutput], *, error: str = "",
        embedding: list[float] | None = None,
    ) -> None:  # fmt: skip
        """End a sequence without another token."""
        output = RequestOutput(
            id=sequence.request.id, index=sequence.index, finish_reason=finish_reason, error=error, embedding=embedding
        )
        self._deliver_last(sequence, output, outputs)

    def _deliver_last(self, sequence: Sequence, output: RequestOutput, outputs: list[RequestOutput]) -> None:
        """Deliver a sequence's last output, with its counts, and give up what it holds."""
        output.text += sequence.detokenizer.flush()
        output.prompt_tokens = sequence.prompt_length
        output.cached_tokens = sequence.cached_prompt_tokens
        output.completion_tokens = sequence.num_generated
        outputs.append(output)
        sequence.done = True
        assert output.finish_reason is not None
        self.counts.finished[output.finish_reason] = self.counts.finished.get(output.finish_reason, 0) + 1
        self.counts.prefix_cached_tokens += sequence.cached_prompt_tokens
        self.scheduler.remove(sequence)
        if sequence.request.adapter:
            self.adapter_cache.release(sequence.request.adapter)
        siblings = self._sequences_of[sequence.request.id]
        if all(s.done for s in siblings):
            del self._sequences_of[sequence.request.id]
