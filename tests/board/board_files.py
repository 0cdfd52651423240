"""What the tests of the board share: run folders, a sweep and a comparison as files, and a board over them on loopback."""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from graftlm.config import SweepConfig
from graftlm.dashboard.app import create_app
from graftlm.dashboard.contents import Contents
from graftlm.dashboard.folders import Folders
from graftlm.experiments.sweep.study import Study

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">'


def step_line(step: int, *, bottom: float = 1.2, rate: float = 2e-4, steps: int = 400) -> str:
    """A line of metrics.jsonl as a run writes it."""
    noise = math.sin(step * 12.9898) * 0.09 + math.sin(step * 78.233) * 0.05
    loss = bottom + 1.9 * math.exp(-5 * step / steps) + noise
    line = {
        "step": step,
        "kind": "train",
        "loss": loss,
        "learning_rate": rate * min(1.0, step / 20) * (1 - step / steps / 1.05),
        "grad_norm": 0.4 + abs(noise) * 4,
        "tokens": 1500 + step % 7,
        "target_tokens": 700,
        "seconds": 0.8 + abs(noise),
        "num_tokens": 1500 * step,
        "epoch": step / 100,
    }
    return json.dumps(line) + "\n"


def eval_line(step: int, loss: float, **more: Any) -> str:
    return (
        json.dumps(
            {"step": step, "kind": "eval", "eval_loss": loss, "eval_examples": 50, "num_tokens": 1500 * step, **more}
        )
        + "\n"
    )


