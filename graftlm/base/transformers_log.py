"""Keep transformers' log and progress bars off the terminal, and shorten its errors to a line."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load reports; problems are raised as errors."""
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
    """Captures transformers' load report, which it only logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""
        self._logger = logging.getLogger("transformers.modeling_utils")

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"

    @property
    def fault(self) -> str:
        """transformers' message about the first weight that could not be converted."""
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
    """Whether an error comes from the model's code (transformers, or trusted remote code) and not from Graft's."""
    inner = ""
    trace = error.__traceback__
    while trace is not None:
        room = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        inner = room if room in ("graftlm", "transformers", "transformers_modules") else inner
        trace = trace.tb_next
    return inner in ("transformers", "transformers_modules")
