"""Task scores are those of the libraries, with all references, and a metric that says nothing is refused."""

from __future__ import annotations

import sys

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from graftlm.errors import ConfigError
from graftlm.experiments.metrics import EvalPrompt, check_fits, check_metric, score

ANSWERS = ["the cat sat on the mat today", "a dog runs in the park now", "it rains"]
REFERENCES = [
    ("The cat  sat on the mat today", "a cat was on the mat"),
    ("the dog ran in a park", "a dog runs in the park, now"),
    ("it rains", "rain falls", "wet"),
]


def prompts(*references: str, count: int = 12) -> list[EvalPrompt]:
    return [EvalPrompt(f"x:{i}", (i,), references) for i in range(count)]


def test_exact_match_takes_any_reference_and_minds_neither_case_nor_spaces() -> None:
    assert score("exact-match", ANSWERS, REFERENCES) == pytest.approx(100 * 2 / 3)
    assert score("exact-match", ["a b."], [["a b"]]) == 0


def test_bleu_is_sacrebleus_with_every_reference() -> None:
    streams = [[r[0] for r in REFERENCES], [r[1] for r in REFERENCES], [None, None, REFERENCES[2][2]]]
    assert score("bleu", ANSWERS, REFERENCES) == sacrebleu.corpus_bleu(ANSWERS, streams).score  # type: ignore[arg-type]
    single = [(r[0],) for r in REFERENCES]
    expected = sacrebleu.corpus_bleu(ANSWERS, [[r[0] for r in single]]).score
    assert score("bleu", ANSWERS, single) == expected
    assert score("bleu", ANSWERS, REFERENCES) != expected


def test_rouge_l_is_rouge_scores_for_the_best_reference() -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    best = [max(scorer.score(r, a)["rougeL"].fmeasure for r in known) for a, known in zip(ANSWERS, REFERENCES)]
    assert score("rouge-l", ANSWERS, REFERENCES) == pytest.approx(100 * sum(best) / 3)


def test_a_metric_that_does_not_fit_the_answers_is_refused_with_one_that_does() -> None:
    check_fits("exact-match", prompts("yes"), 12)
    check_fits("bleu", prompts("a sentence of five words"), 12)
    with pytest.raises(ConfigError, match=r"counts runs of 4 words.*at most 1; take --metric exact-match"):
        check_fits("bleu", prompts("yes"), 12)
    with pytest.raises(ConfigError, match=r"short answers.*at least 40; take --metric rouge-l or bleu"):
        check_fits("exact-match", prompts("word " * 40), 12)


def test_plain_texts_have_no_answers_to_score() -> None:
    with pytest.raises(ConfigError, match="none of the 31 eval rows has a prompt"):
        check_fits("rouge-l", [], 31)


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 10 different eval prompts, found 4"):
        check_fits("rouge-l", prompts("some words here", count=4), 200)


def test_a_missing_package_is_named_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftlm.experiments.metrics.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--metric bleu needs a package.*pip install 'graftlm\[compare\]'"):
        check_metric("bleu")
    check_metric("exact-match")


def test_asking_whether_a_package_is_there_imports_nothing() -> None:
    before = set(sys.modules)
    check_metric("rouge-l")
    assert not {name for name in set(sys.modules) - before if name.startswith(("rouge", "nltk"))}