def run(
    folder: Path, steps: int = 400, *, done: bool = True, total: int | None = None, bottom: float = 1.2, **config: Any
) -> Path:
    """A run's folder: with its result where it is `done`."""
    folder.mkdir(parents=True, exist_ok=True)
    total = total or steps
    options = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "data": ["train.jsonl"],
        "method": "qlora",
        "base_precision": "nf4",
        "rank": 16,
        "alpha": 32,
        "targets": ["all-linear"],
        "learning_rate": 2e-4,
        "batch_size": 16,
        "epochs": 1.0,
        "seed": 0,
        "out": str(folder),
        "score": None,
        **config,
    }
    plan = {
        "micro_batch_tokens": 2048,
        "steps": total,
        "predicted": {"peak_bytes": 412_000_000},
        "dry_run_bytes": 398_000_000,
    }
    if done:
        plan["measured"] = {
            "peak_memory_bytes": 701_000_000,
            "idle_memory_bytes": 303_000_000,
            "tokens_per_second": 1810.0,
        }
    files = {
        "config.json": options,
        "plan.json": plan,
        "environment.json": {"versions": {"graftlm": "0.1.0"}, "started": "2026-11-30T09:12:00+00:00"},
        "data.json": {"train": {"rows": 7473, "tokens": 1_200_000}},
    }
    with (folder / "metrics.jsonl").open("w") as stream:
        stream.write(eval_line(0, bottom + 2.0, eval_score=12.5))
        for step in range(1, steps + 1):
            stream.write(step_line(step, bottom=bottom, rate=options["learning_rate"], steps=total))
            if step % max(1, total // 8) == 0:
                stream.write(
                    eval_line(
                        step, bottom + 0.08 + 1.9 * math.exp(-5 * step / total), eval_score=12 + 30 * step / total
                    )
                )
    if done:
        files["summary.json"] = {
            "method": options["method"],
            "steps": steps,
            "eval_loss_before": bottom + 2.0,
            "eval_loss_after": bottom + 0.1,
            "adapter_digest": f"{abs(hash(str(folder))):064x}"[:64],
            "stop_reason": None,
            "tokens_per_second": 1810.0,
        }
        (folder / "adapter").mkdir()
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def samples(
    folder: Path, steps: tuple[int, ...] = (0, 400), answer: str = "The Wrestlers is a family friendly pub."
) -> None:
    with (folder / "samples.jsonl").open("w") as stream:
        for step in steps:
            for i in range(2):
                stream.write(
                    json.dumps(
                        {
                            "step": step,
                            "row": f"valid.jsonl:{i}",
                            "prompt": "name: The Wrestlers, rating: 1 out of 5, near: The Sorrento",
                            "references": ["The Wrestlers, near The Sorrento, is rated 1 out of 5."],
                            "answer": f"{answer} ({step})",
                        }
                    )
                    + "\n"
                )


def sweep(folder: Path, trials: int = 6, *, storage: str | None = None) -> Path:
    """A sweep's folder as `graft sweep` writes it: two more trials are wanted, and the last one has lost its worker."""
    config = sweep_config(folder, trials + 2, storage)
    study = Study(config)
    study.identify({"base": "b", "data": "d"})
    for number in range(trials):
        claim = study.next()
        assert claim is not None
        rate, rank = float(claim.params["learning_rate"]), int(claim.params["rank"])
        loss = 1.3 + 0.4 * (math.log10(rate) + 2.8) ** 2 + 0.3 / rank
        last = number == trials - 1
        run(claim.folder, 80, done=not last, bottom=loss - 0.08, learning_rate=rate, rank=rank)
        if last:
            claim.release()
        else:
            claim.report_result("complete", loss, loss_before=3.2, steps=80)
    return folder


def sweep_config(folder: Path, trials: int, storage: str | None = None) -> SweepConfig:
    given = {"search": {"learning-rate": "1e-4..1e-2", "rank": "4..64"}, "sampler": "random", "data": ["train.jsonl"]}
    return SweepConfig.build({**given, "model": "demo", "trials": trials, "storage": storage, "out": str(folder)})


def comparison(folder: Path) -> Path:
    """A comparison's folder at its end."""
    methods = []
    for i, (name, loss, memory) in enumerate((("full", 1.221, 2.9e9), ("lora", 1.243, 1.1e9), ("qlora", 1.262, 0.7e9))):
        for seed in (0, 1):
            run(folder / "runs" / name / f"seed-{seed}", 60, bottom=loss - 0.1, method=name, seed=seed)
        share = {"low": 0.97 - 0.02 * i, "high": 1.01 - 0.012 * i}
        methods.append(
            {
                "name": name,
                "method": name,
                "trainable_parameters": 135_000_000 if not i else 4_900_000,
                "base_parameters": 135_000_000,
                "base_precision": "float32",
                "peak_planned": int(memory * 0.96),
                "peak_measured": int(memory),
                "idle": 300_000_000,
                "saved_bytes": 270_000_000 if not i else 19_000_000,
                "learning_rate": 2e-5 if not i else 2e-4,
                "loss_before": 3.1,
                "loss": loss,
                "losses": [loss, loss + 0.001],
                "std": 0.001,
                "share": 1 - 0.012 * i,
                "share_interval": share,
                "tokens_per_second": 900 + 300 * i,
                "seconds": 300,
            }
        )
    differences = [
        {
            "first": m["name"],
            "second": "full",
            "mean": m["loss"] - 1.221,
            "interval": {"low": m["loss"] - 1.229, "high": m["loss"] - 1.213},
        }
        for m in methods[1:]
    ]
    verdict = {
        "best": "full",
        "choice": "lora",
        "certain": True,
        "margin": 0.04,
        "differences": differences,
        "sentences": ["lora is within 2 % of full's gain.", "It takes 1.1 GB, where full takes 2.9 GB."],
    }
    (folder / "compare.json").write_text(
        json.dumps(
            {
                "written_by": "graft compare",
                "asked": {"model": "demo", "seeds": 2, "metric": None},
                "reference": "full",
                "lines": methods,
                "failed": {},
                "verdict": verdict,
                "data": {"eval_rows": 400},
                "notes": [],
                "environment": {},
            }
        )
    )
    return folder


VALUES: dict[str, list[Any]] = {
    "other values": [None, [], {}, "x", -1, True, math.nan, [1, "a"], {"low": "x"}],
    "huge values": [1e308, int("9" * 250), -math.inf, 10**20, "long " * 5000],
}


def damage(place: Path, how: str, draw: random.Random) -> None:
    """Damage about a third of the files that a board reads."""
    for file in sorted(place.rglob("*")):
        if file.suffix in (".json", ".jsonl", ".journal") and file.name != "store.json" and draw.random() < 0.35:
            file.chmod(0o644)
            file.write_bytes(_damaged(file.read_bytes(), how, draw))


def _damaged(data: bytes, how: str, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    if how == "cut":
        return data[:at]
    if how == "flipped":
        return data[:at] + bytes(draw.randrange(256) for _ in range(5)) + data[at + 5 :]
    lines = data.decode().splitlines()
    for number in {draw.randrange(len(lines)) for _ in range(4)}:
        try:
            lines[number] = json.dumps(_changed(json.loads(lines[number]), draw.choice(VALUES[how]), draw))
        except ValueError:  # a checksum stands before it
            lines[number] = "x" + lines[number]
    return ("\n".join(lines) + "\n").encode()


def _changed(value: Any, other: Any, draw: random.Random) -> Any:
    """A value in which one of its parts, at any depth, is another."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return other
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    value[key] = _changed(value[key], other, draw)
    return value


class Board:
    """A board that serves."""

    def __init__(self, url: str, contents: Contents) -> None:
        self.url, self.contents = url, contents


@contextmanager
def served(app: Any) -> Iterator[str]:
    """An application on a free port of loopback, in a thread; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", access_log=False, lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


@contextmanager
def board(*folders: Path, store: Path | None = None, server: str | None = None) -> Iterator[Board]:
    """A board over folders."""
    contents = Contents(Folders(folders), store, server)
    with served(create_app(contents)) as url:
        yield Board(url, contents)
