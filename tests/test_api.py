"""`import graftlm as graft`: what the names promise, on the bundled base."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import httpx2 as httpx
import pytest

import graftlm as graft
from graftlm.errors import ConfigError, DataError, RunError

ROWS = [{"prompt": f"{i} and ", "completion": f"{'more ' * (1 + i % 3)}then"} for i in range(12)]
OPTIONS: dict[str, Any] = {
    "steps": 3, "batch_size": 6, "learning_rate": 1e-2, "lr_scheduler": "constant", "warmup_ratio": 0.0, "rank": 4,
    "seed": 5, "quiet": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> graft.Model:
    return graft.load("demo", base_precision="nf4")


@pytest.fixture(scope="module")
def run(model: graft.Model, tmp_path_factory: pytest.TempPathFactory) -> graft.Run:
    """A run that has learnt its rows."""
    out = tmp_path_factory.mktemp("api") / "run"
    return graft.train(model, ROWS, eval_data=ROWS[:3], out=out, **{**OPTIONS, "steps": 12, "eval_every": 4})


def _python(code: str) -> str:
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.strip()


# ---- the module --------------------------------------------------------------------------------------------------------


def test_importing_it_is_quick_and_imports_no_library() -> None:
    found = _python(
        "import sys, time; before = time.process_time(); import graftlm; took = time.process_time() - before; "
        "print(took, [name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules])"
    )
    seconds, _, loaded = found.partition(" ")
    assert loaded == "[]"
    assert float(seconds) < 0.2


def test_every_name_is_there_and_no_other() -> None:
    assert set(graft.__all__) <= set(dir(graft))
    for name in graft.__all__:
        assert getattr(graft, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = graft.lode  # type: ignore[attr-defined]  # pyright: ignore


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"base_precison.*did you mean 'base-precision'"):
        graft.load("demo", base_precison="nf4")
    with pytest.raises(ConfigError, match=r"learning_rat.*did you mean 'learning-rate'"):
        graft.train("demo", ROWS, learning_rat=1e-3)


# ---- training ----------------------------------------------------------------------------------------------------------


def test_runs_on_one_loaded_model_give_the_bytes_that_they_give_alone(model: graft.Model, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    digests: dict[str, list[str]] = {"shared": [], "alone": []}
    for i, options in enumerate(({"rank": 4}, {"rank": 2, "activation_checkpointing": True})):
        shared = graft.train(model, ROWS, out=tmp_path / f"shared-{i}", **{**OPTIONS, **options})
        given = {**OPTIONS, **options, "method": "qlora"}
        alone = graft.train("demo", file, out=tmp_path / f"alone-{i}", **given)
        digests["shared"].append(shared.summary["adapter_digest"])
        digests["alone"].append(alone.summary["adapter_digest"])
    again = graft.train(model, ROWS, out=tmp_path / "again", **OPTIONS)
    tensors = [
        (tmp_path / p / "adapter/adapter_model.safetensors").read_bytes() for p in ("shared-0", "again", "alone-0")
    ]
    assert tensors[0] == tensors[1] == tensors[2]
    assert again.summary["adapter_digest"] == digests["shared"][0]
    for i in (0, 1):
        one, other = (tmp_path / f"{p}-{i}/adapter/adapter_model.safetensors" for p in ("shared", "alone"))
        assert one.read_bytes() == other.read_bytes()


def test_training_an_adapter_leaves_the_loaded_base_as_it_was(model: graft.Model, run: graft.Run) -> None:
    assert all(module.bank is None for module in model.base.stored().values())
    assert not any(p.requires_grad for p in model.base.model.parameters())
    fresh = graft.load("demo", base_precision="nf4")
    assert model.generate("Hi", max_tokens=8) == fresh.generate("Hi", max_tokens=8)


def test_the_method_follows_the_precision_of_the_loaded_model(model: graft.Model, run: graft.Run) -> None:
    assert run.config["method"] == "qlora"
    with pytest.raises(ConfigError, match=r"stored as nf4; load it with base_precision='float32'"):
        graft.train(model, ROWS, method="full", **OPTIONS)
    with pytest.raises(ConfigError, match=r"base_precision is 'int8', and the model was loaded with 'nf4'"):
        graft.train(model, ROWS, base_precision="int8", **OPTIONS)


def test_a_loaded_model_that_is_trained_in_full_is_the_tuned_model_afterwards(tmp_path: Path) -> None:
    model = graft.load("demo", base_precision="float32")
    before = model.fingerprint
    options = {name: value for name, value in OPTIONS.items() if name != "rank"}
    run = graft.train(model, ROWS, out=tmp_path / "full", method="full", **{**options, "learning_rate": 2e-3})
    assert run.adapter is None
    assert run.model_folder == tmp_path / "full" / "model"
    saved = graft.load(run.model_folder)
    assert model.fingerprint == saved.fingerprint != before
    assert model.generate("3 and ", max_tokens=8) == saved.generate("3 and ", max_tokens=8)
    with pytest.raises(ConfigError, match="trained the whole model; load it with"):
        model.generate("Hi", adapter=run)
    tuned = graft.train(model, ROWS, out=tmp_path / "on-top", **{**OPTIONS, "steps": 1})
    assert json.loads((tuned.folder / "adapter/graft.json").read_text())["base"]["fingerprint"] == model.fingerprint


def test_full_training_that_breaks_off_leaves_a_model_that_says_so(tmp_path: Path) -> None:
    class Breaks(graft.Callback):
        def on_step(self, metrics: Any) -> None:
            raise RuntimeError("mine")

    model = graft.load("demo", base_precision="float32")
    options = {name: value for name, value in OPTIONS.items() if name != "rank"}
    with pytest.raises(RuntimeError, match="mine"):
        graft.train(model, ROWS, out=tmp_path / "full", method="full", callbacks=[Breaks()], **options)
    with pytest.raises(
        graft.GraftError, match=r"had changed this model's weights; load it again with graft.load\('demo'\)"
    ):
        model.generate("Hi")


# ---- data --------------------------------------------------------------------------------------------------------------


def test_rows_have_one_digest_whatever_holds_them(model: graft.Model, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    held = (ROWS, tuple(ROWS), iter(ROWS), datasets.Dataset.from_list(ROWS), pandas.DataFrame(ROWS), file, [str(file)])
    assert len({model.encode(rows).dataset.digest for rows in held}) == 1


def test_an_empty_cell_of_a_data_frame_is_no_text(model: graft.Model) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([{"instruction": "a", "output": "b", "input": "c"}, {"instruction": "d", "output": "e"}])
    rows = [{"instruction": "a", "output": "b", "input": "c"}, {"instruction": "d", "output": "e"}]
    assert model.encode(frame).dataset.digest == model.encode(rows).dataset.digest


def test_a_bad_row_in_memory_is_named_by_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bad = [*ROWS[:10], {"prompt": "a", "completon": "b"}, ["no row"], {"prompt": 3, "completion": "b"}]
    with pytest.raises(DataError) as refused:
        graft.train("demo", bad, **OPTIONS)
    named = re.findall(r"rows\[(\d+)\]", str(refused.value))
    assert named == ["10", "11", "12"]
    assert not list(tmp_path.glob("runs/*")), "no folder is left of a run that did not begin"


def test_a_run_that_was_refused_leaves_the_loaded_model_usable(run: graft.Run) -> None:
    model = graft.load("demo", base_precision="float32")
    options = {name: value for name, value in OPTIONS.items() if name != "rank"}
    with pytest.raises(RunError, match="already holds a run"):
        graft.train(model, ROWS, out=run.folder, method="full", **options)
    assert isinstance(model.generate("Hi", max_tokens=2), str)


def test_what_is_no_data_is_refused_with_what_is() -> None:
    for data, found in ((7, "a int"), ({"prompt": "a"}, "one dict"), ([], "holds no row")):
        with pytest.raises(DataError, match=found):
            graft.check(data, model="demo")
    parts = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    with pytest.raises(DataError, match=r"DatasetDict of train; give one of them: data\['train'\]"):
        graft.check(parts, model="demo")


# ---- a run as values ---------------------------------------------------------------------------------------------------


def test_a_run_is_its_metrics_its_adapter_and_its_summary(run: graft.Run) -> None:
    assert [m["step"] for m in run.metrics if m["kind"] == "train"] == list(range(1, 13))
    assert run.adapter == run.folder / "adapter"
    assert run.model_folder is None
    assert not run.stopped
    assert run.summary["eval_loss_after"] < run.summary["eval_loss_before"]
    assert run.plan["measured"]["peak_memory_bytes"] == run.summary["peak_memory_bytes"]
    assert repr(run).startswith(f"Run('{run.folder}': qlora on demo, 12 steps, eval loss ")
    html = run._repr_html_()  # pyright: ignore[reportPrivateUsage]
    assert html.count("<polyline") == 2
    assert "peak memory" in html


def test_a_run_that_wrote_no_summary_is_read_from_its_other_files(run: graft.Run, tmp_path: Path) -> None:
    for file in ("config.json", "metrics.jsonl", "plan.json"):
        (tmp_path / file).write_bytes((run.folder / file).read_bytes())
    old = graft.Run.open(tmp_path)
    same = (
        "method",
        "model",
        "base_precision",
        "steps",
        "eval_loss_before",
        "eval_loss_after",
        "saved_step",
        "train_loss",
    )
    assert {n: old.summary[n] for n in same} == {n: run.summary[n] for n in same}
    assert old.stopped
    assert old.adapter is None
    with pytest.raises(RunError, match="not a run folder"):
        graft.Run.open(tmp_path / "none")


# ---- callbacks ---------------------------------------------------------------------------------------------------------


class Heard(graft.Callback):
    """Writes down what it hears, and stops after a step."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.heard = last, list[str]()

    def on_step(self, metrics: Any) -> bool | None:
        self.heard.append(f"step {metrics['step']}")
        return False if metrics["step"] == self.last else None

    def on_evaluate(self, metrics: Any) -> None:
        self.heard.append(f"eval {metrics['step']}")

    def on_save(self, folder: Path) -> None:
        assert (folder / "manifest.json").is_file()
        self.heard.append(f"save {int(folder.name)}")

    def on_end(self, summary: Any) -> None:
        self.heard.append(f"end {summary['steps']}")


