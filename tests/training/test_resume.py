"""A run can be stopped anywhere and goes on as if it had not been; what is damaged or another run's is refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from safetensors.torch import load_file, save_file
from tiny_run import adapter_bytes, contrary, lines, train, without

from graftlm.errors import ConfigError, Diverged, RunError, Stopped
from graftlm.files import find_damage, sha256
from graftlm.training import checkpoint
from graftlm.training import run as run_module
from graftlm.training import trainer as loop
from graftlm.training.logging import Recorder


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ask every later run to stop after a step, as a signal would."""
    on_iteration_end = Recorder.on_iteration_end

    def at(step: int) -> None:
        def stopping(self: Recorder, trials: Any) -> bool:
            if self.trial.step == step:
                self.stopped = signal.SIGTERM
            return on_iteration_end(self, trials)

        monkeypatch.setattr(Recorder, "on_iteration_end", stopping)

    return at


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_was_stopped_and_goes_on_ends_like_one_that_was_not(
    tmp_path: Path, stop_after: Any, step: int, method: str
) -> None:
    options: dict[str, Any] = {"method": method, "learning_rate": 0.01, "weight_decay": 0.1}
    if method == "lora":
        options["lora_dropout"] = 0.3
    train(tmp_path, out=str(tmp_path / "whole"), **options)
    stop_after(step)
    with pytest.raises(Stopped, match=f"stopped after step {step} of 6.*--resume") as stopped:
        train(tmp_path, **options)
    assert stopped.value.signal_number == signal.SIGTERM
    stop_after(99)
    out, whole = tmp_path / "run", tmp_path / "whole"
    train(tmp_path, resume=True, micro_batch_tokens=4096, **options)
    name = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert (out / "evaluation.jsonl").read_bytes() == (whole / "evaluation.jsonl").read_bytes()
    assert (out / "best.json").read_bytes() == (whole / "best.json").read_bytes()
    metrics = without(lines(out / "metrics.jsonl"), "seconds")
    assert [line for line in metrics if line["kind"] != "event"] == without(lines(whole / "metrics.jsonl"), "seconds")
    assert [line["step"] for line in metrics if line["kind"] == "event"] == [step]


def test_a_run_goes_on_in_the_type_of_products_it_began_with(
    tmp_path: Path, stop_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that began on another processor, or before that processor's default was another."""
    stop_after(2)
    with pytest.raises(Stopped):
        train(tmp_path, compute_dtype="float32")
    stop_after(99)
    monkeypatch.setattr("graftlm.base.loading.default_compute_dtype", lambda device, training: "bfloat16")
    with pytest.raises(RunError, match="compute-dtype was 'float32', now 'bfloat16'"):
        train(tmp_path, resume=True, compute_dtype="bfloat16")
    assert train(tmp_path, resume=True)["compute_dtype"] == "float32"


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir())


def test_save_every_keeps_the_newest_checkpoints_and_the_best(tmp_path: Path) -> None:
    train(tmp_path, **contrary(tmp_path), steps=9, save_every=2, keep_checkpoints=2)
    best = json.loads((tmp_path / "run" / "best.json").read_text())["step"]
    assert best < 5, "otherwise this test shows nothing"
    assert checkpoints(tmp_path / "run") == sorted({best, 6, 8})


def test_a_checkpoint_confirms_itself_and_a_changed_byte_is_found(tmp_path: Path) -> None:
    train(tmp_path, eval_data=None, save_every=3)
    place = tmp_path / "run" / "checkpoints" / "000003"
    assert find_damage(place) is None
    manifest = json.loads((place / "manifest.json").read_text())["files"]
    assert set(manifest) == {"trainable.safetensors", "optimizer.safetensors", "state.json"}
    assert manifest["state.json"]["sha256"] == sha256(place / "state.json")
    for change in (b"", b"\x00"):
        file = place / "optimizer.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + change)
        assert find_damage(place) is not None
        file.write_bytes(content)
    (place / "state.json").unlink()
    assert find_damage(place) == "state.json is missing"


