"""What transformers says: its log and its bars kept off the terminal, its errors in a line."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' own bars and load reports stay off the user's terminal; what matters is raised as an error."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.utils.logging.enable_progress_bar()


class LoadReport(logging.Handler):
    """Keeps what transformers reports about a load, which it says in its log only, off the user's terminal."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""
        self._logger = logging.getLogger("transformers.modeling_utils")

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"

    @property
    def fault(self) -> str:
        """What went wrong with the first weight that could not be put together, in transformers' own words."""
        return next((line for line in self.text.splitlines() if line.startswith("Error: ")), "").removeprefix("Error: ")

    def __enter__(self) -> None:
        self._before = (self._logger.level, self._logger.propagate)
        self._logger.setLevel(logging.WARNING)
        self._logger.propagate = False
        self._logger.addHandler(self)

    def __exit__(self, *error: object) -> None:
        self._logger.removeHandler(self)
        level, self._logger.propagate = self._before
        self._logger.setLevel(level)


def first_line(error: Any) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def fails_in_the_model(error: BaseException) -> bool:
    """Whether an error comes from a model's own code, transformers' or trusted remote code, and not from ours below it."""
    inner = ""
    trace = error.__traceback__
    while trace is not None:
        room = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        inner = room if room in ("graftlm", "transformers", "transformers_modules") else inner
        trace = trace.tb_next
    return inner in ("transformers", "transformers_modules")