def test_a_callback_hears_a_run_and_ends_it_with_its_result_saved(model: graft.Model, tmp_path: Path) -> None:
    heard = Heard(last=2)
    options = {**OPTIONS, "steps": 9, "eval_every": 1, "save_every": 5}
    run = graft.train(model, ROWS, eval_data=ROWS[:2], out=tmp_path / "run", callbacks=[heard], **options)
    assert [h for h in heard.heard if "save" not in h] == ["eval 0", "step 1", "eval 1", "step 2", "eval 2", "end 2"]
    assert "save 1" in heard.heard, "the best step so far"
    assert run.summary["steps"] == 2
    assert run.summary["stop_reason"] == "Heard"
    assert run.adapter is not None
    assert not run.stopped
    same = graft.train(model, ROWS, eval_data=ROWS[:2], out=tmp_path / "short", **{**options, "steps": 2})
    one, other = (r.adapter / "adapter_model.safetensors" for r in (run, same) if r.adapter)
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(ConfigError, match=r"an instance of graft.Callback, found .*; give an instance of it"):
        graft.train(model, ROWS, callbacks=[Heard], **OPTIONS)  # type: ignore[list-item]  # pyright: ignore


def test_early_stopping_ends_a_run_whose_eval_loss_rises_and_keeps_the_best_step(
    model: graft.Model, tmp_path: Path
) -> None:
    contrary = [{"prompt": f"{i} and ", "completion": "nothing of the sort"} for i in range(3)]
    options = {**OPTIONS, "steps": 30, "eval_every": 1, "learning_rate": 0.1}
    out = tmp_path / "run"
    run = graft.train(model, ROWS, eval_data=contrary, out=out, early_stopping_patience=2, **options)
    evals = [(m["step"], m["eval_loss"]) for m in run.metrics if m["kind"] == "eval"]
    lowest = min(loss for _, loss in evals)
    assert run.summary["steps"] < 30
    assert [loss > lowest for _, loss in evals[-2:]] == [True, True]
    assert run.summary["stop_reason"].startswith("EarlyStopping: eval loss not below")
    assert run.summary["eval_loss_after"] == min(loss for step, loss in evals if step > 0)
    with pytest.raises(ConfigError, match="--early-stopping watches the eval loss; give --eval-data"):
        graft.train(model, ROWS, early_stopping=2, **OPTIONS)