def break_off(tmp_path: Path, stop_after: Any, **options: Any) -> Path:
    """A run stopped after step 5 with checkpoints at 2, 4 and 5."""
    stop_after(5)
    with pytest.raises(Stopped):
        train(tmp_path, save_every=2, keep_checkpoints=5, eval_data=None, **options)
    stop_after(99)
    assert checkpoints(tmp_path / "run") == [2, 4, 5]
    return tmp_path / "run"


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, stop_after: Any) -> None:
    train(tmp_path, out=str(tmp_path / "whole"), eval_data=None)
    out = break_off(tmp_path, stop_after)
    with (out / "checkpoints" / "000005" / "trainable.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")
    (out / "checkpoints" / "000004" / "manifest.json").write_text("{}")
    _, text = tiny_run.heard(tmp_path, resume=True, eval_data=None, save_every=2, keep_checkpoints=5)
    assert "damaged checkpoint 000005: trainable.safetensors has changed" in " ".join(text.split())
    assert "going on from" in text
    assert adapter_bytes(out) == adapter_bytes(tmp_path / "whole")
    steps = [line["step"] for line in lines(out / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_without_a_whole_checkpoint_there_is_an_error_that_names_them_all(tmp_path: Path, stop_after: Any) -> None:
    out = break_off(tmp_path, stop_after)
    for step in (2, 4, 5):
        (out / "checkpoints" / f"{step:06d}" / "state.json").write_text("{}")
    with pytest.raises(RunError, match=r"no checkpoint is whole \(000005: state.json has .* 000002.*another --out"):
        train(tmp_path, resume=True, eval_data=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.02}, r"learning-rate was 0\.01, now 0\.02"),
        ({"batch_size": 4}, r"batch-size was 5, now 4"),
        ({"steps": 7}, r"steps was 6, now 7"),
        ({"targets": ["attention"]}, r"targets was \['all-linear'\], now \['attention'\]"),
        ({"base_precision": "int8"}, r"base-precision was 'float32', now 'int8'"),
        ({"rank": 4}, r"rank was 3, now 4"),
        ({"learning_rate": 0.02, "seed": 3}, r"learning-rate was 0\.01, now 0\.02; seed was 11, now 3"),
        ({"learning_rate": 0.02, "seed": 3}, r"accept it with --allow-change learning-rate --allow-change seed"),
    ],
)
def test_going_on_with_another_option_is_refused_with_both_values(
    tmp_path: Path, stop_after: Any, change: dict[str, Any], message: str
) -> None:
    stop_after(1)
    with pytest.raises(Stopped):
        train(tmp_path, eval_data=None)
    with pytest.raises(RunError, match=message):
        train(tmp_path, eval_data=None, resume=True, **change)


def test_going_on_with_other_data_is_refused_and_with_the_same_data_elsewhere_is_not(
    tmp_path: Path, stop_after: Any
) -> None:
    stop_after(1)
    with pytest.raises(Stopped):
        train(tmp_path, eval_data=None)
    stop_after(99)
    other = tiny_run.write_rows(tmp_path / "other.jsonl", tiny_run.rows(12, seed=9))
    with pytest.raises(RunError, match=r"data was '[0-9a-f]+', now '[0-9a-f]+'"):
        train(tmp_path, eval_data=None, resume=True, data=[str(other)])
    moved = tmp_path / "moved.jsonl"
    shutil.copy(tmp_path / "train.jsonl", moved)
    train(tmp_path, eval_data=None, resume=True, data=[str(moved)], micro_batch_tokens=30, save_every=1)


def test_a_default_written_out_is_the_same_option(tmp_path: Path, stop_after: Any) -> None:
    stop_after(1)
    with pytest.raises(Stopped):
        train(tmp_path, learning_rate=None, base_precision="nf4", method="lora", alpha=None, eval_data=None)
    stop_after(99)
    train(tmp_path, learning_rate=2e-4, base_precision="nf4", alpha=6, eval_data=None, resume=True)


