"""What the forks of `forked.py` do, each as one rank: arguments and results are JSON."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from graftlm import files
from graftlm.base.context import ForwardContext
from graftlm.base.loading import load_base
from graftlm.commands.rank import naming
from graftlm.commands.train import train
from graftlm.config import TrainConfig
from graftlm.distributed import group, shard, watch
from graftlm.distributed.group import Ranks
from graftlm.distributed.pulse import Pulse
from graftlm.errors import DataError, Stopped
from graftlm.kernels.moments import zero_moments
from graftlm.kernels.self_check import sample
from graftlm.segments import Segments
from graftlm.serving.engine import sampling
from graftlm.training import checkpoint, layout, trainer
from graftlm.training import optimizer as optimizers
from graftlm.training.loss import weighted_loss
from graftlm.training.optimizer import AdamW
from graftlm.training.trainer import StepResult
from graftlm.training.trial import Trial
from graftlm.training.view import View

group._SEEN_WITHIN = 1.0  # pyright: ignore[reportPrivateUsage]


def run(
    ranks: Ranks,
    config: dict[str, Any],
    stop_after: int | None = None,
    other: dict[str, Any] | None = None,
    bug: str | None = None,
    fault: dict[str, Any] | None = None,
    nodes: int = 1,
) -> Any:
    """A training run, on `nodes` nodes as far as the ranks are told. The last rank gets a SIGTERM after a step, or has `other`
    options, where these are given; `bug` is one of BUGS. With a `fault`, one of FAULTS on one rank, the ranks are watched."""
    if fault is not None:
        ranks = replace(ranks, pulse=Pulse(5))
        with naming(ranks), _watched(ranks, Path(config["out"]).parent / "watch"):
            if ranks.rank == fault["rank"]:
                FAULTS[fault["kind"]](fault["step"])
            return run(ranks, config)
    ranks = replace(ranks, on_machine=ranks.size // nodes)
    last = ranks.rank == ranks.size - 1
    if bug == "has_room_for_a_part_alone":
        layout.fits = lambda *given: len(given) > 4  # it was asked about parts
    elif bug == "has_no_room_on_the_last_rank":
        layout.fits = lambda *given: not last
    elif bug is not None:
        BUGS[bug]()
    if stop_after is not None and last:
        _signal_after(stop_after)
    given = {**config, **(other or {})} if last else config
    return train(TrainConfig.build({**given, "ranks": ranks.size}), View(quiet=True), ranks=ranks)


def stop_while_the_first_saves_slowly(ranks: Ranks, config: dict[str, Any]) -> list[str]:
    """The checkpoints that are there when a rank leaves a run that was stopped."""
    save = checkpoint.save

    def slowly(*given: Any, **options: Any) -> Path:
        time.sleep(1.0 if ranks.first else 0.0)
        return save(*given, **options)

    checkpoint.save = slowly
    with pytest.raises(Stopped):
        run(ranks, config, stop_after=2)
    return [place.name for place in (Path(config["out"]) / "checkpoints").glob("[0-9]*")]


def look_for_the_newest(ranks: Ranks, run: str) -> Any:
    """The newest checkpoint of a run, what is wrong with newer ones, and which files this rank has read."""
    read: list[str] = []
    sha256 = files.sha256

    def noted(path: Path) -> str:
        read.append(f"{path.parent.name}/{path.name}")
        return sha256(path)

    files.sha256 = noted
    found, problems = checkpoint.newest(Path(run), ranks)
    return {"found": found and found.name, "problems": problems, "read": read}


def one_fails(ranks: Ranks) -> None:
    """An error of the second rank alone, in the set-up."""
    with ranks.agreeing():
        if ranks.rank == 1:
            raise DataError("a file is gone")


def one_fails_while_passes_are_made(ranks: Ranks, all_fail: bool) -> None:
    """An error of the second rank alone, or of all, where the others may wait for it in a pass."""
    with ranks.failing_alike():
        if all_fail or ranks.rank == 1:
            raise DataError("a file is gone")


def _signal_after(step: int) -> None:
    """In this process alone: a SIGTERM once a step was taken."""
    taken = trainer.optimizer_step

    def step_and_signal(*given: Any) -> list[StepResult | None]:
        results = taken(*given)
        if results[0] is not None and results[0].step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return results

    trainer.optimizer_step = step_and_signal


def optimizer_of_rows(ranks: Ranks, forgets_the_place: bool = False) -> Any:
    """Three steps of AdamW over rows of split parameters; which of them end in the bits that one rank's whole ones have."""
    if forgets_the_place:
        optimizers.offset = lambda tensor: 0
    mesh, rows = init_device_mesh("cpu", (ranks.size,)), [Shard(0)]
    shapes = {
        "wide": (20, 256),
        "odd": (97, 51),
        "few": (2, 3072),
    }  # blocks of 256 in each row; none; fewer rows than ranks
    start = {name: sample(*shape).bfloat16() for name, shape in shapes.items()}
    made = {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "weight_decay": 0.1, "seed": 5, "eight_bit": True}
    whole = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    split = {name: nn.Parameter(distribute_tensor(value.clone(), mesh, rows)) for name, value in start.items()}
    ours, truth = AdamW(split, **made), AdamW(whole, **made)
    # Without whole blocks in a row, a split one keeps 32 bits.
    truth.moments["odd"] = zero_moments(97 * 51, eight_bit=False, device=torch.device("cpu"))
    for step in range(3):
        for name, value in start.items():
            gradient = sample(*value.shape).roll(step + 1).bfloat16()
            whole[name].grad, split[name].grad = gradient, distribute_tensor(gradient, mesh, rows)
        assert abs(ours.gradient_norm() / truth.gradient_norm() - 1) < 1e-12
        ours.step(0.01, 0.5)
        truth.step(0.01, 0.5)
    found = {name: shard.whole(parameter) for name, parameter in split.items()}
    same = [name for name in shapes if torch.equal(found[name], whole[name])]
    return {"same": same, "states": sorted(ours.moments)}


