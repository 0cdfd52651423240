"""Task scores are those of the libraries, with all references, and a metric that says nothing is refused."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from rouge_score import rouge_scorer

from graftlm.errors import ConfigError, ScoreError
from graftlm.scores import METRICS, check_fits, check_package, find_score, named_after, score

ANSWERS = ["the cat sat on the mat today", "a dog runs in the park now", "it rains"]
REFERENCES = [
    ("The cat  sat on the mat today", "a cat was on the mat"),
    ("the dog ran in a park", "a dog runs in the park, now"),
    ("it rains", "rain falls", "wet"),
]


def prompts(*references: str, count: int = 12) -> list[tuple[str, ...]]:
    return [references] * count


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
    check_fits("exact-match", prompts("yes"), 12, option="metric")
    check_fits("bleu", prompts("a sentence of five words"), 12, option="metric")
    with pytest.raises(ConfigError, match=r"counts runs of 4 words.*at most 1; take --metric exact-match"):
        check_fits("bleu", prompts("yes"), 12, option="metric")
    with pytest.raises(ConfigError, match=r"short answers.*at least 40; take --metric rouge-l or bleu"):
        check_fits("exact-match", prompts("word " * 40), 12, option="metric")


def test_plain_texts_have_no_answers_to_score() -> None:
    with pytest.raises(ConfigError, match="none of the 31 eval rows has a prompt"):
        check_fits("rouge-l", [], 31, option="metric")


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 10 different eval prompts, found 4"):
        check_fits("rouge-l", prompts("some words here", count=4), 200, option="metric")


def test_a_missing_package_is_named_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftlm.scores.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--metric bleu needs a package.*pip install 'graftlm\[compare\]'"):
        check_package("bleu", "metric")
    check_package("exact-match", "metric")


def test_asking_whether_a_package_is_there_imports_nothing() -> None:
    before = set(sys.modules)
    check_package("rouge-l", "score")
    assert not {name for name in set(sys.modules) - before if name.startswith(("rouge", "nltk"))}


def test_what_a_model_thought_is_no_part_of_its_answer() -> None:
    thought = [f"<think>\nperhaps {a}?\n</think>\n\n{a}" for a in ANSWERS]
    for metric in METRICS:
        assert score(metric, thought, REFERENCES) == pytest.approx(score(metric, ANSWERS, REFERENCES))


# ---- functions of one's own ------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a command runs in, with a file of scores."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words_of_it.py").write_text("def count(text):\n    return len(text.split())\n")
    (tmp_path / "mine.py").write_text(
        "import words_of_it\n\n\n"
        "def length(answers, references):\n"
        "    assert len(answers) == len(references)\n"
        "    return sum(words_of_it.count(a) - words_of_it.count(r) for a, r in zip(answers, references))\n\n\n"
        "def wrong(answers, references):\n    return answers[0][99]\n\n\n"
        "NUMBER = 3\n"
    )
    return tmp_path


@pytest.mark.parametrize("name", ["mine.py:length", "./mine.py:length", "{here}/mine.py:length", "mine:length"])
def test_a_function_of_a_file_or_a_module_scores_each_answer_beside_each_of_its_references(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list(sys.path)
    for module in ("mine", "words_of_it"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    found = find_score(name.format(here=here))
    assert found(["a b c", " d "], [("x", "y z"), ("v w",)]) == (3 - 1) + (3 - 2) + (1 - 2)
    assert found.key == "eval_length"
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mien.py:length", r"--score mien.py:length: there is no file mien.py, did you mean 'mine.py'\?"),
        ("mine.py:lenght", r"mine.py has no function 'lenght', did you mean 'length'\?; it has length, wrong"),
        ("mine.py:NUMBER", r"'NUMBER' in mine.py is a int, no function"),
        ("nowhere_at_all.mine:f", r"no module 'nowhere_at_all' here or among the installed packages; give a file"),
        ("broken.py:f", r"broken.py cannot be imported: ZeroDivisionError: .*broken.py:2\)"),
        ("lacking.py:f", r"lacking.py cannot be imported: ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("syntax.py:f", r"syntax.py cannot be imported: SyntaxError"),
        ("other.txt/:f", r"there is no file other.txt"),
    ],
)
def test_a_function_that_is_not_there_is_refused_by_name(name: str, message: str, here: Path) -> None:
    (here / "broken.py").write_text("a = 0\nb = 1 / a\n")
    (here / "lacking.py").write_text("import not_there_at_all\n")
    (here / "syntax.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match=message):
        find_score(name)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(2, 2.0), (0.25, 0.25), (np.float32(0.5), 0.5), (torch.tensor(3), 3.0), (np.array([4.0]), 4.0)],
)
def test_any_number_is_a_score(value: Any, expected: float) -> None:
    assert find_score("x:f", lambda answers, references: value)(["a"], [("b",)]) == expected


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "None (NoneType)"), ("0.5", "'0.5' (str)"), (True, "True (bool)"), ([0.5], "[0.5] (list)"),
     (math.nan, "nan"), (math.inf, "inf"), (np.array([1.0, 2.0]), "array([1., 2.]) (ndarray)")],
)  # fmt: skip
def test_what_is_no_number_is_named_with_the_function_and_its_file(value: Any, shown: str) -> None:
    def mine(answers: list[str], references: list[str]) -> Any:
        return value

    with pytest.raises(ScoreError) as error:
        find_score(named_after(mine), mine)(["a", "b"], [("c",), ("d",)])
    said = str(error.value)
    assert f"returned {shown} for 2 answers; it must return one finite number" in said
    assert "mine'" in said
    assert f"in {__file__}" in said


def test_a_function_that_raises_is_named_with_the_line(here: Path) -> None:
    with pytest.raises(
        ScoreError,
        match=r"'mine.py:wrong' in .*mine.py raised IndexError: .* \(.*mine.py:10\); it is called with 1 ans",
    ):
        find_score("mine.py:wrong")(["a"], [("b",)])


def test_metrics_are_called_as_other_programs_call_them() -> None:
    assert [find_score(name).key for name in METRICS] == ["eval_exact_match", "eval_bleu", "eval_rouge_l"]
    assert find_score("x:<lambda>", lambda a, r: 0).key == "eval_lambda"