def points(answers: list[str], references: list[str]) -> float:
    """Shared first words, in percent."""
    return 100 * sum(a.split()[:1] == r.split()[:1] for a, r in zip(answers, references, strict=True)) / len(answers)


def test_answers_are_scored_by_name_or_by_a_function_and_the_best_step_is_chosen_by_it(
    model: graft.Model, tmp_path: Path
) -> None:
    options = {**OPTIONS, "steps": 12, "eval_every": 4, "score_prompts": 4, "score_max_tokens": 8, "best_by": "score"}
    held = ROWS[:4]
    run = graft.train(model, ROWS, eval_data=held, out=tmp_path / "run", score=points, **options)
    scores = {m["step"]: m["eval_points"] for m in run.metrics if m["kind"] == "eval"}
    assert list(scores) == [0, 4, 8, 12]
    assert run.summary["eval_score_after"] == max(score for step, score in scores.items() if step)
    assert run.config["score"] == f"{__name__}:points"
    given = model.generate([row["prompt"] for row in held], adapter=run, max_tokens=8, format="text")
    assert (
        points([text.strip() for text in given], [row["completion"].strip() for row in held])
        == scores[run.summary["saved_step"]]
    )
    assert f"{__name__}:points {scores[0]:.4g} to {run.summary['eval_score_after']:.4g}" in repr(run)
    (run.folder / "summary.json").unlink()
    again = graft.Run.open(run.folder).summary
    names = ("saved_step", "score", "eval_score_before", "eval_score_after", "eval_loss_after")
    assert {name: again[name] for name in names} == {name: run.summary[name] for name in names}
    named = graft.train(model, ROWS, eval_data=held, out=tmp_path / "named", score="exact-match", **options)
    assert all("eval_exact_match" in m for m in named.metrics if m["kind"] == "eval")
    for bad in (3, ["bleu"]):
        with pytest.raises(ConfigError, match="score: must be a valid string"):
            graft.train(model, ROWS, eval_data=held, score=bad, **OPTIONS)