def traffic_of_a_pass(ranks: Ranks, model: str, nodes: int = 1) -> Any:
    """Bytes that a full pass gathers and scatters among how many ranks, and sums over nodes, and what a rank keeps, for a
    model of its own."""
    sent = {"gathered": 0, "scattered": 0, "summed": 0}
    among: set[int] = set()

    def counted(real: Any, what: str) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            whole = given[0] if given else options["input"]  # what is gathered into, what is scattered
            sent[what] += whole.nbytes
            among.add(options["group"].size())
            return real(*given, **options)

        return call

    if nodes > 1:
        ranks = replace(ranks, on_machine=ranks.size // nodes).split_in_nodes()
    base = load_base(model, precision="float32", device="cpu", ranks=ranks, trains_base=True)
    parameters = base.train_all()
    dist.all_gather_single = counted(dist.all_gather_single, "gathered")
    dist.reduce_scatter_single = counted(dist.reduce_scatter_single, "scattered")
    dist.all_reduce = counted(dist.all_reduce, "summed")
    context = ForwardContext(Segments(lengths=(7,), slots=(0,)))
    ids = torch.arange(7)

    def passed() -> Any:
        hidden = base.hidden(ids, context)
        with base.structure.with_head():
            return weighted_loss(base, hidden, ids, torch.ones(7), ((0, 0, 7),), context)[0]

    base.structure.in_pass(passed).backward()
    split = {name: p for name, p in parameters.items() if shard.is_split(p)}
    layers = sum(padded(p, ranks.parts) for name, p in split.items() if ".layers." in name)
    outer = sum(padded(p, ranks.parts) for name, p in split.items() if ".layers." not in name)
    kept = sum(shard.local(p).nbytes for p in split.values())
    return {**sent, "layers": layers, "outer": outer, "kept": kept, "among": sorted(among)}


def padded(parameter: Any, size: int) -> int:
    """Bytes of a parameter whose rows are as many on each rank."""
    return -(-len(parameter) // size) * size * (parameter.numel() // len(parameter)) * parameter.element_size()


def averages() -> None:
    split = shard._split

    def split_and_divide(module: Any, *given: Any) -> None:
        split(module, *given)
        module.set_gradient_divide_factor(2.0)

    shard._split = split_and_divide


def leaves_vectors_apart() -> None:
    Ranks.add_up_gradients = lambda self, parameters: None


def steps_whole_tensors() -> None:
    optimizers.local = lambda tensor: tensor


def makes_no_blank_pass() -> None:
    trainer.even_passes = lambda base, groups, blank: list(groups)


def fills_the_disk_of_the_last_rank() -> None:
    write = checkpoint.write

    def write_or_fail(path: Path, tensors: Any) -> None:
        if "rows-00002" in path.name and "000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors)

    checkpoint.write = write_or_fail


def cannot_rename_its_folder() -> None:
    put = files._put

    def put_or_fail(temporary: Path, target: Path) -> None:
        if target.name == "000002":
            raise OSError(errno.EIO, "Input/output error")
        put(temporary, target)

    files._put = put_or_fail


def samples_other_tokens_on_the_last_rank() -> None:
    sample_all = sampling.sample_all

    def sample_others(*given: Any) -> Any:
        found = sample_all(*given)
        return [(token + 1, logprobs) for token, logprobs in found] if dist.get_rank() else found

    sampling.sample_all = sample_others


BUGS = {bug.__name__: bug for bug in (
    averages, leaves_vectors_apart, steps_whole_tensors, makes_no_blank_pass, fills_the_disk_of_the_last_rank,
    cannot_rename_its_folder, samples_other_tokens_on_the_last_rank,
)}  # fmt: skip
"""Mistakes that could be made and what could go wrong, made in this process."""


# ---- faults of one rank ----------------------------------------------------------------------------------------------


@contextmanager
def _watched(ranks: Ranks, file: Path) -> Iterator[None]:
    def tell(message: str) -> None:
        Path(os.environ["RANK_ENDED"]).write_text(json.dumps({"kind": "watch", "told": message}))

    watch.PERIOD = 0.1
    with watch.watched(ranks.pulse, ranks.rank, ranks.size, dist.FileStore(str(file), ranks.size), tell):
        yield


def _hang(step: int) -> None:
    _before_step(step, lambda: time.sleep(1000))


def _freeze(step: int) -> None:
    _before_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def _before_step(step: int, do: Any) -> None:
    taken = trainer.optimizer_step

    def with_fault(base: Any, trials: Any, *given: Any) -> list[StepResult | None]:
        if trials[0].step + 1 == step:
            do()
        return taken(base, trials, *given)

    trainer.optimizer_step = with_fault


def _killed_while_saving(step: int) -> None:
    _when_written(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _full_disk(step: int) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _when_written(step, full)


def _when_written(step: int, do: Any) -> None:
    """When the tensors of a step's checkpoint are written, and its manifest is not."""
    save, sha256 = checkpoint.save, files.sha256

    def at_the_manifest(path: Path) -> str:
        files.sha256 = sha256
        do()
        return sha256(path)

    def saving(out: Path, trial: Trial, *given: Any) -> Any:
        if trial.step == step:
            files.sha256 = at_the_manifest
        return save(out, trial, *given)

    checkpoint.save = saving


FAULTS = {"hang": _hang, "freeze": _freeze, "killed while saving": _killed_while_saving, "full disk": _full_disk}
