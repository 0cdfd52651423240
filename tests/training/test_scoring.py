"""Answers are scored while training: what is logged, which step is the best, and that the run is the same without."""

from __future__ import annotations

import json
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from rich.console import Console
from test_resume import manifest_again, stop_after  # noqa: F401  # a fixture
from tiny_run import adapter_bytes, lines, options, without

from graftlm.adapters import peft_format
from graftlm.adapters.attach import attach
from graftlm.base.chat import Encoder
from graftlm.base.loading import load_base
from graftlm.commands.train import Given
from graftlm.commands.train import train as command
from graftlm.config import CompareConfig, SweepConfig, TrainConfig
from graftlm.errors import ConfigError, RunError, ScoreError, Stopped
from graftlm.scores import ScoreFunction, score
from graftlm.serving.engine.generate import complete_all
from graftlm.training.view import View

SCORED: dict[str, Any] = {"score": "exact-match", "score_prompts": 3, "score_max_tokens": 6}


def train(place: Path, function: ScoreFunction | None = None, **changes: Any) -> dict[str, Any]:
    return heard(place, function, **changes)[0]


def heard(place: Path, function: ScoreFunction | None = None, **changes: Any) -> tuple[dict[str, Any], str]:
    text = StringIO()
    asked = {name: value for name, value in options(place, **changes).items() if value is not None}
    given = Given() if function is None else Given(score=function)
    return command(TrainConfig.build(asked), View(Console(file=text, width=100)), given), text.getvalue()


def evals(out: Path) -> list[dict[str, Any]]:
    return [line for line in lines(out / "metrics.jsonl") if line["kind"] == "eval"]


def scripted(values: Iterable[float]) -> ScoreFunction:
    """A score that rises and falls as it is told, once for each evaluation; trying it on references costs none."""
    left = iter(values)
    return lambda answers, references: 0.0 if answers == references else next(left)


def of_two(answers: list[str], references: list[str]) -> float:
    """Something that depends on every answer."""
    return sum(len(answer) % 7 for answer in answers) / len(references)


# ---- the run is the same ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"method": "lora", "lora_dropout": 0.3},
        {"method": "lora", "dora": True, "activation_checkpointing": True},
        {"method": "lora", "modules_to_save": ["head"], "trainable_tokens": ["a"]},
        {"method": "lora", "compute_dtype": None, "base_precision": "bfloat16"},
        {"method": "qlora", "base_precision": "nf4"},
        {"method": "full", "base_precision": "float32"},
    ],
    ids=["lora with dropout", "dora", "modules and tokens", "default types", "qlora", "full"],
)
def test_a_run_that_is_scored_is_the_run_that_is_not(how: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path, out=str(tmp_path / "plain"), **how)
    train(tmp_path, out=str(tmp_path / "scored"), **how, **SCORED)
    name = "model/model.safetensors" if how["method"] == "full" else "adapter/adapter_model.safetensors"
    plain, scored = tmp_path / "plain", tmp_path / "scored"
    assert (scored / name).read_bytes() == (plain / name).read_bytes()
    assert (scored / "evaluation.jsonl").read_bytes() == (plain / "evaluation.jsonl").read_bytes()
    left = without(lines(scored / "metrics.jsonl"), "seconds", "eval_score", "eval_exact_match")
    assert left == without(lines(plain / "metrics.jsonl"), "seconds")
    assert len([line for line in evals(scored) if "eval_score" in line]) == 4


# ---- what the score is -----------------------------------------------------------------------------------------------


def test_the_score_is_that_of_the_answers_of_the_saved_adapter(tmp_path: Path) -> None:
    summary = train(tmp_path, score="rouge-l", score_prompts=5, score_max_tokens=9, best_by="loss")
    out = tmp_path / "run"
    base = load_base(str(tiny_run.folder()), precision="float32", compute_dtype="float32", device="cpu")
    encoder = Encoder(base.tokenizer)
    rows = lines(tmp_path / "valid.jsonl")
    prompts = [encoder.prompt_text(row["prompt"]) for row in rows]
    references = [(row["completion"].strip(),) for row in rows]

    def scored(slot: int) -> float:
        done = complete_all(base, encoder, prompts, slot=slot, max_tokens=9)
        return score("rouge-l", [answer.text for answer in done], references)

    before = scored(0)
    attach(base, peft_format.load(base, out / "adapter"), slot=1)
    logged = {line["step"]: line["eval_score"] for line in evals(out)}
    assert logged[summary["saved_step"]] == pytest.approx(scored(1))
    assert logged[0] == pytest.approx(before)
    assert (summary["eval_score_before"], summary["eval_score_after"]) == (logged[0], logged[summary["saved_step"]])


