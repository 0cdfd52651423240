"""A rank whose weights are split by FSDP2, on the fake card: the others are not there, and what is sent to them goes nowhere.

The splitting, the passes and the optimizer's step are Graft's own. Stand-ins are streams and events, on which all has happened
at once, and the end of a backward pass, for which PyTorch's engine would ask the card for its streams.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fake_card
import scenarios
import torch
import torch.distributed as dist
from fake_card import FakeCard
from torch.distributed.fsdp._fully_shard import _fsdp_state
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

from graftlm.base import loading
from graftlm.base.loading import Base
from graftlm.base.random_init import random_stored_model
from graftlm.base.splitting import modules_on_host, split_weights
from graftlm.distributed import shard
from graftlm.distributed.group import Ranks
from graftlm.training import trainer
from graftlm.training.sanity_checks import UpdateCheck

RANKS = 2
_waiting: list[Any] = []


class _Stream(fake_card._Stream):
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = device

    def record_event(self, event: Any = None) -> Any:
        return _Event()

    def synchronize(self) -> None: ...


class _Event:
    def __init__(self, *given: Any, **options: Any) -> None: ...

    def record(self, *given: Any) -> None: ...

    def wait(self, *given: Any) -> None: ...

    def synchronize(self) -> None: ...


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
    torch.cuda.Stream = torch.cuda.current_stream = torch.accelerator.current_stream = _Stream  # type: ignore[assignment]
    torch.cuda.Event = _Event  # type: ignore[assignment,misc]

    def at_the_end(state: Any) -> None:
        if not state._state_ctx.post_backward_final_callback_queued:
            state._state_ctx.post_backward_final_callback_queued = True
            _waiting.append(state._root_post_backward_final_callback)

    _fsdp_state.FSDPState._register_root_post_backward_final_callback = at_the_end  # type: ignore[method-assign]
    backward = trainer.backward

    def to_the_end(loss: torch.Tensor) -> None:
        backward(loss)
        while _waiting:
            _waiting.pop()()

    trainer.backward = to_the_end


def host_layers(method: str, precision: Any, layers: int, host_layers: int, **options: Any) -> dict[str, Any]:
    """Three steps of a rank, some layers' rows on the host: where rows, gradients and states are, and what is copied."""
    _install()
    with _Card() as card:
        config = LlamaConfig(**scenarios._SIZES, num_hidden_layers=layers)
        ranks, device = Ranks(0, RANKS), torch.device("cuda")
        model, replacements = random_stored_model(config, precision, torch.bfloat16, device, 0)
        waiting = modules_on_host(model, host_layers)
        weights = split_weights(model, replacements, ranks, device, trained=method == "full", host_layers=host_layers)
        tokenizer = scenarios._tokenizer()
        understood = partial(
            loading._understood, "random", Path(), model, replacements, tokenizer, precision, "bfloat16", True, []
        )
        with torch.no_grad():
            base: Base = weights.run(partial(loading._with_its_head, understood, weights, model))
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
