"""The benchmarks' own logic; nothing here asserts a time. The GPU script has `test_bench_gpu.py`."""

from __future__ import annotations

import copy
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from transformers.utils import import_utils

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

import ladder  # noqa: E402
import memory  # noqa: E402
import memory_runs  # noqa: E402
import point  # noqa: E402
import report  # noqa: E402
import scaling  # noqa: E402
import suite  # noqa: E402
import traced  # noqa: E402
import train as training  # noqa: E402

from graftlm import demo  # noqa: E402
from graftlm.config import TrainConfig  # noqa: E402
from graftlm.data.sampler import make_sampler  # noqa: E402

MACHINE = {"processor": "A", "threads": 2, "instructions": "AVX2"}


def _side(speed: float, memory: float, step: float = 1.0, bare: float | None = None) -> dict[str, Any]:
    engines = {"float32": 2 * (bare or 0), "own": bare}
    return {"examples_per_second": speed, "trained_tokens_per_second": 30 * speed, "peak_memory": memory, "loss": 3.25,
            "seconds_per_step": step,
            **({} if bare is None else {"bare": {k: {"seconds_per_step": v} for k, v in engines.items()}})}  # fmt: skip


def _results() -> dict[str, Any]:
    """Figures of a suite in which each verdict occurs."""
    train = {
        "lora": {
            "graft": _side(36.0, 4e8, 1.0, 0.8),
            "trl": _side(10.0, 1e9),
            "trl packed": _side(12.0, 8e8),
            "graft gguf": _side(20.0, 2e8),
        },
        "qlora": {"graft": _side(20.0, 7e8, 1.2, 0.5), "trl": _side(5.0, 1e9)},
    }
    kernels = [
        {"operation": "NF4 quantize", "beside": "bitsandbytes", "graft_ms": 1.0, "beside_ms": 9.0, "ratio": 9.0},
        {"operation": "unknown", "beside": "bitsandbytes", "graft_ms": 1.0, "beside_ms": 9.0, "ratio": 9.0},
    ]
    about = {"machine": MACHINE, "date": "2026-01-02T03:04:05", "seconds": 10.0, "command": "python bench/x.py"}
    return {
        "AVX2": {
            "kernels": {**about, "figures": {"results": kernels}},
            "train-smollm2": {**about, "figures": {"subject": "smollm2", "results": train}},
            "train-30m": {**about, "figures": {"subject": "30m", "results": {"lora": train["lora"]}}},
            "ladder": {**about, "error": "ended with status 3: no memory"},
        }
    }


# ---- bars and pages --------------------------------------------------------------------------------------------------


def test_each_figure_gets_the_verdict_that_its_bounds_give() -> None:
    parts = _results()["AVX2"]
    bars = {
        b.what: b.verdict for n in ("kernels", "train-smollm2") for b in report.bars_of(n, parts[n]["figures"], "AVX2")
    }
    name = "SmolLM2-135M-Instruct"
    assert bars == {
        "NF4 quantize, speed vs bitsandbytes": "met",
        f"{name} LoRA, examples/s vs TRL": "met",
        f"{name} LoRA on the GGUF's blocks, examples/s vs TRL": "missed",
        f"{name} LoRA, examples/s vs TRL with its packing": "",
        f"{name} LoRA, peak memory vs TRL": "met",
        f"{name} LoRA on the GGUF's blocks, peak memory vs TRL": "met",
        f"{name} LoRA, bare matmuls' share of a step": "met",
        f"{name} QLoRA, examples/s vs TRL": "met",
        f"{name} QLoRA, peak memory vs TRL": "missed",
        f"{name} QLoRA, bare matmuls' share of a step": "missed",
    }


def test_a_bar_of_speed_is_that_of_the_instruction_set() -> None:
    figures = {"subject": "gemma", "results": {"qlora": {"graft": _side(45.0, 4e8), "trl": _side(10.0, 1e9)}}}
    found = [report.train_bars(figures, name)[0] for name in ("AVX2", "AVX512 BF16", "limited to AVX2")]
    assert [(bar.must, bar.verdict) for bar in found] == [(4.0, "met"), (5.0, "missed"), (4.0, "met")]


