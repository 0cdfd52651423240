"""The child of `experiments/subprocess_run.py`: reads a config and trains, or reads a request and scores.

    python -m graftlm.commands.subprocess_main train < config.json

Events go to standard output, one JSON object a line; what libraries print goes to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Literal, TextIO

from graftlm.config import TrainConfig
from graftlm.errors import GraftError, Stopped
from graftlm.experiments.compare import scoring
from graftlm.jsonfile import parse_json

Answer = Callable[..., None]


def main(source: TextIO, answers: TextIO, task: Literal["train", "score"] = "train") -> None:
    """Do the task that `source` holds as JSON; its events, its result or the error that ended it go to `answers`."""

    def answer(**event: Any) -> None:
        answers.write(json.dumps(event) + "\n")
        answers.flush()

    try:
        values = parse_json(source.read())
        if task == "train":
            answer(event="done", summary=_train(TrainConfig.build(values), answer))
        else:
            scoring.measure(scoring.read_request(values), lambda out: answer(event="scored", out=out))
            answer(event="done", summary={})
    except Stopped as stopped:
        answer(event="stopped", signal=stopped.signal_number, message=str(stopped))
    except GraftError as error:
        answer(event="error", kind=type(error).__name__, message=str(error))


def _train(config: TrainConfig, answer: Answer) -> dict[str, Any]:
    from rich.console import Console

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
    sys.stdout = sys.stderr  # whatever a library prints must not get between the events
    main(sys.stdin, channel, "train" if sys.argv[1] == "train" else "score")