def test_early_stopping_goes_on_counting_where_a_checkpoint_was(model: graft.Model) -> None:
    stopping = graft.EarlyStopping(patience=3)
    stopping.begin([(0, 2.0), (1, 1.0), (2, 1.1), (3, 1.2)])
    assert stopping.stop_reason is None
    stopping.on_evaluate({"step": 4, "eval_loss": 1.05})
    assert stopping.stop_reason is not None


def test_ctrl_c_leaves_a_run_that_answers_and_goes_on_to_the_same_bytes(model: graft.Model, tmp_path: Path) -> None:
    class Interrupts(graft.Callback):
        def on_step(self, metrics: Any) -> None:
            if metrics["step"] == 2:
                os.kill(os.getpid(), signal.SIGINT)

    options = {**OPTIONS, "steps": 4, "eval_every": 1, "eval_data": ROWS[:2]}
    run = graft.train(model, ROWS, out=tmp_path / "run", callbacks=[Interrupts()], **options)
    assert run.stopped
    assert run.summary["steps"] == 2
    assert run.adapter is not None
    assert isinstance(model.generate("Hi", adapter=run, max_tokens=4), str)
    gone_on = graft.train(model, ROWS, out=run.folder, resume=True, **options)
    assert not gone_on.stopped
    assert gone_on.adapter == tmp_path / "run" / "adapter"
    assert not (tmp_path / "run" / "adapter-so-far").exists()
    straight = graft.train(model, ROWS, out=tmp_path / "straight", **options)
    one, other = (r.adapter / "adapter_model.safetensors" for r in (gone_on, straight) if r.adapter)
    assert one.read_bytes() == other.read_bytes()