def test_a_ratio_to_the_peer_is_to_the_better_of_its_two_dtypes() -> None:
    sides = {"graft": _side(40.0, 5e8), "trl": _side(8.0, 1e9), "trl bf16": _side(10.0, 8e8)}
    assert training.peer(sides) == (10.0, 8e8)
    assert training.peer({name: sides[name] for name in ("graft", "trl")}) == (8.0, 1e9)
    bars = {bar.what: bar.measured for bar in report.train_bars({"subject": "30m", "results": {"lora": sides}}, "AVX2")}
    assert bars["30M Llama LoRA, examples/s vs TRL"] == 4.0
    assert bars["30M Llama LoRA, examples/s vs TRL in float32"] == 5.0
    assert bars["30M Llama LoRA, peak memory vs TRL"] == 0.625


def test_figures_of_two_processors_are_in_rows_of_their_own() -> None:
    results = {**_results(), "AVX512 BF16": {"train-smollm2": _results()["AVX2"]["train-smollm2"]}}
    written = report.README.written(results)
    assert "| | LoRA | LoRA on GGUF | QLoRA |" in written
    for name in results:
        assert f"| SmolLM2-135M-Instruct, {name} | 3.6x, 0.40x | 2.0x, 0.20x | 4.0x, 0.70x |" in written
    assert "30M" not in written  # random weights
    assert report.page(results).count("SmolLM2-135M-Instruct LoRA, examples/s vs TRL |") == 2


def test_a_bound_that_is_just_reached_is_reached() -> None:
    assert report.Bar(what="", measured=2.0, must=2.0).verdict == "met"
    assert report.Bar(what="", measured=0.6, must=0.6, goal=0.4, more=False).verdict == "met"
    assert report.Bar(what="", measured=0.7, goal=0.8).verdict == "short of the goal"


def test_the_page_names_what_failed_and_shows_both_sides() -> None:
    page = report.page(_results())
    assert "**Failed:** ended with status 3: no memory" in page
    assert "| LoRA | trl packed | 12.00 | 360 | 800 | 3.2500 |" in page
    assert "| LoRA | matmuls alone, Graft's kernels | 10.00 | | | |" in page  # 8 examples in 0.8 s


def test_the_sections_of_the_pages_are_what_the_figures_give() -> None:
    results = suite.read(suite.RESULTS / "cpu.json")
    for place, section in ((suite.README, report.README), (suite.MEMORY, report.LADDER)):
        page = place.read_text(encoding="utf-8")
        assert report.with_section(page, section, results) == page


@pytest.mark.parametrize("section", [report.README, report.LADDER])
def test_other_figures_give_another_section_and_leave_the_rest_of_the_page(section: report.Section) -> None:
    page = f"before\n{section.begin}\nold\n{section.end}\nafter"
    written = report.with_section(page, section, _results())
    assert written.startswith("before\n")
    assert written.endswith("\nafter")
    assert "old" not in written
    assert ("| SmolLM2-135M-Instruct, AVX2 | 3.6x, 0.40x |" in written) == (section is report.README)
    assert ("Not measured yet" in written) == (section is report.LADDER)  # it failed
    assert report.with_section(written, section, _results()) == written
    with pytest.raises(ValueError, match="lacks the marks"):
        report.with_section("no marks", section, _results())


# ---- the suite -------------------------------------------------------------------------------------------------------


def _script(folder: Path, name: str, body: str) -> suite.Part:
    (folder / f"{name}.py").write_text(f"import sys, json, time\nplace = sys.argv[-1]\n{body}\n", encoding="utf-8")
    return suite.Part(name=name, script=str(folder / f"{name}.py"), seconds=30)


def test_one_benchmark_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite.Part, "command", property(lambda part: [part.script]))
    good = "open(place, 'w').write(json.dumps({'found': 7}))"
    parts = [_script(tmp_path, "bad", "sys.exit('broken here')"), _script(tmp_path, "good", good)]
    parts.append(_script(tmp_path, "silent", "pass"))
    place = tmp_path / "cpu.json"
    assert suite.measure(parts, place, 60) is False
    found = json.loads(place.read_text())[suite.instructions()]
    assert found["good"]["figures"] == {"found": 7}
    assert "ended with status 1: broken here" in found["bad"]["error"]
    assert "wrote no figures" in found["silent"]["error"]

    # Run again, what has failed now leaves the figures that were there.
    _script(tmp_path, "good", "sys.exit(2)")
    assert suite.measure(parts[1:2], place, 60) is False
    assert json.loads(place.read_text())[suite.instructions()]["good"]["figures"] == {"found": 7}


