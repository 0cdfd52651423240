"""One rank's step on a fake card with its weights split by FSDP2: the process that `bench/ranks.py` starts for each row.

    python ranks_step.py '{"config": {...}, "method": "lora", "precision": "nf4", "tokens": 1024, "cards": 2, ...}'

Prints {"peak": bytes held at once in the second step, "moved": bytes that the rank sends in it}. `split` is the one place that
says how a model is split.
"""

# pyright: basic

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpu")]


def guard() -> str:
    """The folder of the fake card's guard, compiled by another process: PyTorch must not be loaded before it."""
    import subprocess

    code = "from fixtures import compile_guard; print(compile_guard())"
    place = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'gpu'}"}
    import os

    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **place}, capture_output=True, text=True, check=True
    ).stdout.strip()


sys.path[:0] = [guard()]
for name in ("peft", "bitsandbytes"):  # neither believes in the card
    sys.modules[name] = None  # type: ignore[assignment]
import fake_card  # noqa: E402

fake_card.install()

import scenarios  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_state  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from graftlm.base.loading import Base, random_base  # noqa: E402
from graftlm.base.modules import Stored  # noqa: E402
from graftlm.config import TrainConfig  # noqa: E402
from graftlm.kernels import reference  # noqa: E402
from graftlm.planning.memory import optimizer_bytes  # noqa: E402
from graftlm.planning.method import TrainingSetting  # noqa: E402
from graftlm.training import micro_batch, trainer  # noqa: E402
from graftlm.training.micro_batch import BatchItem, collate  # noqa: E402
from graftlm.training.run import set_checkpointing  # noqa: E402

MOVED = [0]
_waiting: list[Any] = []


