"""Scores of answers against references: exact match, BLEU, ROUGE-L, and functions of the user. Higher is better.

    exact-match       share of answers that equal a reference, whatever their case and spaces, in percent
    bleu              of all answers together, `sacrebleu` with its defaults (Post 2018), several references where there are,
                      0 to 100
    rouge-l           mean over answers of the F measure of the longest common subsequence, `rouge-score` with stemming (Lin
                      2004), the best of several references, in percent
    my_score.py:f     f(answers, references) -> a number, both lists of texts of equal length; also package.module:f

`graft train --score` takes any of them, `graft compare --metric` the first three. Reasoning, up to `</think>`, is no part of an
answer. A score that says nothing about the answers is refused before anything is trained: BLEU counts runs of four words, and
exact match of long texts is always 0.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

from graftlm.config.fields import Metric
from graftlm.errors import ConfigError, ScoreError, nearest

ScoreFunction = Callable[[list[str], list[str]], Any]
"""(answers, references) -> a number, higher is better; both lists have one text for each prompt."""

METRICS: tuple[Metric, ...] = get_args(Metric)
FEWEST_PROMPTS = 10
_SHORT, _LONG = 4, 30  # words of a median reference: below, BLEU has no run of four; above, nothing matches exactly
_PACKAGES = {"bleu": "sacrebleu", "rouge-l": "rouge_score"}
_SHOWN = 200  # characters of an error or a value in a message


@dataclass(frozen=True)
class Score:
    """One way of scoring, by its name."""

    name: str
    """As in the option: `exact-match`, `my_score.py:f`."""
    function: ScoreFunction | None = None
    """None for one of `METRICS`."""

    @property
    def key(self) -> str:
        """Its name in metrics: `eval_exact_match`; for a function of the user `eval_` and the function's name."""
        name = self.name.rpartition(":")[2].rpartition(".")[2]
        return "eval_" + "".join(c if c.isalnum() else "_" for c in name).strip("_")

    def __call__(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """How good `answers` are; `references` holds at least one for each of them.

        A function of the user gets an answer with several references once for each of them. Raises
        ScoreError for a function that raises, or returns no finite number.
        """
        if self.function is None:
            return score(_metric(self.name), answers, references)
        pairs = [(plain_answer(answer), r) for answer, known in zip(answers, references, strict=True) for r in known]
        try:
            value = self.function([answer for answer, _ in pairs], [reference for _, reference in pairs])
        except Exception as error:
            raise ScoreError(
                f"the score {self._place} raised {type(error).__name__}: {str(error)[:_SHOWN]}{_line_of(error)}; it is called "
                f"with {len(pairs)} answers and as many references, both lists of texts, and answers may be anything"
            ) from error
        found = _number(value)
        if found is None or not math.isfinite(found):
            kind = "" if found is not None else f" ({type(value).__name__})"
            raise ScoreError(
                f"the score {self._place} returned {value!r:.{_SHOWN}}{kind} for {len(pairs)} answers; it must return "
                "one finite number, higher for better answers"
            )
        return found

    @property
    def _place(self) -> str:
        try:
            file = inspect.getsourcefile(self.function) if self.function is not None else None
        except TypeError:  # one that is not written in Python
            file = None
        return f"'{self.name}'" + (f" in {file}" if file and file not in self.name else "")


def find_score(name: str, function: ScoreFunction | None = None) -> Score:
    """The score of that name, or `function` under that name. Raises ConfigError if it cannot be used.

    `FILE.py:FUNCTION` is a file, relative to the working directory; `package.module:FUNCTION` is imported, from the working
    directory first.
    """
    if function is not None:
        if not callable(function):
            raise ConfigError(f"score is a name or a function of (answers, references), found {function!r:.80}")
        return Score(name, function)
    if name in METRICS:
        check_package(_metric(name), "score")
        return Score(name)
    module, _, wanted = name.rpartition(":")
    loaded = _file(name, Path(module)) if is_file(module) else _module(name, module)
    found: Any = loaded
    for part in wanted.split("."):
        if not hasattr(found, part):
            known = [n for n, value in vars(found).items() if inspect.isfunction(value) and not n.startswith("_")]
            has = f"; it has {', '.join(known[:8])}" if known else "; it defines no function"
            raise ConfigError(f"--score {name}: {module} has no function '{part}'{nearest(part, known)}{has}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"--score {name}: '{wanted}' in {module} is a {type(found).__name__}, no function")
    return Score(name, found)


def named_after(function: Any) -> str:
    """The name of a function, as `find_score` would find it: `package.module:function`."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', None) or '__main__'}:{name}"


def is_file(module: str) -> bool:
    """Whether the part of a score before the colon is a file, not a module."""
    return module.endswith(".py") or "/" in module


def _metric(name: str) -> Metric:
    return next(metric for metric in METRICS if metric == name)


def _file(name: str, path: Path) -> Any:
    if not path.is_file():
        near = ""
        if path.parent.is_dir():
            near = nearest(path.name, (inner.name for inner in path.parent.iterdir() if inner.suffix == ".py"))
        raise ConfigError(f"--score {name}: there is no file {path}{near}")
    spec = importlib.util.spec_from_file_location(f"graft_score_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--score {name}: {path} is no Python file; give one that ends in .py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[loaded.__name__] = loaded
    with _imports_from(path.parent):
        try:
            spec.loader.exec_module(loaded)
        except Exception as error:
            raise _not_run(name, str(path), error) from error
    return loaded


def _module(name: str, module: str) -> Any:
    with _imports_from(Path()):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
                raise ConfigError(
                    f"--score {name}: there is no module '{error.name}' here or among the installed packages; give a file, "
                    "such as my_score.py:FUNCTION"
                ) from None
            raise _not_run(name, module, error) from error
        except Exception as error:
            raise _not_run(name, module, error) from error


def _not_run(name: str, place: str, error: Exception) -> ConfigError:
    what = f"{type(error).__name__}: {str(error)[:_SHOWN]}"
    return ConfigError(f"--score {name}: {place} cannot be imported: {what}{_line_of(error)}")


@contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    """Put a folder first on the import path, as Python does for the script that it runs."""
    before = list(sys.path)
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path[:] = before


def _line_of(error: BaseException) -> str:
    """The file and line of an error in the user's code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    frames = [frame for frame in frames if "importlib" not in frame.filename]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _number(value: Any) -> float | None:
    """A Python number, or the one in an array or tensor; None for anything else."""
    if hasattr(value, "item"):  # NumPy's and torch's
        try:
            value = value.item()
        except (TypeError, ValueError, RuntimeError):
            return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# ---- standard metrics ------------------------------------------------------------------------------------------------


def check_package(metric: Metric, option: str) -> None:
    """Raise ConfigError with the install command where a metric's package is missing; imports nothing."""
    package = _PACKAGES.get(metric)
    if package is not None and find_spec(package) is None:
        raise ConfigError(f"--{option} {metric} needs a package that is not there: pip install 'graftlm[compare]'")


def check_fits(
    metric: str, references: Sequence[Sequence[str]], rows: int, *, option: str, fewest: int = FEWEST_PROMPTS
) -> None:
    """Raise ConfigError where a metric says nothing about answers like these.

    `references` are those of each prompt, `rows` is the number of eval rows, `option` the option that named the metric; fewer
    prompts than `fewest` are refused.
    """
    if not references:
        raise ConfigError(
            f"--{option} {metric} compares answers to prompts, and none of the {rows} eval rows has a prompt (they are "
            f"plain texts); leave --{option} out, or give rows of prompt and completion, or messages"
        )
    if len(references) < fewest:
        raise ConfigError(
            f"--{option} {metric} needs at least {fewest} different eval prompts, found {len(references)}; "
            f"give more rows with --eval-data, or leave --{option} out"
        )
    words = statistics.median(len(r.split()) for known in references for r in known)
    if metric == "bleu" and words < _SHORT:
        raise ConfigError(
            f"--{option} bleu counts runs of {_SHORT} words, and half of the eval answers have at most {words:g}; take "
            f"--{option} exact-match"
        )
    if metric == "exact-match" and words > _LONG:
        raise ConfigError(
            f"--{option} exact-match is for short answers, and half of the eval ones have at least {words:g}; take "
            f"--{option} rouge-l or bleu"
        )


def score(metric: Metric, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """How good `answers` are, 0 to 100; `references` holds at least one for each answer."""
    answers = [plain_answer(answer) for answer in answers]
    match metric:
        case "exact-match":
            return 100 * statistics.fmean(
                any(_plain(answer) == _plain(r) for r in known)
                for answer, known in zip(answers, references, strict=True)
            )
        case "bleu":
            from sacrebleu.metrics.bleu import BLEU

            # One stream for the first references, one for the second ...; None where a prompt has no more.
            streams = [list(stream) for stream in zip_longest(*references)]
            return float(BLEU().corpus_score(list(answers), streams).score)
        case "rouge-l":
            from rouge_score.rouge_scorer import RougeScorer

            scorer = RougeScorer(["rougeL"], use_stemmer=True)
            found = [
                max(float(scorer.score(r, answer)["rougeL"].fmeasure) for r in known)
                for answer, known in zip(answers, references, strict=True)
            ]
            return 100 * statistics.fmean(found)


def plain_answer(text: str) -> str:
    """An answer without the reasoning before it and the space around it."""
    return text.rpartition("</think>")[2].strip()


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


__all__ = [
    "FEWEST_PROMPTS",
    "METRICS",
    "Score",
    "ScoreFunction",
    "check_fits",
    "check_package",
    "find_score",
    "is_file",
    "named_after",
    "plain_answer",
    "score",
]