def test_a_score_is_logged_shown_and_summed_up(tmp_path: Path) -> None:
    summary, text = heard(tmp_path, scripted([1, 2, 4, 3]), score="mine:points", best_by="score")
    assert [line["eval_score"] for line in evals(tmp_path / "run")] == [1, 2, 4, 3]
    assert [line["eval_points"] for line in evals(tmp_path / "run")] == [1, 2, 4, 3]
    assert "mine:points 4  best so far" in text
    assert "mine:points 3\n" in text
    assert "mine:points 1 before, 4 after step 4" in text
    found = {name: summary[name] for name in ("score", "eval_score_before", "eval_score_after", "saved_step")}
    assert found == {"score": "mine:points", "eval_score_before": 1, "eval_score_after": 4, "saved_step": 4}
    assert json.loads((tmp_path / "run" / "best.json").read_text())["eval_score"] == 4


def test_an_evaluation_leaves_samples_of_the_answers_that_were_scored(tmp_path: Path, stop_after: Any) -> None:  # noqa: F811
    seen: list[list[str]] = []

    def mine(answers: list[str], references: list[str]) -> float:
        if answers != references:
            seen.append(answers)
        return float(len(seen))

    asked: dict[str, Any] = {"score": "mine:f", "score_prompts": 3, "score_max_tokens": 5, "eval_every": 2}
    stop_after(3)
    with pytest.raises(Stopped):
        train(tmp_path, mine, **asked)
    stop_after(99)
    train(tmp_path, mine, resume=True, **asked)
    found = lines(tmp_path / "run" / "samples.jsonl")
    steps = [line["step"] for line in evals(tmp_path / "run")]
    assert [line["step"] for line in found] == [step for step in steps for _ in range(3)], (
        "three at each, none of them twice"
    )
    assert [line["answer"] for line in found] == [answer for answers in seen for answer in answers]
    assert all(line["prompt"] and line["references"] and line["row"] for line in found)


def test_a_score_that_is_called_like_something_else_hides_nothing(tmp_path: Path) -> None:
    for name in ("loss", "examples"):
        train(tmp_path, scripted([0, 100, 200, 300]), score=f"mine:{name}", out=str(tmp_path / name))
        found = evals(tmp_path / name)
        assert [line["eval_score"] for line in found] == [0, 100, 200, 300]
        assert all(line[f"eval_{name}"] not in (0, 100, 200, 300) for line in found)


