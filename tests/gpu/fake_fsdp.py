"""PyTorch's FSDP2 on the fake card: stand-ins for what it asks of one, and a base that it splits.

The splitting, the passes and the optimizer's step are Graft's own. Stand-ins are streams and events, on which all has happened
at once, and the end of a backward pass, for which PyTorch's engine would ask the card for its streams. What is sent to other
ranks is the business of who installs them: `fake_ranks.py`, `bench/ranks_step.py`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import fake_card
import scenarios
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_state
from transformers import LlamaConfig

from graftlm.base import loading
from graftlm.base.loading import Base
from graftlm.base.random_init import random_stored_model
from graftlm.base.splitting import split_weights
from graftlm.distributed.group import Ranks
from graftlm.training import trainer

_waiting: list[Any] = []


class Stream(fake_card._Stream):
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = device

    def record_event(self, event: Any = None) -> Any:
        return Event()

    def synchronize(self) -> None: ...


class Event:
    def __init__(self, *given: Any, **options: Any) -> None: ...

    def record(self, *given: Any) -> None: ...

    def wait(self, *given: Any) -> None: ...

    def synchronize(self) -> None: ...


def install() -> None:
    """Put the stand-ins in the places of what they stand for, in this process for good."""
    torch.cuda.Stream = torch.cuda.current_stream = torch.accelerator.current_stream = Stream  # type: ignore[assignment]
    torch.cuda.Event = Event  # type: ignore[assignment,misc]

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


def split_base(config: LlamaConfig, precision: Any, ranks: Ranks, *, trained: bool, host_layers: int = 0) -> Base:
    """A base of random weights that ranks share, as `load_base` makes one of a checkpoint's."""
    device = torch.device("cuda")
    model, replacements = random_stored_model(config, precision, torch.bfloat16, device, 0)
    weights = split_weights(model, replacements, ranks, device, trained=trained, host_layers=host_layers)
    understood = partial(
        loading._understood, "random", Path(), model, replacements, scenarios._tokenizer(), precision, "bfloat16", True, [],
    )  # fmt: skip
    with torch.no_grad():
        return weights.run(partial(loading._with_its_head, understood, weights, model))
