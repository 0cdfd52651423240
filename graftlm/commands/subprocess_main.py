"""The child process of `experiments/subprocess_run.py`: reads a config and trains, or reads a request and scores; answers.

`experiments/` may not import commands, so the parent knows this module by its name alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console

from graftlm.config import TrainConfig
from graftlm.errors import GraftError, Stopped
from graftlm.experiments.compare import scoring
from graftlm.jsonfile import parse_json


def main(source: TextIO, answers: TextIO, task: str = "train") -> None:
    """Read a config and train, or read a request and score; answer as `experiments/subprocess_run.py` says."""

    def answer(**event: Any) -> None:
        answers.write(json.dumps(event) + "\n")
        answers.flush()

    try:
        if task == "train":
            answer(event="done", summary=_train(TrainConfig.build(parse_json(source.read())), answer))
        else:
            scoring.measure(
                scoring.read_request(parse_json(source.read())), lambda out: answer(event="scored", out=out)
            )
            answer(event="done", summary={})
    except Stopped as stopped:
        answer(event="stopped", signal=stopped.signal_number, message=str(stopped))
    except GraftError as error:
        answer(event="error", kind=type(error).__name__, message=str(error))


def _train(config: TrainConfig, answer: Callable[..., None]) -> dict[str, Any]:
    from graftlm.commands.train import train
    from graftlm.training.trainer import StepResult
    from graftlm.training.trial import Trial
    from graftlm.training.view import View

    class AnsweringView(View):
        def note(self, text: str) -> None:
            answer(event="note", text=text)

        def on_step_end(self, trial: Trial, result: StepResult) -> None:
            answer(event="step", step=result.step, steps=trial.sampler.steps, loss=result.loss, tokens=result.tokens)

    return train(config, AnsweringView(Console(quiet=True)))


if __name__ == "__main__":
    channel = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not get between the answers
    main(sys.stdin, channel, sys.argv[1])