# ---- answering ---------------------------------------------------------------------------------------------------------


def test_prompts_of_one_batch_are_answered_each_through_its_own_adapter(
    model: graft.Model, run: graft.Run, tmp_path: Path
) -> None:
    graft.Store(tmp_path / "store").publish(run, "formal")
    assert run.adapter is not None
    adapters = [None, run, str(run.adapter), "formal@1"]
    mixed = model.generate(["3 and "] * 4, adapter=adapters, store=tmp_path / "store", max_tokens=6)
    base, tuned = (model.generate("3 and ", adapter=a, max_tokens=6) for a in (None, run))
    assert mixed == [base, tuned, tuned, tuned]
    assert base != tuned
    assert all(module.bank is None for module in model.base.stored().values())


def test_a_conversation_is_one_prompt_and_a_list_of_them_several(model: graft.Model) -> None:
    talk = [{"role": "user", "content": "Hi"}]
    options = {"format": "chat", "max_tokens": 5}
    alone = model.generate(talk, **options)
    assert model.generate("Hi", **options) == alone
    assert model.generate([talk, "Hi"], **options) == [alone, alone]
    assert model.generate([]) == []


def test_what_generate_cannot_do_is_refused(model: graft.Model) -> None:
    with pytest.raises(ConfigError, match="2 prompts and 1 adapters"):
        model.generate(["a", "b"], adapter=[None])
    with pytest.raises(ConfigError, match=r"option 'base_precision' was chosen by graft.load"):
        model.generate("a", base_precision="nf4")
    with pytest.raises(ConfigError, match=r"max_token.*did you mean 'max-tokens'"):
        model.generate("a", max_token=3)


# ---- a loop of one's own -----------------------------------------------------------------------------------------------


def test_a_loop_of_ones_own_takes_the_steps_that_train_takes(model: graft.Model, tmp_path: Path) -> None:
    options = {**OPTIONS, "batch_size": len(ROWS)}
    run = graft.train(model, ROWS, out=tmp_path / "run", **options)
    model.new_adapter(rank=4, seed=5)
    batch = model.encode(ROWS)
    losses: list[float] = []
    norms: list[float] = []
    for _ in range(3):
        losses.append(model.forward_backward(batch))
        norms.append(model.optimizer_step(learning_rate=1e-2))
    lines = [m for m in run.metrics if m["kind"] == "train"]
    assert losses == pytest.approx([m["loss"] for m in lines], rel=2e-3)
    assert losses[0] == pytest.approx(lines[0]["loss"], rel=1e-5)
    assert norms[0] == pytest.approx(lines[0]["grad_norm"], rel=2e-3)
    base = model.generate("3 and ", max_tokens=6)
    model.save_adapter(tmp_path / "own")
    model.remove_adapter()
    assert model.generate(["3 and "] * 2, adapter=[None, tmp_path / "own"], max_tokens=6)[0] == base


def test_gradients_add_up_until_the_step(model: graft.Model) -> None:
    batch = model.encode(ROWS[:5])
    model.new_adapter(rank=2, seed=1)
    model.forward_backward(batch)
    once = model.optimizer_step(learning_rate=1e-9)
    model.new_adapter(rank=2, seed=1)
    model.forward_backward(batch)
    model.forward_backward(batch)
    assert model.optimizer_step(learning_rate=1e-9) == pytest.approx(2 * once, rel=1e-5)
    with pytest.raises(ConfigError, match=r"no gradient to step by; call forward_backward"):
        model.optimizer_step(learning_rate=1e-4)
    with pytest.raises(ConfigError, match=r"option 'steps' is for graft.train"):
        model.new_adapter(steps=3)
    model.remove_adapter()