def test_prompts_are_chosen_evenly_and_those_of_chats_end_before_the_last_answer(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def mine(answers: list[str], references: list[str]) -> float:
        asked.append(references)
        return 0.0

    talk = [("user", "say"), ("assistant", "once"), ("user", "again"), ("assistant", "twice")]
    chats = [{"messages": [{"role": r, "content": f"{text} {i}"} for r, text in talk]} for i in range(8)]
    chats[4]["messages"][3]["weight"] = 0  # type: ignore[assignment]  # pyright: ignore[reportArgumentType]
    file = tiny_run.write_rows(tmp_path / "chats.jsonl", chats)
    train(tmp_path, mine, score="mine:f", score_prompts=3, eval_data=str(file), steps=1, eval_every=None)
    assert asked[-1] == ["twice 0", "twice 2", "twice 5"]  # of 0, 1, 2, 3, 5, 6, 7


def test_rows_in_a_share_of_the_training_data_are_asked(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def mine(answers: list[str], references: list[str]) -> float:
        asked.append(references)
        return 0.0

    options(tmp_path)
    train(tmp_path, mine, score="mine:f", eval_data="40%", steps=1)
    trained = json.loads((tmp_path / "run" / "data.json").read_text())
    assert trained["eval"]["rows"] == len(asked[-1])
    assert set(asked[-1]) < {row["completion"] for row in lines(tmp_path / "train.jsonl")}


# ---- the best step ---------------------------------------------------------------------------------------------------


def test_best_by_score_saves_the_step_of_the_highest_score(tmp_path: Path) -> None:
    level = {"lr_scheduler": "constant", "warmup_ratio": 0.0}
    summary = train(tmp_path, scripted([9, 1, 5, 3]), score="mine:f", best_by="score", **level)
    assert summary["saved_step"] == 4  # what the base makes is nobody's result
    train(tmp_path, steps=4, out=str(tmp_path / "short"), eval_data=None, **level)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "short")
    falling = train(tmp_path, scripted([9, 1, 5, 3]), score="mine:f", out=str(tmp_path / "by-loss"), **level)
    losses = {line["step"]: line["eval_loss"] for line in evals(tmp_path / "by-loss") if line["step"]}
    assert falling["saved_step"] == min(losses, key=losses.__getitem__)


def test_of_equal_scores_the_lower_loss_is_the_better(tmp_path: Path) -> None:
    summary = train(tmp_path, scripted([0, 2, 2, 2]), score="mine:f", best_by="score")
    losses = {line["step"]: line["eval_loss"] for line in evals(tmp_path / "run") if line["step"]}
    assert summary["saved_step"] == min(losses, key=losses.__getitem__)


def test_early_stopping_watches_what_the_best_step_is_chosen_by(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"score": "mine:f", "eval_every": 1, "early_stopping": 2, "steps": 6}
    summary = train(tmp_path, scripted([0, 1, 3, 2, 2.5, 9, 9]), best_by="score", **asked)
    assert (summary["steps"], summary["saved_step"]) == (4, 2)
    assert summary["stop_reason"].startswith("EarlyStopping: eval score not above 3 in 2 evaluations")
    summary = train(tmp_path, scripted([0, 1, 3, 2, 3, 9, 9]), best_by="loss", out=str(tmp_path / "by-loss"), **asked)
    assert summary["steps"] == 6


# ---- going on --------------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_keeps_its_best_score(tmp_path: Path, stop_after: Any) -> None:  # noqa: F811
    asked: dict[str, Any] = {"score": "mine:f", "best_by": "score", "eval_every": 1, "early_stopping": 3}
    train(tmp_path, scripted([0, 1, 7, 2, 3, 4, 5]), out=str(tmp_path / "whole"), **asked)
    stop_after(3)
    with pytest.raises(Stopped):
        train(tmp_path, scripted([0, 1, 7, 2]), **asked)
    stop_after(99)
    summary = train(tmp_path, scripted([3, 4, 5]), resume=True, **asked)
    assert (summary["saved_step"], summary["eval_score_before"], summary["eval_score_after"]) == (2, 0, 7)
    assert summary["steps"] == 5, "early stopping has gone on counting"
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert (tmp_path / "run" / "best.json").read_bytes() == (tmp_path / "whole" / "best.json").read_bytes()


def test_a_checkpoint_from_before_there_were_scores_goes_on(tmp_path: Path, stop_after: Any) -> None:  # noqa: F811
    train(tmp_path, out=str(tmp_path / "whole"))
    stop_after(3)
    with pytest.raises(Stopped):
        train(tmp_path)
    stop_after(99)
    newest = tmp_path / "run" / "checkpoints" / "000003"
    state = json.loads((newest / "state.json").read_text())
    for name in ("score", "score_prompts", "score_max_tokens", "best_by"):
        del state["identity"][name]
    for name in ("first", "last", "best"):
        del state[name]["score"]
    del state["scores"]
    (newest / "state.json").write_text(json.dumps(state))
    manifest_again(newest)
    train(tmp_path, resume=True)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def test_another_score_is_another_run_unless_it_is_allowed(tmp_path: Path, stop_after: Any) -> None:  # noqa: F811
    stop_after(3)
    with pytest.raises(Stopped):
        train(tmp_path, scripted([5, 90, 80]), score="mine:f", best_by="score", eval_every=2)
    stop_after(99)
    other: dict[str, Any] = {"score": "mine:g", "best_by": "score", "resume": True}
    with pytest.raises(RunError, match=r"score was 'mine:f', now 'mine:g'.*--allow-change score"):
        train(tmp_path, scripted([1, 2]), **other)
    summary = train(tmp_path, scripted([2, 1]), allow_change=["score"], **other)
    assert summary["eval_score_before"] is None, "points of another kind"
    assert (summary["saved_step"], summary["eval_score_after"]) == (4, 2)


def test_a_function_that_fails_in_the_middle_takes_no_step_away(tmp_path: Path) -> None:
    def failing(answers: list[str], references: list[str]) -> Any:
        if answers == references:
            return 0
        left.pop()
        return len(left) / len(left)

    left = [1, 2, 3]
    with pytest.raises(ScoreError, match=r"'mine:f' in .*raised ZeroDivisionError.*newest checkpoint is .*000004"):
        train(tmp_path, failing, score="mine:f")
    train(tmp_path, scripted([1, 2]), score="mine:f", resume=True)
    train(tmp_path, out=str(tmp_path / "whole"))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"score": "rouge"}, r"unknown score 'rouge', did you mean 'rouge-l'\? known: exact-match, bleu, rouge-l, and functi"),
        ({"score": "mine.py"}, r"names no function; give mine.py:FUNCTION"),
        ({"score": ":f"}, r"what is before the colon\?"),
        ({"score": "mine.py:"}, r"what is after the colon\?"),
        ({"score": "bleu", "eval_data": None, "eval_every": None}, r"--score answers eval prompts; give --eval-data"),
        ({"best_by": "score"}, r"--best-by score needs a score; give --score"),
        ({"best_by": "f1"}, r"best-by: must be 'loss' or 'score', found 'f1'"),
        ({"score_prompts": 5}, r"--score-prompts is for --score, which is not given"),
        ({"score_max_tokens": 5}, r"--score-max-tokens is for --score, which is not given"),
        ({"score": "bleu", "score_prompts": 0}, r"score-prompts: must be greater than or equal to 1, found 0"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_meant_are_refused(asked: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.build({k: v for k, v in options(tmp_path, **asked).items() if v is not None})


def test_the_options_of_a_run_without_a_score_are_read_back(tmp_path: Path) -> None:
    for asked in ({}, SCORED, {**SCORED, "best_by": "score"}):
        config = TrainConfig.build(options(tmp_path, **asked))
        assert TrainConfig.build(config.to_json()) == config


def _none(answers: list[str], references: list[str]) -> Any:
    return None


def _raising(answers: list[str], references: list[str]) -> Any:
    raise KeyError("gold")


def test_what_cannot_be_scored_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftlm.commands.train.load_base", None)
    texts = str(tiny_run.write_rows(tmp_path / "texts.jsonl", [{"text": f"the old mill {i}"} for i in range(6)]))
    cases: list[tuple[dict[str, Any], ScoreFunction | None, str]] = [
        ({"score": "bleu", "eval_data": texts}, None, r"--score bleu answers eval prompts, and the rows of .*texts"),
        ({"score": "not_there.py:f"}, None, r"--score not_there.py:f: there is no file not_there.py"),
        (
            {"score": "mine:_none"},
            _none,
            r"'mine:_none' in .* returned None \(NoneType\) for 5 answers.*nothing was trained",
        ),
        (
            {"score": "mine:_raising"},
            _raising,
            r"raised KeyError: 'gold' \(.*test_scoring.py:[0-9]+\); it is called with 5",
        ),
    ]
    for asked, function, message in cases:
        with pytest.raises(ConfigError, match=message):
            train(tmp_path, function, **asked)
    monkeypatch.setattr("graftlm.scores.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--score rouge-l needs a package.*pip install 'graftlm\[compare\]'"):
        train(tmp_path, score="rouge-l")
    assert not (tmp_path / "run").exists()


def test_a_metric_that_says_nothing_about_the_answers_is_refused_before_a_step(tmp_path: Path) -> None:
    short = [{"prompt": f"{i}: ", "completion": "yes"} for i in range(5)]
    file = str(tiny_run.write_rows(tmp_path / "short.jsonl", short))
    with pytest.raises(ConfigError, match=r"--score bleu counts runs of 4 words.*take --score exact-match"):
        train(tmp_path, score="bleu", eval_data=file)
    bare = str(
        tiny_run.write_rows(tmp_path / "bare.jsonl", [{"prompt": "", "completion": f"yes {i}"} for i in range(5)])
    )
    with pytest.raises(ConfigError, match=r"none of the 5 eval rows has a prompt"):
        train(tmp_path, score="exact-match", eval_data=bare)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_sweep_and_a_comparison_say_that_they_have_no_score() -> None:
    given = {"model": "m", "data": "d", "score": "bleu"}
    with pytest.raises(
        ConfigError, match=r"--score is an option of graft train; graft sweep has none: trials are ranked"
    ):
        SweepConfig.build({**given, "search": {"rank": "2..4"}})
    with pytest.raises(ConfigError, match=r"graft compare has none: it scores the answers.*--metric exact-match"):
        CompareConfig.build(given)
