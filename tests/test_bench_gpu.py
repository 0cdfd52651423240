"""The GPU script: which jobs run and what becomes of them, each job tried on tiny shapes, and the page that it writes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

import gpu  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_jobs  # noqa: E402
import gpu_page  # noqa: E402
import gpu_steps  # noqa: E402
import peft_point  # noqa: E402
import point  # noqa: E402

from graftlm.planning.instantiate import instantiate  # noqa: E402

CPU = gpu_jobs.Where(device="cpu", small=True)

# ---- carried packages ------------------------------------------------------------------------------------------------


def _wheel(folder: Path, name: str, files: dict[str, str]) -> None:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def test_a_wheel_is_unpacked_where_its_package_is_missing_and_left_out_otherwise(tmp_path: Path) -> None:
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    _wheel(
        tmp_path,
        "absent_one-1.0-py3-none-any.whl",
        {"absent_one/__init__.py": "", "absent_one-1.0.dist-info/WHEEL": ""},
    )
    _wheel(tmp_path, f"absent_two-1.0-{own}-{own}-linux_x86_64.whl", {"absent_two.py": ""})
    _wheel(tmp_path, "absent_three-1.0-cp27-cp27m-linux_x86_64.whl", {"absent_three.py": ""})
    _wheel(tmp_path, "torch-9.0-py3-none-any.whl", {"torch/__init__.py": ""})
    found = gpu.unpack_missing(tmp_path, tmp_path / "site")
    assert [found[name].partition(":")[0] for name in sorted(found)] == ["unpacked", "left out", "unpacked", "left out"]
    assert sorted(p.name for p in (tmp_path / "site").iterdir()) == [
        "absent_one",
        "absent_one-1.0.dist-info",
        "absent_two.py",
    ]


# A sitecustomize.py: packages that this machine has and the GPU's has not. What is unpacked from a wheel is found.
_ABSENT = """
import sys
from importlib.machinery import PathFinder
class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name in {absent!r}:
            path = [p for p in sys.path if "site-packages" not in p]
        return super().find_spec(name, path, target)