# ---- values that show themselves ---------------------------------------------------------------------------------------


def test_a_plan_and_a_check_print_and_show_as_tables() -> None:
    plan = graft.plan("llama-3.1-8b", gpu="rtx-4090")
    assert plan.plans[0].rows[0].requirement.peak > 100e9
    assert "QLoRA" in repr(plan)
    lines = [
        line for line in repr(plan).splitlines() if not line.strip().startswith("graft ")
    ]  # to copy, so in one line
    assert max(map(len, lines)) <= 120
    assert "<pre" in plan._repr_html_()
    assert "color" in plan._repr_html_()
    report = graft.check(ROWS, model="demo")
    assert report.rows == 12
    assert "duplicates" in str(report)
    assert report._repr_html_().startswith("<pre")


def test_a_sweep_gives_its_best_trial(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    options = {"steps": 2, "batch_size": 4, "trials": 2, "at_once": 2, "quiet": True, "out": tmp_path / "sweep"}
    found = graft.sweep("demo", ROWS, eval_data=ROWS[:3], **options)
    assert found.best is not None
    assert found.best.loss == min(t.loss for t in found.tried if t.loss is not None)
    assert set(found.space) == {"learning_rate", "rank"}
    assert "2 complete" in repr(found)
    assert "<pre" in found._repr_html_()


def test_a_merged_model_is_the_base_with_the_adapter(model: graft.Model, run: graft.Run, tmp_path: Path) -> None:
    done = graft.merge(model, run, tmp_path / "merged", unmeasured=True)
    assert done["out"] == str(tmp_path / "merged")
    assert str(tmp_path / "merged") in repr(done)
    merged = graft.load(tmp_path / "merged")
    assert merged.generate("3 and ", max_tokens=6) == model.generate("3 and ", adapter=run, max_tokens=6)


# ---- memory ------------------------------------------------------------------------------------------------------------


def test_a_model_that_is_deleted_gives_its_memory_back() -> None:
    found = _python(
        "import graftlm as graft\n"
        "def resident():\n"
        "    return int(open('/proc/self/statm').read().split()[1])\n"
        "model = graft.load('demo', base_precision='float32'); model.generate('Hi', max_tokens=2); del model\n"
        "before = resident()\n"
        "model = graft.load('demo', base_precision='float32'); model.generate('Hi', max_tokens=2)\n"
        "held = resident(); del model\n"
        "print(before, held, resident())"
    )
    before, held, after = map(int, found.split())
    assert after < 1.05 * before
    assert held - after > 0.5 * 12.9e6 / 4096


def test_serve_answers_until_a_signal_and_leaves_the_interpreter_as_it_was() -> None:
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found: list[Any] = []

    def client() -> None:
        """In the main thread the server runs, as in a notebook: that is where Ctrl-C arrives."""
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                end = time.monotonic() + 60
                while time.monotonic() < end:
                    with contextlib.suppress(httpx.TransportError):
                        if http.get("/readyz").status_code == 200:
                            break
                    time.sleep(0.02)
                body = {"model": "demo", "prompt": "Describe", "max_tokens": 3, "temperature": 0}
                found.append(http.post("/v1/completions", json=body).json())
        except Exception as error:
            found.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    interval, handler = sys.getswitchinterval(), signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=client)
    thread.start()
    assert graft.serve("demo", port=port, device="cpu", kv_cache_gb=0.05, max_num_seqs=2) is None
    thread.join()
    (answer,) = found
    assert not isinstance(answer, Exception), answer
    assert answer["usage"]["completion_tokens"] == 3
    assert (sys.getswitchinterval(), signal.getsignal(signal.SIGINT)) == (interval, handler)


def test_serve_for_vllm_exports_and_returns_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftlm.commands import serve as command

    monkeypatch.setattr(command, "export_for_vllm", lambda config, note: {"command": f"vllm serve {config.model}"})
    assert graft.serve("demo", store=tmp_path, engine="vllm", out=tmp_path / "out") == {"command": "vllm serve demo"}