def test_a_benchmark_that_takes_too_long_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite.Part, "command", property(lambda part: [part.script]))
    child = "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    body = f"import subprocess; print('begun', flush=True); {child}"
    part = _script(tmp_path, "slow", body)
    found = suite.run(part, 2)
    assert found["error"] == "not done after 2 s; last: begun"
    assert found["seconds"] < 30
    assert "figures" not in found


def test_what_a_benchmark_had_measured_when_it_was_ended_is_kept_and_marked_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite.Part, "command", property(lambda part: [part.script]))
    place = tmp_path / "cpu.json"
    part = _script(tmp_path, "half", "open(place, 'w').write(json.dumps({'first': 1})); sys.exit('no more')")
    assert suite.measure([part], place, 60) is False
    results = suite.read(place)
    assert results is not None
    assert results[suite.instructions()]["half"]["figures"] == {"first": 1}
    assert "**Not finished:** ended with status 1: no more" in report.page(results)


def test_every_part_of_the_suite_is_a_script_that_is_there() -> None:
    parts = suite.parts_of(suite.BENCH)
    trains = {f"train-{base}-{method}" for base in ("smollm2", "gemma") for method in ("full", "lora", "qlora")}
    assert {"kernels", "scaling", "ladder", *trains} == {part.name for part in parts}
    assert all((suite.BENCH / part.script).is_file() for part in parts)
    assert suite.TOTAL_SECONDS <= 3600


def test_no_script_has_the_name_of_a_package_that_anything_looks_for() -> None:
    # A script's folder comes first on Python's path; `kernels.py` was imported by transformers in place of a package.
    names = {script.stem for script in suite.BENCH.glob("*.py")}
    looked_for = set(re.findall(r'_is_package_available\("(\w+)"', inspect.getsource(import_utils)))
    assert "kernels" in looked_for
    taken = {*sys.stdlib_module_names, *packages_distributions(), *looked_for}
    assert names & taken == set()


# ---- training in turns -----------------------------------------------------------------------------------------------


def test_a_side_works_only_in_its_turn_and_its_last_one_ends_with_it(tmp_path: Path) -> None:
    # Two sides that log when they work: one of 3 steps, one of 2.
    log = tmp_path / "log"
    script = tmp_path / "side.py"
    script.write_text(
        "import json, sys, time\n"
        f"sys.path.append({str(suite.BENCH)!r})\n"
        "import train\n"
        "work = json.loads(sys.argv[2])\n"
        "turns = train.Turns(work['pipes'])\n"
        "def step(n):\n"
        "    for word in ('begins', 'ends'):\n"
        f"        print(work['side'], word, file=open({str(log)!r}, 'a'))\n"
        "        time.sleep(0.02)\n"
        "turns.next()\n"
        "for n in range(work['steps']):\n"
        "    step(n)\n"
        "    turns.end() if n + 1 == work['steps'] else turns.next()\n"
        "print(json.dumps({'seconds': turns.seconds}))\n",
        encoding="utf-8",
    )
    found = training.in_turns({"a": {"steps": 3}, "b": {"steps": 2}}, str(script))
    turns = [line.split()[0] for line in log.read_text().splitlines()]
    assert turns == ["a", "a", "b", "b", "a", "a", "b", "b", "a", "a"]
    assert list(found) == ["a", "b"]
    assert [len(side["seconds"]) for side in found.values()] == [3, 2]
    assert all(0.04 <= s < 5 for side in found.values() for s in side["seconds"])