sys.meta_path = [Absent if finder is PathFinder else finder for finder in sys.meta_path]
"""
PYDANTIC = ("pydantic", "pydantic_core", "annotated_types", "typing_inspection")


def test_it_runs_without_pydantic_bitsandbytes_and_trl_where_the_first_is_carried(tmp_path: Path) -> None:
    absent = (*PYDANTIC, "bitsandbytes", "trl")
    (tmp_path / "sitecustomize.py").write_text(_ABSENT.format(absent=absent), encoding="utf-8")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in PYDANTIC:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            for file in folder.rglob("*"):
                if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".pyi":
                    archive.write(file, file.relative_to(folder.parent))
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), "--out", str(tmp_path / "out"), "--only", "environment",
         "--device", "cpu", "--small", "--wheels", str(wheels)],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert set(found["wheels"].values()) == {"unpacked"}
    packages = found["jobs"]["environment"]["figures"]["packages"]
    assert {name for name, one in packages.items() if "error" in one} == set(absent) & set(gpu_checks.PACKAGES) - {
        "pydantic"
    }
    assert "found" in found["jobs"]["environment"]["figures"]["a tiny base"]


# ---- the jobs --------------------------------------------------------------------------------------------------------


def _answering(found: dict[str, dict[str, Any]], asked: list[str]) -> Any:
    def run_job(job: gpu.Job, *given: Any) -> dict[str, Any]:
        asked.append(job.name)
        return {"figures": {}, "done": True, "seconds": 1.0, **found.get(job.name, {})}

    return run_job


def test_a_job_that_fails_is_run_again_and_those_that_are_done_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    bad = {"kernels": {"done": False, "error": "it broke"}}
    monkeypatch.setattr(gpu, "run_job", _answering(bad, asked))
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert asked == [job.name for job in gpu.JOBS]
    asked.clear()
    monkeypatch.setattr(gpu, "run_job", _answering({}, asked))
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert asked == ["kernels"]
    monkeypatch.setattr(gpu, "run_job", _answering(bad, asked))
    assert gpu.main(["--out", str(tmp_path), "--only", "kernels"]) == 1
    assert gpu.waiting(tmp_path, False) == []  # what was measured before stays


def test_no_job_is_begun_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(gpu, "run_job", _answering({}, asked))
    assert gpu.main(["--out", str(tmp_path), "--time-limit", "5"]) == 1
    assert asked == []


def test_all_jobs_end_within_nine_minutes_and_each_has_a_place() -> None:
    assert gpu.TIME_LIMIT <= 540
    assert [job.name for job in gpu.JOBS] == list(gpu_jobs.PLACES)


def test_a_job_that_hangs_or_dies_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "gpu_jobs.py"
    script.write_text(
        "import sys, time\nplace = sys.argv[sys.argv.index('--json') + 1]\n"
        "open(place, 'w').write('{\"figures\": {\"a\": 1}}')\n"
        "print('begun', flush=True)\ntime.sleep(60) if sys.argv[1] == 'kernels' else sys.exit('no more')\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(gpu, "BENCH", tmp_path)
    found = {job.name: gpu.run_job(job, tmp_path, 2, "cpu", True, []) for job in gpu.JOBS[1:3]}
    assert found["kernels"]["error"] == "not done after 2 s: begun"
    assert found["correct"]["error"] == "ended with status 1: no more"
    assert {str(one["figures"]) for one in found.values()} == {"{'a': 1}"}


def test_figures_are_written_as_they_come_and_an_error_with_where_it_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(name: str, where: gpu_jobs.Where) -> gpu_jobs.Figures:
        yield "first", {"a": 1}
        raise RuntimeError("an illegal access\nand more")

    monkeypatch.setattr(gpu_jobs, "figures_of", job)
    assert not gpu_jobs.run("kernels", tmp_path / "k.json", CPU, 60)
    found = json.loads((tmp_path / "k.json").read_text())
    assert found["figures"] == {"first": {"a": 1}}
    assert found["error"] == "RuntimeError: an illegal access"
    assert "test_bench_gpu.py" in " ".join(found["traceback"])
    assert not gpu_jobs.run("kernels", tmp_path / "k.json", CPU, 0)
    assert "the time was up after first" in json.loads((tmp_path / "k.json").read_text())["error"]


@pytest.mark.parametrize("job", ["kernels", "7b-full", "7b-lora", "70b-qlora", "decode"])
def test_a_job_runs_to_its_end_on_tiny_shapes(tmp_path: Path, job: str) -> None:
    assert gpu_jobs.run(job, tmp_path / "job.json", CPU, 120), (tmp_path / "job.json").read_text()
    figures = json.loads((tmp_path / "job.json").read_text())["figures"]
    assert not any("error" in one for one in figures.values()), figures


@pytest.mark.prove
@pytest.mark.parametrize("job", ["correct", "peft-7b-lora"])
def test_a_long_job_runs_to_its_end_on_tiny_shapes(tmp_path: Path, job: str) -> None:
    test_a_job_runs_to_its_end_on_tiny_shapes(tmp_path, job)


def test_the_cpu_agrees_with_itself() -> None:
    found = gpu_checks._beside_the_cpu("cpu", gpu_checks.METHODS["lora, dropout"], "float32")
    assert found["loss"] == found["cpu_loss"]
    assert found["worst_gradient"] == 0


def test_a_point_that_runs_out_of_memory_is_a_figure_and_another_error_ends_the_job() -> None:
    def out_of_memory() -> dict[str, Any]:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB\nand more")

    def broken() -> dict[str, Any]:
        raise RuntimeError("an illegal access")

    assert gpu_steps.within_memory(out_of_memory)["out_of_memory"]
    with pytest.raises(RuntimeError):
        gpu_steps.within_memory(broken)


def test_the_peer_runs_the_points_that_have_8192_tokens() -> None:
    ours, theirs = gpu_steps.points("7b", "lora", False), gpu_steps.points("7b", "lora", False, "peft")
    assert list(ours) == list(theirs) == ["512 x 1, checkpointed", "2048 x 4, checkpointed", "2048 x 4, saved"]
    assert [p.tokens for p in theirs.values()][1:] == [8192, 8192]


# ---- arithmetic, and the peer ----------------------------------------------------------------------------------------


def test_operations_per_token_are_six_for_each_trained_value_and_four_for_each_frozen_one() -> None:
    shape = instantiate(point.llama("7b"))
    embedding = 32000 * 4096
    attention = 6 * 512 * 4096 * 32
    assert (
        gpu_steps.flops_per_token(shape, "full", 512, 0) == 6 * (shape.parameters - embedding - shape.small) + attention
    )
    adapters = 16 * 32 * (4 * 8192 + 3 * (4096 + 11008))
    frozen = 4 * (shape.parameters - embedding - shape.small)
    assert gpu_steps.flops_per_token(shape, "lora", 512, 16) == frozen + 6 * adapters + attention


def test_the_peer_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    one = point.Point(model="tiny", method="qlora", sequence=8, batch=1)
    assert peft_point.missing(one) == ""
    find = peft_point.importlib.util.find_spec
    monkeypatch.setattr(
        peft_point.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    assert peft_point.missing(one) == "bitsandbytes is not installed"


def test_both_sides_store_and_train_as_many_values() -> None:
    one = point.Point(model="tiny", method="qlora", sequence=8, batch=1, rank=3)
    base = point.base_of(point.llama("tiny"), "nf4", "cpu")
    found = point.train_steps(base, one, steps=1, warm_up=1)
    assert len(found["losses"]) == 2
    bank = next(m.bank for m in base.stored().values() if m.bank is not None)
    assert {slot.rank for slot in bank.adapters.values()} == {3}  # type: ignore[attr-defined]
    model, _, _ = peft_point.prepare(peft_point.build(one, torch.device("cpu")), one)
    ours = sum(p.numel() for m in base.stored().values() if m.bank is not None
               for slot in m.bank.adapters.values() for p in slot.named().values())  # type: ignore[attr-defined] # fmt: skip
    assert ours == sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_says_what_bench_results_has() -> None:
    page = gpu.PAGE.read_text(encoding="utf-8")
    assert gpu_page.with_section(page, gpu.read(gpu.RESULTS)) == page
    assert ("Not yet run on a GPU" in page) == (gpu.read(gpu.RESULTS) is None)


def _result() -> dict[str, Any]:
    step = {"plan": {"bytes": 5 << 30}, "tokens_per_second": 4000.0, "share": 0.5, "allocated": 5 << 30, "reserved": 6 << 30,
            "profile": {"busy": 0.9, "launches": 4948}}  # fmt: skip
    full = {"plan": {"bytes": 90 << 30}, "out_of_memory": True}
    decode = {
        "tokens_per_second": 600.0,
        "seconds_per_step": 0.02,
        "bytes_per_second": 1e12,
        "synchronisations": {"a:1": 1},
    }
    beside = {"found": {"cpu_loss": 3.5, "loss": 3.5001, "worst_gradient": 2e-5}, "seconds": 1.0}
    checks = {"Triton kernels: a": {"found": True}, "Triton kernels: b": {"error": "no such GPU"}}
    jobs: dict[str, Any] = {
        "environment": {"figures": {"torch": {"name": "NVIDIA H200", "version": "2.11"}, "self checks": checks,
                                    "matrix rate": {"found": {"flops": 7e14, "matrix": "8192x8192 bfloat16"}}}},
        "correct": {"figures": {"lora": beside, "dora": {"error": "bad"}, "resumed": {"found": {"same bits": True}}}},
        "kernels": {"figures": {"memory": {"copy": {"microseconds": 900.0, "gb_per_second": 4000.0}}}, "error": "hung"},
        "7b-lora": {"figures": {"matrix rate": {"flops": 7e14}, "2048 x 4, saved": step}},
        "7b-full": {"figures": {"512 x 1, checkpointed": full}},
        "peft-7b-lora": {"figures": {"2048 x 4, saved": {**step, "tokens_per_second": 3000.0}}},
        "decode": {"figures": {"copy": {"bytes_per_second": 4e12}, "nf4, batch 16": decode}},
    }  # fmt: skip
    about = {"date": "2026-11-30 12:00", "small": False, "device": "cuda"}
    return {"jobs": {name: {**job, **about} for name, job in jobs.items()}}


def test_the_page_has_every_figure_and_names_what_failed() -> None:
    written = gpu_page.section(_result())
    for line in (
        "NVIDIA H200, torch 2.11, 2026-11-30; a matmul of 8192x8192 bfloat16 reaches 700 TFLOP/s.",
        "1 of 2 checks of kernels against the reference passed.\n- Triton kernels: b: no such GPU",
        "| lora | 3.50000 | 3.50010 | 2.0e-05 |",
        "`--deterministic`: the same bits.",
        "| 7b-lora 2048 x 4, saved | 4,000 | 50% | 90% | 4,948 | 5.00 | 6.00 | 5.00 | 3,000 | 5.00 |",
        "| 7b-full 512 x 1, checkpointed | out of memory | | | | | | 90.00 | | |".replace("| |", "|  |").replace(
            "| |", "|  |"
        ),
        "| nf4, batch 16 | 600 | 20.0 | 25% | 1 |",
        "| memory: copy | 900 | 4,000 |",
        "- **kernels**: hung",
    ):
        assert line in written, (line, written)


def test_figures_of_tiny_shapes_do_not_become_the_page() -> None:
    result = _result()
    result["jobs"]["decode"]["small"] = True
    with pytest.raises(ValueError, match="without --small"):
        gpu_page.section(result)
    with pytest.raises(ValueError, match="lacks the marks"):
        gpu_page.with_section("no marks", None)
