"""One measured point of training: random weights in a model's real shape, examples of one length, Graft's own loop.

    base = base_of(LLAMA["7b"], "nf4", device)
    with PeakMemory(base.device) as memory:
        found = train_steps(base, Point(model="7b", method="qlora", sequence=2048, batch=4))

Every token but the first of an example is a target token, so the head costs its maximum. A batch is one micro-batch.
`in_process` runs a function in a process of its own, with a limit on its time; `scaling.py` and `ladder.py` differ in
which points they take and what they make of them.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train import SHAPES
from transformers import LlamaConfig

from graftlm import demo
from graftlm.base.loading import Base, load_tokenizer, random_base
from graftlm.config import Method, Precision, TrainConfig
from graftlm.data.dataset import Dataset, DatasetPart, Example, make_example
from graftlm.planning.models import built_in
from graftlm.training.run import make_adapter, make_trial
from graftlm.training.sanity_checks import STEPS as WATCHED
from graftlm.training.trainer import StepResult, TrainerCallback, train
from graftlm.training.trial import Evaluation, Trial

_HEAVY = ("graftlm.training.run", "graftlm.planning.models", "transformers.models.llama.modeling_llama")
STORED: dict[Method, Precision] = {"full": "bfloat16", "lora": "bfloat16", "qlora": "nf4"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """The model and options of a point."""

    model: str
    method: Method
    sequence: int
    """Tokens of an example."""
    batch: int
    """Examples of an optimizer step."""
    precision: Precision | None = None
    """How the base is stored; the method's own when left out: nf4 for qlora, else bfloat16."""
    checkpointing: bool = False
    rank: int = 16
    side: str = "graft"
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further options of `graft train`: the memory ladder's."""

    @property
    def stored(self) -> Precision:
        return self.precision or STORED[self.method]

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.sequence * self.batch

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "precision": self.stored, "tokens_per_step": self.tokens}


def llama(model: str, **changes: Any) -> LlamaConfig:
    """The config of `tiny`, of a shape of `train.py` (`30m`, `135m`), or of Llama 2: `7b`, `13b`, `70b`."""
    values: dict[str, Any] = (
        {**SHAPES[model], "tie_word_embeddings": True} if model in SHAPES else built_in()[f"llama-2-{model}"]
    )
    known = {name: value for name, value in values.items() if name not in ("hub", "model_type")}
    made: dict[str, Any] = {**known, "max_position_embeddings": 4096, **changes}
    return LlamaConfig(**made)


def base_of(config: LlamaConfig, precision: Precision, device: str) -> Base:
    """A base of random weights; the tokenizer is the bundled one, of which nothing is used."""
    tokenizer = load_tokenizer(Path(demo.resolve_model("demo")))
    return random_base(config, tokenizer, precision=precision, device=device, training=True)


def examples(count: int, length: int, vocabulary: int) -> Dataset:
    """`count` different examples of `length` random tokens, all of them trained."""
    generator = np.random.default_rng(0)
    loss_mask = np.ones(length, dtype=np.bool_)
    rows: list[Example] = []
    for i in range(count):
        rows.append(make_example(f"random:{i}", generator.integers(3, vocabulary, length).astype(np.int32), loss_mask))
    return Dataset((DatasetPart("random", 1.0, tuple(rows)),), {})


class Clock(TrainerCallback):
    """Hears the loop: when each step ended, the device's work included, and when to stop."""

    def __init__(self, device: torch.device, deadline: float) -> None:
        self.device, self.deadline = device, deadline
        self.ends: list[float] = [time.perf_counter()]
        self.losses: list[float] = []

    def on_step_end(self, trial: Trial, result: StepResult) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())
        self.losses.append(result.loss)

    def on_evaluate(self, trial: Trial, evaluation: Evaluation, best: bool) -> None: ...

    def on_iteration_end(self, trials: Sequence[Trial]) -> bool:
        return time.perf_counter() < self.deadline


def train_steps(
    base: Base, point: Point, steps: int = 3, warm_up: int = WATCHED, seconds: float = 1e9
) -> dict[str, Any]:
    """Train `warm_up` steps that do not count and `steps` that do, or fewer when `seconds` have passed.

    The loop watches its first three steps, and a GPU compiles its kernels in them. Returns seconds a step (median), tokens
    a second and losses. Raises what training raises, torch.OutOfMemoryError among it.
    """
    config = TrainConfig.build(
        {
            "model": point.model, "data": ["random"], "out": "random", "method": point.method, "base_precision": point.stored,
            "steps": warm_up + steps, "batch_size": point.batch, "lr_scheduler": "constant", "warmup_ratio": 0.0,
            "activation_checkpointing": point.checkpointing, **point.options,
            **({} if point.method == "full" else {"rank": point.rank}),
        }
    )  # fmt: skip
    adapter = make_adapter(base, config)
    trial = make_trial(
        base,
        config,
        adapter,
        0 if adapter is None else 1,
        examples(point.batch, point.sequence, base.structure.vocabulary),
        None,
    )
    base.structure.checkpoint_layers(config.activation_checkpointing)
    clock = Clock(base.device, time.perf_counter() + seconds)
    train(base, [trial], point.tokens, clock)
    return {**rates(clock.ends, warm_up, point.tokens), "losses": clock.losses}


def rates(ends: Sequence[float], warm_up: int, tokens: int) -> dict[str, Any]:
    """Seconds a step and tokens a second from when steps ended; the first entry is the start, the last step counts anyway."""
    each = [after - before for before, after in pairwise(ends)]
    counted = each[warm_up:] or each[-1:]
    seconds = statistics.median(counted)
    return {"seconds_per_step": seconds, "tokens_per_second": tokens / seconds, "timed_steps": len(counted)}


# ---- in a process of its own -----------------------------------------------------------------------------------------


def in_process(
    work: Callable[..., Iterator[Any]], arguments: Sequence[Any], seconds: float, start: str
) -> Iterator[Any]:
    """What the generator `work(*arguments)` yields in another process, which is ended after `seconds`.

    `start` is multiprocessing's: `forkserver` gives a fresh process without importing everything again, `spawn` is for GPUs.
    Raises TimeoutError, and RuntimeError when the process ended by itself before its time.
    """
    context: Any = multiprocessing.get_context(start)  # its stub knows no Process
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(there, work, tuple(arguments), torch.get_num_threads()), daemon=True)
    deadline = time.monotonic() + seconds
    if start == "forkserver":
        context.set_forkserver_preload(list(_HEAVY))
        with _one_thread():
            child.start()
    else:
        child.start()
    there.close()
    try:
        while True:
            if not here.poll(max(0.0, min(deadline - time.monotonic(), 1e6))):
                raise TimeoutError(f"not done after {seconds:.0f} s")
            try:
                kind, value = here.recv()
            except EOFError:
                child.join(10)
                raise RuntimeError(f"its process ended with status {child.exitcode}") from None
            if kind == "done":
                return
            if kind == "failed":
                raise RuntimeError(value)
            yield value
    finally:
        here.close()
        if child.is_alive():
            child.terminate()
        child.join(10)
        if child.is_alive():
            child.kill()


@contextmanager
def _one_thread() -> Iterator[None]:
    """For the server that forks: GNU's OpenMP hangs in a forked process whose parent has run on several threads."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _answer(pipe: Connection, work: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        for value in work(*arguments):
            pipe.send(("value", value))
        pipe.send(("done", None))
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"))
