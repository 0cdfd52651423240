"""Task scores of answers against references, in percent: exact match, BLEU, ROUGE-L.

    exact-match   share of answers that equal a reference after spaces are made one and letters small
    bleu          of all answers together, `sacrebleu` with its defaults (Post 2018), several references where there are
    rouge-l       mean over answers of the F measure of the longest common subsequence, `rouge-score` with stemming (Lin
                  2004), the best of several references

Every prompt is answered once and scored against all the references that the eval rows have for it. A metric that says
nothing about such answers is refused before anything is trained: BLEU counts runs of four words, exact match of a long
text is always nought.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest

from graftlm.config.compare import Metric
from graftlm.errors import ConfigError

FEWEST_PROMPTS = 10
_SHORT, _LONG = 4, 30  # words of a median reference: below, BLEU has no run of four; above, nothing matches exactly
_PACKAGES = {"bleu": "sacrebleu", "rouge-l": "rouge_score"}


@dataclass(frozen=True)
class EvalPrompt:
    """A eval prompt as the model reads it, and every answer that the data have for it."""

    row: str
    prompt: tuple[int, ...]
    references: tuple[str, ...]


def check_metric(metric: Metric) -> None:
    """Raise ConfigError with the install command where the metric's package is missing; imports nothing."""
    package = _PACKAGES.get(metric)
    if package is not None and find_spec(package) is None:
        raise ConfigError(f"--metric {metric} needs a package that is not there: pip install 'graftlm[compare]'")


def check_fits(metric: Metric, questions: Sequence[EvalPrompt], rows: int) -> None:
    """Raise ConfigError where `metric` says nothing about answers like these; `rows` are the eval rows in all."""
    if not questions:
        raise ConfigError(
            f"--metric {metric} compares answers to prompts, and none of the {rows} eval rows has a prompt (they are "
            "plain texts); leave --metric out, or give rows of prompt and completion, or messages"
        )
    if len(questions) < FEWEST_PROMPTS:
        raise ConfigError(
            f"--metric {metric} needs at least {FEWEST_PROMPTS} different eval prompts, found {len(questions)}; "
            "give more rows with --eval-data, or leave --metric out"
        )
    words = statistics.median(len(r.split()) for q in questions for r in q.references)
    if metric == "bleu" and words < _SHORT:
        raise ConfigError(
            f"--metric bleu counts runs of {_SHORT} words, and half of the eval answers have at most {words:g}; take "
            "--metric exact-match"
        )
    if metric == "exact-match" and words > _LONG:
        raise ConfigError(
            f"--metric exact-match is for short answers, and half of the eval ones have at least {words:g}; take "
            "--metric rouge-l or bleu"
        )


def score(metric: Metric, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """How good `answers` are, 0 to 100; `references` holds at least one for each answer."""
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


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
