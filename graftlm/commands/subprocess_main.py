"""The child of `experiments/subprocess_run.py`: reads a config and trains, or reads a request and scores, or joins a sweep.

    python -m graftlm.commands.subprocess_main train 1 < config.json

The number is that of the processes that share a processor, its threads and memory: 1 on a GPU. Events go to standard output,
one JSON object a line; what libraries print goes to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TextIO, get_args

from graftlm.config import SweepConfig, TrainConfig
from graftlm.distributed.group import Ranks
from graftlm.errors import GraftError, Stopped
from graftlm.experiments.compare import scoring
from graftlm.jsonfile import parse_json

if TYPE_CHECKING:
    from graftlm.experiments.sweep.study import ClaimedTrial
    from graftlm.training.trainer import StepResult
    from graftlm.training.trial import Trial

Answer = Callable[..., None]
Task = Literal["train", "score", "sweep"]


def main(source: TextIO, answers: TextIO, task: Task = "train", sharing: int = 1) -> None:
    """Do the task that `source` holds as JSON; its events, its result or the error that ended it go to `answers`."""

    def answer(**event: Any) -> None:
        answers.write(json.dumps(event) + "\n")
        answers.flush()

    place = Ranks(on_machine=sharing)
    if sharing > 1:
        place.take_threads()
    try:
        values = parse_json(source.read())
        summary: dict[str, Any] = {}
        if task == "train":
            summary = _train(TrainConfig.build(values), answer, place)
        elif task == "score":
            scoring.measure(scoring.read_request(values), lambda out: answer(event="scored", out=out))
        else:
            _sweep(SweepConfig.build(values), answer)
        answer(event="done", summary=summary)
    except Stopped as stopped:
        answer(event="stopped", signal=stopped.signal_number, message=str(stopped))
    except GraftError as error:
        answer(event="error", kind=type(error).__name__, message=str(error))


def _train(config: TrainConfig, answer: Answer, place: Ranks) -> dict[str, Any]:
    from rich.console import Console

    from graftlm.commands.train import train
    from graftlm.training.view import View

    class AnsweringView(View):
        def note(self, text: str) -> None:
            answer(event="note", text=text)

        def on_step_end(self, trial: Trial, result: StepResult) -> None:
            answer(event="step", step=result.step, steps=trial.sampler.steps, loss=result.loss, tokens=result.tokens)

    return train(config, AnsweringView(Console(quiet=True)), ranks=place)


def _sweep(config: SweepConfig, answer: Answer) -> None:
    from rich.console import Console

    from graftlm.commands.sweep import search
    from graftlm.experiments.sweep.view import SweepView

    class AnsweringSweepView(SweepView):
        def note(self, text: str) -> None:
            answer(event="note", text=text)

        def fact(self, label: str, text: str) -> None:
            answer(event="fact", label=label, text=text)

        @contextmanager
        def sweeping(self, trials: int, ended: int) -> Iterator[None]:
            answer(event="trials", trials=trials, ended=ended)
            yield

        def on_step_end(self, trial: Trial, result: StepResult) -> None:
            answer(event="trial", name=trial.name, step=trial.step, steps=trial.sampler.steps, loss=result.loss)

        def ended(self, claim: ClaimedTrial, trial: Trial) -> None:
            super().ended(claim, trial)
            answer(event="trial-ended", name=trial.name)

    search(config, AnsweringSweepView(Console(quiet=True)))


if __name__ == "__main__":
    channel = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not get between the events
    main(sys.stdin, channel, next(task for task in get_args(Task) if task == sys.argv[1]), int(sys.argv[2]))
