"""A rank whose weights are split by FSDP2, on the fake card: the others are not there, and what is sent to them goes nowhere.

The stand-ins are those of `fake_fsdp.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fake_fsdp
import scenarios
import torch.distributed as dist
from fake_card import FakeCard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

from graftlm.base.splitting import modules_on_host
from graftlm.distributed import shard
from graftlm.distributed.group import Ranks
from graftlm.training import trainer
from graftlm.training.sanity_checks import UpdateCheck

RANKS = 2


class _Card(FakeCard):
    pinned = 0
    """Bytes that were copied into pinned memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func._schema.name == "fsdp::all_gather_copy_in"
        ):  # a fake run of it gives copies; it copies into its second argument
            _, output, _, count, rank = args
            return output.narrow(0, count * rank, count), output
        if func._schema.name in ("aten::_pin_memory", "aten::pin_memory"):
            self.pinned += args[0].nbytes
        return super().__torch_dispatch__(func, types, args, kwargs)


def _sent(*given: Any, **options: Any) -> None: ...


def _install() -> None:
    """A process group of one rank that is there, and PyTorch's FSDP2 on the fake card."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    dist.all_gather_single = dist.reduce_scatter_single = dist.all_reduce = _sent  # type: ignore[assignment]
    fake_fsdp.install()


def host_layers(method: str, precision: Any, layers: int, host_layers: int, **options: Any) -> dict[str, Any]:
    """Three steps of a rank, some layers' rows on the host: where rows, gradients and states are, and what is copied."""
    _install()
    with _Card() as card:
        config = LlamaConfig(**scenarios._SIZES, num_hidden_layers=layers)
        base = fake_fsdp.split_base(
            config, precision, Ranks(0, RANKS), trained=method == "full", host_layers=host_layers
        )
        model: Any = base.model
        waiting = modules_on_host(model, host_layers)
        trial = scenarios._trial(base, method, [40], options)
        check = UpdateCheck(base, trial.parameters, trial.optimizer.epsilon)
        found: dict[str, Any] = {}
        for _ in range(2):  # what the check finds after the third is about values, which are not there
            card.reset()
            trainer.optimizer_step(base, [trial], 40, {trial.slot: check})
        split = {name: p for name, p in model.named_parameters() if shard.is_split(p)}
        owners = {id(p): module for module in model.modules() for p in module._parameters.values()}
        for name, where in (("host", True), ("card", False)):
            rows = [shard.local(p) for p in split.values() if (owners[id(p)] in waiting) == where]
            found[name] = sorted({t.device.type for t in rows})
            found[f"{name}_bytes"] = sum(t.nbytes for t in rows)
            found[f"{name}_states"] = sorted({
                trial.optimizer.moments[n].device.type for n, p in trial.parameters.items()
                if shard.is_split(p) and (owners[id(p)] in waiting) == where
            })  # fmt: skip
        on_host = next(layer for layer in model.model.layers if layer in waiting)
        found["device"] = replace(base, model=on_host).device.type  # as of a base whose first parameter is on the host
        found["whole"] = sorted({shard.whole(p).device.type for p in split.values()})
        return {**found, "pinned": card.pinned, "trace": card.trace.to_json()}