def test_a_side_that_fails_is_reported(tmp_path: Path) -> None:
    script = tmp_path / "side.py"
    script.write_text("import sys\nsys.exit('no such model')\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="trl failed:\nno such model"):
        training.in_turns({"trl": {}}, str(script))


def test_the_median_step_after_those_that_do_not_count() -> None:
    turns = training.Turns(None, warm_up=2)
    turns.seconds = [9.0, 9.0, 2.0, 1.0, 4.0]
    assert turns.counted == 2.0
    turns.seconds = [9.0, 5.0]
    assert turns.counted == 5.0


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("engine", ["float32", "own"])
def test_the_matmuls_of_a_step_run_alone(method: str, engine: str) -> None:
    work = {"model": str(tiny_run.folder()), "method": method, "engine": engine, "rank": 4, "batch": 2, "steps": 2,
            "tokens": [20, 30], "targets": [7, 9]}  # fmt: skip
    found = training.bare_side(work, training.Turns(None, warm_up=1))
    assert len(found["seconds"]) == 2


@pytest.mark.prove
def test_both_sides_train_a_tiny_model_to_the_same_loss() -> None:
    found = dict(training.measure("tiny", ["lora", "qlora"], 4, warm_up=2, packing=["lora"]))
    for sides in found.values():
        assert sides["graft"]["loss"] == pytest.approx(sides["trl"]["loss"], rel=2e-3)
        assert all(side["examples_per_second"] > 0 for side in sides.values())
    assert set(found["lora"]) == {"graft", "trl", "trl packed"}
    assert "own" in found["lora"]["graft"]["bare"]


@pytest.mark.skipif(not training.DATA.is_dir(), reason=f"the data sets are not at {training.DATA}")
def test_all_sides_get_the_same_rows_in_the_same_batches(tmp_path: Path) -> None:
    subject = replace(training.SUBJECTS["smollm2"], batch=3)
    found = training.make_data(tmp_path, 4, subject)
    train, drawn, valid = (
        [json.loads(line) for line in Path(found[name]).read_text().splitlines()]
        for name in ("train", "drawn", "valid")
    )
    assert len(train) == 12
    assert train != drawn
    assert sorted(map(str, train)) == sorted(map(str, drawn))
    assert not {str(row) for row in valid} & {str(row) for row in train}
    config = TrainConfig(
        model="demo", data=(found["train"],), method="lora", steps=4, batch_size=3, out=tmp_path / "run"
    )
    sampler = make_sampler((12,), (1.0,), seed=config.seed, batch_size=3, epochs=None, steps=4)
    assert [train[i] for step in range(4) for _, i in sampler.step(step)] == drawn
    counted = training.batches({**found, "model": demo.resolve_model("demo"), "batch": 3})
    assert len(counted["tokens"]) == 4
    assert all(0 < targets < tokens for targets, tokens in zip(counted["targets"], counted["tokens"]))


# ---- planned and measured memory ---------------------------------------------------------------------------------------


def test_errors_are_summed_up_for_each_base_and_stand_between_the_marks_of_the_page() -> None:
    found = [{"base": base, "error": error} for base, error in (("gemma", 0.02), ("gemma", -0.12), ("30m", 0.04))]
    page = memory.with_figures(f"before\n{memory.BEGIN}\nold\n{memory.END}\nafter", found)
    assert page.startswith(f"before\n{memory.BEGIN}\n| base |")
    assert page.endswith(f"\n{memory.END}\nafter")
    assert "| Gemma 3 270M | 2 | 1 | 7.0% | 12.0% | -5.0% |" in page
    assert "| random Llamas | 1 | 1 | 4.0% | 4.0% | +4.0% |" in page
    assert "| all | 3 | 2 | 4.0% | 12.0% | -2.0% |" in page
    assert "SmolLM2" not in page
    assert "old" not in page
    assert memory.with_figures(memory.PAGE.read_text(encoding="utf-8"), found)
    with pytest.raises(ValueError, match="the page lacks the marks"):
        memory.with_figures("no marks", found)


def test_every_run_of_the_memory_benchmark_has_a_name_of_its_own_and_real_bases_have_every_method() -> None:
    runs = memory_runs.RUNS
    assert len({run.name for run in runs}) == len(runs)
    for base in memory_runs.REAL:
        ways = {(run.method, run.precision) for run in runs if run.base == base}
        adapters = {("lora", how) for how in ("float32", "bfloat16", "int8", "gguf")}
        assert ways == {("full", "float32"), ("full", "bfloat16"), ("qlora", "nf4"), *adapters}
        options = {name for run in runs if run.base == base for name in run.options}
        assert {"dora", "lora_dropout", "score", "activation_checkpointing", "optimizer_in_backward"} <= options


def test_the_page_has_the_traced_tables_and_every_row_has_a_name_of_its_own() -> None:
    names = [row.name for rows in traced.sections().values() for row in rows]
    assert len(set(names)) == len(names)
    rows = json.loads(traced.RESULTS.read_text(encoding="utf-8"))["rows"]
    assert set(rows) <= set(names)
    page = traced.PAGE.read_text(encoding="utf-8")
    assert traced.with_tables(page, rows) == page
    with pytest.raises(ValueError, match="lacks the marks"):
        traced.with_tables("no marks", rows)


# ---- the memory ladder -----------------------------------------------------------------------------------------------


def test_the_formula_of_a_rung_is_bytes_of_weight_gradient_and_states() -> None:
    found = [rung.expected(1_000_000, 100_000) for rung in ladder.RUNGS]
    assert found == pytest.approx([16, 12, 10.03125, 12.4, 6.03125, 4.23125])
    assert ladder.RUNGS[-1].flags == "--base-precision bfloat16 --optimizer adamw-8bit --optimizer-in-backward"


def test_the_bytes_of_no_tokens_lie_on_the_line_through_two_peaks() -> None:
    peaks = [{"memory": 5e8 + 3e5 * tokens, "tokens": tokens} for tokens in (40, 100)]
    assert ladder.without_tokens(*peaks) == pytest.approx(5e8)


@pytest.mark.skipif(not training.SHARED.is_dir(), reason=f"the E2E set is not at {training.SHARED}")
def test_a_rung_is_trained_as_graft_train_does_and_measured(tmp_path: Path) -> None:
    ladder.prepare(tmp_path, "tiny", 1)
    (found,) = ladder.measured(ladder.RUNGS[-1], tmp_path, "tiny", 1)
    assert found["parameters"] == 8192 * 64 + 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 112 + 2 * 64) + 64
    assert found["loss"] < found["loss_before"]
    assert found["peak_memory"] > 0
    assert f"| all three | `{found['flags']}` |" in ladder.table([found])