def test_a_damaged_best_checkpoint_leaves_the_last_step_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped = Recorder.on_iteration_end

    def spoiling(self: Recorder, trials: Any) -> bool:
        going_on = stepped(self, trials)
        for file in (tmp_path / "run" / "checkpoints").glob("*/trainable.safetensors"):
            file.unlink()
        return going_on

    monkeypatch.setattr(Recorder, "on_iteration_end", spoiling)
    summary, text = tiny_run.heard(tmp_path, **contrary(tmp_path))
    assert "cannot be used (trainable.safetensors is missing)" in " ".join(text.split())
    evaluated = {
        line["step"]: line["eval_loss"] for line in lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval"
    }
    assert summary["saved_step"] == 6
    assert summary["eval_loss_after"] == evaluated[6]
    assert json.loads((tmp_path / "run" / "best.json").read_text())["step"] == 6


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_whose_result_could_not_be_written_is_finished_by_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    options: dict[str, Any] = {"method": method, **contrary(tmp_path)}
    train(tmp_path, out=str(tmp_path / "whole"), **options)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_result", full_disk)
        with pytest.raises(RunError, match=r"No space left.*newest checkpoint is .*000006\. Make room.*--resume"):
            train(tmp_path, **options)
    out = tmp_path / "run"
    assert find_damage(out / "checkpoints" / "000006") is None
    assert not (out / "adapter").exists()
    assert not (out / "model").exists()
    summary = train(tmp_path, resume=True, **options)
    name = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (out / "evaluation.jsonl").read_bytes() == (tmp_path / "whole" / "evaluation.jsonl").read_bytes()
    assert summary["steps"] == 6
    assert checkpoints(out) == checkpoints(tmp_path / "whole")
    with pytest.raises(RunError, match="has ended"):
        train(tmp_path, resume=True, **options)