class Card(fake_card.FakeCard):
    """The fake card, which also counts storages that FSDP2 empties and fills again."""

    def resize(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if storage.size() == size:
            return
        storage.resize_(size)
        held = -(-size // 512) * 512
        self.bytes += held - self._held.get(storage._cdata, 0)
        self._held[storage._cdata] = held
        self.trace.peak_bytes = max(self.trace.peak_bytes, self.bytes)


class Stream(fake_card._Stream):
    """Streams and events of a card on which everything has happened at once."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = device

    def record_event(self, event: Any = None) -> Event:
        return Event()


class Event:
    def __init__(self, *given: Any, **options: Any) -> None: ...

    def record(self, *given: Any) -> None: ...

    def wait(self, *given: Any) -> None: ...


class Sending:
    """FSDP2's gathers and sums, of which only the bytes are counted."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *given: Any, **options: Any) -> None:
        ranks = dist.get_world_size()
        MOVED[0] += max(output_tensor.nbytes, input_tensor.nbytes) * (ranks - 1) // ranks


def install(card: Card) -> None:
    """PyTorch's FSDP2 on the fake card."""
    torch.cuda.Stream = torch.cuda.current_stream = torch.accelerator.current_stream = Stream  # type: ignore[assignment]
    torch.cuda.Event = Event  # type: ignore[assignment,misc]
    _fsdp_param.alloc_storage = lambda tensor: card.resize(tensor, tensor.numel() * tensor.itemsize)
    _fsdp_param.free_storage = lambda tensor: card.resize(tensor, 0)

    def at_the_end(state: Any) -> None:  # the engine would ask the card for its streams
        if not state._state_ctx.post_backward_final_callback_queued:
            state._state_ctx.post_backward_final_callback_queued = True
            _waiting.append(state._root_post_backward_final_callback)

    _fsdp_state.FSDPState._register_root_post_backward_final_callback = at_the_end  # type: ignore[method-assign]


class _Root(nn.Module):
    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.model, self.head_unit = model, head

    def forward(self, call: Any) -> Any:
        return call()


class _Head(nn.Module):
    """The head, gathered by hand for the loss."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head


def split(base: Base, cards: int) -> tuple[nn.Module, nn.Module]:
    """Split a base's weights: each layer, the embedding and the head a unit, vectors whole.

    Returns what a pass runs in, and the head's unit."""
    mesh = init_device_mesh("cuda", (cards,))
    _compressed_as_parameters(base)
    for module in base.model.modules():
        module.__dict__.pop("weight", None)  # handles that stand for weights
    kept = {
        p
        for p in base.model.parameters()
        if (p.ndim < 2 and p.requires_grad) or (p.ndim == 1 and p.is_floating_point())
    }
    kept -= {p for m in base.model.modules() if isinstance(m, Stored) for n, p in m._parameters.items() if n in _PARTS}

    def unit(module: Any) -> Any:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=kept)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_custom_all_gather(Sending())
        module.set_custom_reduce_scatter(Sending())
        return module

    for layer in base.structure.layers:
        unit(layer)
    unit(base.structure.embedding)
    head = unit(_Head(base.structure.head))
    kept |= set(base.structure.head.parameters())
    root = unit(_Root(base.model, head))
    root.set_reduce_scatter_unused_params(True)
    return root, head


_PARTS = ("packed", "absmax", "absmax_scale", "values", "scale")  # of a compressed weight


def _compressed_as_parameters(base: Base) -> None:
    """Codes and scales as frozen parameters, which FSDP2 splits; the form is made of them when it is used."""

    def compressed(module: Stored) -> Any:
        form = module.__dict__.get("_form_of_parts")
        return form and replace(form, **{n: module._parameters[n] for n in _PARTS if n in module._parameters})

    forms = {m: m.compressed for m in base.model.modules() if isinstance(m, Stored) and m.compressed is not None}
    for module, form in forms.items():
        parts = {n: t for n, t in form.tensors().items() if n in _PARTS}
        module.compressed = None
        for name, tensor in parts.items():
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        module.__dict__["_form_of_parts"] = replace(form, **{n: t.to("meta") for n, t in parts.items()})
    if forms:
        Stored.compressed = property(compressed)  # type: ignore[assignment]


def step(row: dict[str, Any]) -> dict[str, int]:
    """The second step of a rank."""
    reference.SLAB = 1 << 40  # each weight is stored in one piece: sooner traced, and loading is not counted
    with Card() as card:
        install(card)
        config = LlamaConfig(**row["config"])
        base = random_base(config, scenarios._tokenizer(), precision=row["precision"], device="cuda", training=True)
        full = row["method"] == "full"
        trial = (
            None if full else scenarios._trial(base, row["method"], [row["tokens"]], {"activation_checkpointing": True})
        )
        if full:
            _train_all(base)
        root, head = split(base, row["cards"])
        _run_in(root, head)
        states = _moments(root, row) if full else None
        for _ in range(2):
            card.reset()
            MOVED[0] = 0
            if trial is not None:
                trainer.optimizer_step(base, [trial], row["tokens"])
                whole = sum(4 * p.numel() for p in trial.parameters.values())
            else:
                _pass(base, root, row)
                whole = sum(4 * p.numel() for p in root.parameters() if p.ndim == 1)
        del states
        ranks = row["cards"]
        return {"peak": card.trace.peak_bytes, "moved": MOVED[0] + 2 * whole * (ranks - 1) // ranks}


def _train_all(base: Base) -> None:
    for parameter in base.model.parameters():
        parameter.requires_grad_(True)
    values = {
        "model": "random",
        "data": ["random"],
        "out": "random",
        "method": "full",
        "activation_checkpointing": True,
    }
    set_checkpointing(TrainConfig.build(values), base)


def _run_in(root: Any, head: Any) -> None:
    """Let every pass run inside the root, and the loss with the head gathered."""
    forward, loss_of = micro_batch.forward, micro_batch.weighted_loss

    def loss(*given: Any) -> Any:
        head.unshard()
        try:
            return loss_of(*given)
        finally:
            head.reshard()

    def backward(loss: torch.Tensor) -> None:
        micro_batch.backward(loss)
        while _waiting:
            _waiting.pop()()

    micro_batch.weighted_loss = loss
    trainer.forward = lambda *given, **options: root(lambda: forward(*given, **options))
    trainer.backward = backward


def _moments(root: nn.Module, row: dict[str, Any]) -> torch.Tensor:
    """AdamW's moments of this rank's values; with steps in the backward pass no gradient stays."""
    setting = TrainingSetting(key="", label="", method="full", precision="bfloat16", optimizer=row["optimizer"])
    own = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in root.parameters())

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in root.parameters() if row["in_backward"] else ():
        parameter.register_post_accumulate_grad_hook(drop)
    return torch.empty(optimizer_bytes(own, setting), dtype=torch.uint8, device="cuda")


def _pass(base: Base, root: nn.Module, row: dict[str, Any]) -> None:
    for parameter in root.parameters():
        parameter.grad = None
    example = scenarios._examples([row["tokens"]]).examples[0]
    batch = collate(base, [BatchItem(example, 0, (0, 0), 1.0 / row["tokens"])])
    loss, _ = trainer.forward(base, batch, defer_tied_head_gradient=row["in_backward"])
    trainer.backward(loss)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=asked["cards"])
    print(json.dumps(step(asked)))