# ---- growth ----------------------------------------------------------------------------------------------------------


def test_bytes_per_token_is_the_slope_of_the_line_through_the_points() -> None:
    points = [{"tokens_per_step": t, "peak_memory": 5e8 + 700 * t, "vocabulary": 8} for t in (100, 400, 1600)]
    assert scaling.bytes_per_token(points) == pytest.approx(700)
    assert scaling.growth({"vocabulary": points})[0]["bytes_of_a_tokens_logits"] == 32


def test_the_series_hold_fixed_what_they_say() -> None:
    found = scaling.series("30m")
    assert {line["point"].tokens for line in found["sequence"]} == {4096}
    assert {line["point"].sequence for line in found["sequence"]} == {128, 1024, 4096}
    assert {line["point"].tokens for line in found["rank"]} == {2048}
    assert [line["point"].rank for line in found["rank"]] == [4, 32, 256]
    assert {line["point"].sequence for line in found["batch"]} == {128}
    assert {line["point"].batch for line in found["batch"]} == {1, 8, 16, 64}
    assert {line["vocabulary"] for line in found["vocabulary"]} == {None, scaling.LARGE}


def test_a_point_is_trained_in_a_process_of_its_own_and_drawn(tmp_path: Path) -> None:
    line = scaling.series("tiny")["rank"][0]
    (found,) = list(point.in_process(scaling.measured, [line], 120, "forkserver"))
    assert found["rank"] == 4
    assert found["tokens_per_step"] == 2048
    assert found["tokens_per_second"] > 0
    assert found["peak_memory"] > 0
    series = {name: [{**found, "x": x} for x in (1, 2)] for name in ("sequence", "rank", "batch", "vocabulary")}
    scaling.plot(series, tmp_path / "growth.png", "a title")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert "| 4 |" not in scaling.table({"rank": series["rank"]})
    assert "| 2 | " in scaling.table({"rank": series["rank"]})


def _sleeps() -> Iterator[int]:
    import time

    yield 1
    time.sleep(60)


def _dies() -> Iterator[int]:
    import os

    yield 1
    os._exit(7)


def test_a_process_that_dies_or_takes_too_long_is_reported() -> None:
    heard: list[int] = []
    with pytest.raises(TimeoutError, match="not done after"):
        heard.extend(point.in_process(_sleeps, [], 4, "forkserver"))
    with pytest.raises(RuntimeError, match="status 7"):
        heard.extend(point.in_process(_dies, [], 60, "forkserver"))


def test_measuring_changes_nothing_that_was_given() -> None:
    before = _results()
    after = copy.deepcopy(before)
    report.page(after)
    report.README.written(after)
    report.LADDER.written(after)
    assert before == after
