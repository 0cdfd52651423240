"""`graft train --ranks N` as a user starts it, and what a config over ranks is refused for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_run
import torch

import graftlm as graft
from graftlm.commands import rank
from graftlm.commands.ranks import started_for
from graftlm.config import TrainConfig
from graftlm.distributed.deal import deal
from graftlm.distributed.group import Ranks
from graftlm.errors import ConfigError
from graftlm.training.run import resolve


def written(place: Path, **changes: object) -> Path:
    """A run's YAML file."""
    file = place / "run.yaml"
    file.write_text(json.dumps(tiny_run.options(place, **changes)), encoding="utf-8")
    return file


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_over_two_ranks_prints_one_summary_and_a_killed_rank_ends_it(tmp_path: Path) -> None:
    # The launcher imports nothing that ranks alone need: they start seconds sooner.
    imported = tmp_path / "imported.txt"
    code = (
        "import pathlib, sys; from graftlm.cli import main\n"
        f"try: main()\nfinally: pathlib.Path({str(imported)!r}).write_text(' '.join(sys.modules))"
    )
    run = start("-c", code, "train", str(written(tmp_path, ranks=2)), "--json")
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    modules = imported.read_text().split()
    assert "torch.distributed.launcher.api" in modules
    for heavy in (
        "transformers",
        "tokenizers",
        "safetensors",
        "graftlm.base",
        "graftlm.commands.train",
        "torch._inductor",
    ):
        assert heavy not in modules
    summary = json.loads(out)
    assert summary["steps"] == 6
    assert Path(summary["adapter_folder"], "adapter_model.safetensors").is_file()

    config = written(tmp_path, ranks=2, steps=100_000, save_every=5, out=str(tmp_path / "killed"))
    run = start("-m", "graftlm.cli", "train", str(config))
    until = time.monotonic() + 200
    while time.monotonic() < until and not list((tmp_path / "killed").glob("checkpoints/*/manifest.json")):
        time.sleep(0.1)
    ranks = ranks_of(run.pid)
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "TrainingError: rank" in err
    assert "of 2 was killed by SIGKILL, and the others with it; the newest checkpoint is" in err.replace("\n", " ")
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def ranks_of(parent: int) -> list[int]:
    """The processes that a launcher has started."""
    found: list[int] = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue
        if fields["PPid"] == str(parent) and b"rank_main" in (status.parent / "cmdline").read_bytes():
            found.append(int(fields["Pid"]))
    return sorted(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2, "ranks": 3}, "--batch-size 2 leaves some of 3 ranks without an example"),
        (
            {"ranks": 2, "method": "full", "optimizer_in_backward": True, "max_grad_norm": 0},
            "before those of all ranks can be added up",
        ),
        ({"ranks": 2, "device": "cuda:1"}, "--device cuda:1 is one GPU, found --ranks 2"),
        ({"ranks": 0}, "ranks"),
    ],
)
def test_what_cannot_be_trained_over_ranks_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.build(tiny_run.options(tmp_path, **options))


def test_a_launcher_s_number_of_ranks_is_taken_and_another_refused(tmp_path: Path) -> None:
    config = TrainConfig.build(tiny_run.options(tmp_path))
    assert started_for(config, 2).ranks == 2
    asked = TrainConfig.build({**tiny_run.options(tmp_path), "ranks": 4})
    with pytest.raises(ConfigError, match="--ranks 4 inside a launcher that has started 2"):
        started_for(asked, 2)


def test_each_rank_takes_the_gpu_of_its_number_on_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "default_device", lambda asked: torch.device(asked or "cuda"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    config = TrainConfig.build({**tiny_run.options(tmp_path), "device": "cuda", "ranks": 2})
    own = rank._of_rank(config, Ranks(rank=3, size=4, on_machine=2))
    assert (own.device, own.ranks) == ("cuda:1", 2)
    base = SimpleNamespace(
        precision="bfloat16", compute_dtype="bfloat16", device=torch.device("cuda:1"),
        structure=SimpleNamespace(max_positions=8),
    )  # fmt: skip
    written = resolve(own, base, SimpleNamespace(eval_every=1, eval_examples=()), 64)  # pyright: ignore[reportArgumentType]
    assert TrainConfig.build({k: v for k, v in written.items() if v is not None}).device == "cuda"


def test_rows_in_memory_and_callbacks_are_refused_over_ranks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ranks=2 starts processes of its own, which do not have 'data' from memory"):
        graft.train(str(tiny_run.folder()), tiny_run.rows(8), ranks=2, batch_size=4, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_example_is_dealt_to_one_rank_and_no_rank_has_much_more_than_its_part(ranks: int) -> None:
    lengths = [7, 900, 31, 250, 250, 12, 400, 33, 1, 77, 640]
    shares = deal(lengths, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    most = max(sum(lengths[i] for i in share) for share in shares)
    best = max(-(-sum(lengths) // ranks), max(lengths))  # no split has a lower maximum
    assert most <= 4 / 3 * best