def test_a_finished_run_leaves_no_checkpoint_that_nobody_asked_for(tmp_path: Path) -> None:
    train(tmp_path, eval_data=None)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_disk_too_full_for_the_last_checkpoint_may_have_room_for_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full_disk)
    _, text = tiny_run.heard(tmp_path, eval_data=None)
    assert "no checkpoint could be written at the end" in " ".join(text.split())
    assert adapter_bytes(tmp_path / "run")
    monkeypatch.setattr(run_module, "save_result", full_disk)
    with pytest.raises(RunError, match="no checkpoint was written"):
        train(tmp_path, eval_data=None, out=str(tmp_path / "other"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_result_is_saved_lets_it_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    saving = run_module.save_result

    def interrupted(*args: Any) -> dict[str, Any]:
        os.kill(os.getpid(), number)
        return saving(*args)

    monkeypatch.setattr(run_module, "save_result", interrupted)
    before = signal.getsignal(number)
    summary, text = tiny_run.heard(tmp_path, eval_data=None)
    assert "saving the result first" in text
    assert summary["steps"] == 6
    assert adapter_bytes(tmp_path / "run")
    assert signal.getsignal(number) is before


def test_resume_in_an_empty_folder_begins(tmp_path: Path) -> None:
    _, text = tiny_run.heard(tmp_path, resume=True, eval_data=None, steps=1)
    assert "no checkpoint was written yet" in text


def test_resume_without_a_checkpoint_begins_again_without_doubling_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", failing)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [0]
    train(tmp_path, resume=True)
    found = [(line["step"], line["kind"]) for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert len(found) == len(set(found)) == 6 + 4


def test_a_run_that_has_ended_does_not_go_on(tmp_path: Path) -> None:
    train(tmp_path, eval_data=None, steps=1)
    with pytest.raises(RunError, match=r"has ended, its result is .*adapter"):
        train(tmp_path, eval_data=None, steps=1, resume=True)


@pytest.mark.parametrize(("method", "option"), [("lora", "from_adapter"), ("full", "model")])
@pytest.mark.parametrize("resume", [True, False])
def test_more_steps_on_a_run_that_has_ended_are_a_new_run_that_begins_where_the_refusal_says(
    method: str, option: str, resume: bool, tmp_path: Path
) -> None:
    train(tmp_path, eval_data=None, steps=1, method=method)
    with pytest.raises(RunError, match="More steps are a new run") as refused:
        train(tmp_path, eval_data=None, steps=3, method=method, resume=resume)
    way = re.search(r"give --([a-z-]+) (\S+) and another --out", str(refused.value))
    assert way is not None
    assert way[1].replace("-", "_") == option
    own = {"rank": None, "alpha": None} if method == "lora" else {}
    summary = train(
        tmp_path, eval_data=None, steps=3, method=method, out=str(tmp_path / "more"), **own, **{option: way[2]}
    )
    assert summary["steps"] == 3


# ---- --allow-change -------------------------------------------------------------------------------------------------


def stopped_at(tmp_path: Path, stop_after: Any, step: int, **options: Any) -> Path:
    stop_after(step)
    with pytest.raises(Stopped):
        train(tmp_path, **options)
    stop_after(99)
    return tmp_path / "run"


def test_an_allowed_change_is_taken_and_recorded_with_both_values(tmp_path: Path, stop_after: Any) -> None:
    level = {"lr_scheduler": "constant", "warmup_ratio": 0}
    out = stopped_at(tmp_path, stop_after, 3, save_every=2, **level)
    changed = {"learning_rate": 0.02, "weight_decay": 0.1, **level}
    with pytest.raises(RunError, match=r"weight-decay was 0\.0, now 0\.1"):
        train(tmp_path, resume=True, allow_change="learning-rate", **changed)
    _, text = tiny_run.heard(tmp_path, resume=True, allow_change=["learning-rate", "weight_decay"], **changed)
    assert "going on with another learning-rate: 0.01 before, 0.02 from here" in " ".join(text.split())
    expected = [
        {"step": 3, "key": "learning-rate", "was": 0.01, "now": 0.02},
        {"step": 3, "key": "weight-decay", "was": 0.0, "now": 0.1},
    ]
    events = [line for line in lines(out / "metrics.jsonl") if line.get("event") == "changed"]
    assert without(events, "kind", "event") == expected
    assert json.loads((out / "adapter" / "graft.json").read_text())["changes"] == expected
    rates = [line["learning_rate"] for line in lines(out / "metrics.jsonl") if line["kind"] == "train"]
    assert rates == [0.01] * 3 + [0.02] * 3, "it is taken from the step on that it was allowed at"
    config = json.loads((out / "config.json").read_text())
    assert (config["learning_rate"], config["allow_change"]) == (0.02, [])


def test_a_change_stays_known_when_the_run_is_stopped_once_more(tmp_path: Path, stop_after: Any) -> None:
    out = stopped_at(tmp_path, stop_after, 2)
    stop_after(4)
    with pytest.raises(Stopped):
        train(tmp_path, resume=True, allow_change="learning-rate", learning_rate=0.02)
    stop_after(99)
    train(tmp_path, resume=True, learning_rate=0.02)
    changes = json.loads((out / "adapter" / "graft.json").read_text())["changes"]
    assert [(c["step"], c["key"]) for c in changes] == [(2, "learning-rate")]
    assert sum(line.get("event") == "changed" for line in lines(out / "metrics.jsonl")) == 1


def test_another_base_is_refused_with_both_fingerprints_and_may_be_allowed(tmp_path: Path, stop_after: Any) -> None:
    stopped_at(tmp_path, stop_after, 1, eval_data=None)
    moved = shutil.copytree(tiny_run.folder(), tmp_path / "moved")
    other = shutil.copytree(tiny_run.folder(), tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, other / "model.safetensors")
    with pytest.raises(RunError, match=r"model was '[0-9a-f]{64}', now '[0-9a-f]{64}'.*--allow-change model"):
        train(tmp_path, eval_data=None, resume=True, model=str(other))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    train(tmp_path, eval_data=None, resume=True, model=str(other), allow_change="model")
    train(tmp_path, eval_data=None, resume=True, model=str(moved), out=str(tmp_path / "again"))


def test_another_rank_cannot_be_allowed_for_the_tensors_have_other_shapes(tmp_path: Path, stop_after: Any) -> None:
    stopped_at(tmp_path, stop_after, 1, eval_data=None)
    with pytest.raises(RunError, match=r"lora_A\.weight' as float32 of shape \(3, 44\), this run .* shape \(4, 44\)"):
        train(tmp_path, eval_data=None, resume=True, rank=4, allow_change="rank")


def test_losses_on_other_held_out_rows_are_not_compared_with_the_old_ones(tmp_path: Path, stop_after: Any) -> None:
    out = stopped_at(tmp_path, stop_after, 3)
    other = tiny_run.write_rows(tmp_path / "other.jsonl", tiny_run.rows(4, seed=8))
    with pytest.raises(RunError, match="eval-data was"):
        train(tmp_path, resume=True, eval_data=str(other))
    train(tmp_path, resume=True, eval_data=str(other), allow_change="eval-data")
    assert [row["row"].rpartition("/")[2] for row in lines(out / "evaluation.jsonl")] == [
        f"other.jsonl:{i}" for i in range(1, 5)
    ]


def test_allow_change_must_name_something_and_is_for_resume(tmp_path: Path, stop_after: Any) -> None:
    stopped_at(tmp_path, stop_after, 1, eval_data=None)
    with pytest.raises(ConfigError, match=r"--allow-change learning-rat: .* did you mean 'learning-rate'"):
        train(tmp_path, eval_data=None, resume=True, allow_change="learning-rat")
    with pytest.raises(ConfigError, match="--allow-change is for --resume"):
        train(tmp_path, eval_data=None, allow_change="seed")


# ---- which checkpoints are used and kept ----------------------------------------------------------------------------

DAMAGE: dict[str, Any] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
    "one byte flipped": lambda file: file.write_bytes(
        file.read_bytes()[:-3] + bytes([file.read_bytes()[-3] ^ 4]) + file.read_bytes()[-2:]
    ),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
}
FILES = ("trainable.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def test_whatever_happened_to_whichever_file_the_checkpoint_before_is_used(tmp_path: Path, stop_after: Any) -> None:
    out = break_off(tmp_path, stop_after)
    good = tmp_path / "good"
    shutil.copytree(out / "checkpoints", good)
    for name in FILES:
        for kind, harm in DAMAGE.items():
            harm(out / "checkpoints" / "000005" / name)
            found, problems = checkpoint.newest(out)
            assert found == out / "checkpoints" / "000004", (name, kind)
            assert [p.partition(":")[0] for p in problems] == ["000005"]
            assert name.split(".")[0] in problems[0]
            shutil.rmtree(out / "checkpoints")
            shutil.copytree(good, out / "checkpoints")
    assert checkpoint.newest(out) == (out / "checkpoints" / "000005", [])


def test_a_damaged_future_does_not_push_out_what_is_written_after_it(tmp_path: Path, stop_after: Any) -> None:
    train(tmp_path, out=str(tmp_path / "whole"), eval_data=None)
    out = break_off(tmp_path, stop_after)
    for step in (4, 5):
        (out / "checkpoints" / f"{step:06d}" / "state.json").write_text("{}")
    stop_after(3)
    with pytest.raises(Stopped):
        train(tmp_path, eval_data=None, resume=True, keep_checkpoints=2)
    stop_after(99)
    assert checkpoints(out) == [2, 3]
    train(tmp_path, eval_data=None, resume=True)
    assert adapter_bytes(out) == adapter_bytes(tmp_path / "whole")


def test_the_best_of_every_kept_checkpoint_is_kept(tmp_path: Path, stop_after: Any) -> None:
    stopped_at(tmp_path, stop_after, 5, **contrary(tmp_path), steps=9, save_every=1, keep_checkpoints=2)
    best = [checkpoint.read_state(f)["best"]["step"] for f in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert set(best) <= set(checkpoints(tmp_path / "run"))
    assert checkpoints(tmp_path / "run") == sorted({min(best), 4, 5})


def test_a_checkpoint_already_written_at_the_step_a_signal_came_is_not_written_again(
    tmp_path: Path, stop_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    saving = checkpoint.save

    def counted(run: Path, trial: Any, *given: Any) -> Path:
        written.append(trial.step)
        return saving(run, trial, *given)

    monkeypatch.setattr(checkpoint, "save", counted)
    stopped_at(tmp_path, stop_after, 4, eval_data=None, save_every=2)
    assert written == [2, 4]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path, stop_after: Any) -> None:
    out = stopped_at(tmp_path, stop_after, 2, eval_data=None)
    for left in (out / ".adapter.4711.partial", out / "checkpoints" / ".000004.4711.partial"):
        left.mkdir()
        (left / "trainable.safetensors").write_text("half")
    (out / ".config.json.4711").write_text("{")
    (out / ".gitignore").write_text("mine")
    train(tmp_path, eval_data=None, resume=True, save_every=4)
    assert [str(p.relative_to(out)) for p in out.rglob(".*")] == [".gitignore"]


def test_a_checkpoint_that_is_not_finite_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped = Recorder.on_step_end

    def spoiled(self: Recorder, trial: Any, result: Any) -> None:
        stepped(self, trial, result)
        if trial.step == 4:
            with torch.no_grad():
                next(iter(trial.parameters.values()))[0, 0] = float("inf")

    monkeypatch.setattr(Recorder, "on_step_end", spoiled)
    with pytest.raises(Diverged, match=r"lora_A\.weight' is not finite after step 4.*newest checkpoint is .*000002"):
        train(tmp_path, eval_data=None, save_every=2)


def test_a_loss_that_is_not_finite_ends_at_that_step_and_keeps_the_last_finite_checkpoint(tmp_path: Path) -> None:
    options = {"eval_data": None, "save_every": 1, "lr_scheduler": "constant", "warmup_ratio": 0, "max_grad_norm": 0}
    with pytest.raises(
        Diverged, match=r"train\.jsonl:\d+.*; first the output of 'model\..*newest checkpoint is"
    ) as error:
        train(tmp_path, **options, learning_rate=1e25, steps=9)
    place = Path(str(error.value).rpartition("checkpoint is ")[2])
    assert find_damage(place) is None
    assert all(t.isfinite().all() for t in load_file(place / "trainable.safetensors").values())


def manifest_again(place: Path) -> None:
    """Make a manifest fit files that were changed."""
    files = [p for p in place.iterdir() if p.name != "manifest.json"]
    entries = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    (place / "manifest.json").write_text(json.dumps({"files": entries}))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("trainable.safetensors", lambda b: (1 << 60).to_bytes(8, "little") + b[8:], "header claims"),
        ("optimizer.safetensors", lambda b: (1 << 60).to_bytes(8, "little") + b[8:], "header claims"),
        ("state.json", lambda b: b"[1]", "expected an object"),
        (
            "state.json",
            lambda b: b.replace(b"optimizer_steps", b"optimizer_step"),
            "another version of Graft, or damaged",
        ),
        ("optimizer.safetensors", lambda b: b.replace(b"mean.", b"neam."), "another version of Graft, or damaged"),
        (
            "trainable.safetensors",
            lambda b: b.replace(b"layers.0.", b"layers.7."),
            "other tensors than this run trains",
        ),
    ],
)
def test_a_checkpoint_that_confirms_itself_and_makes_no_sense_is_refused_by_name(
    tmp_path: Path, stop_after: Any, name: str, change: Any, words: str
) -> None:
    out = stopped_at(tmp_path, stop_after, 1, eval_data=None)
    place = out / "checkpoints" / "000001"
    (place / name).write_bytes(change((place / name).read_bytes()))
    manifest_again(place)
    with pytest.raises(RunError, match=words) as error:
        train(tmp_path, eval_data=None, resume=True)
    assert "000001" in str(error.value)
