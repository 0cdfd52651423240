"""The jobs `environment` and `correct` of `gpu.py`: what is installed and trusted, and whether a GPU computes what a CPU does.

Nothing is judged here: figures are written down, with what a CPU's own rounding would explain beside them in the page.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_jobs import Figures, Where

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "peft", "bitsandbytes", "trl", "pydantic", "re2",
    "safetensors", "datasets", "yaml", "rich", "typer", "numpy", "jinja2", "graftlm",
)  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "full, bfloat16": {"method": "full", "base_precision": "bfloat16"},
    "lora": {"method": "lora", "base_precision": "float32"},
    "lora, dropout": {"method": "lora", "base_precision": "float32", "lora_dropout": 0.1},
    "dora": {"method": "lora", "base_precision": "float32", "dora": True},
    "lora on int8": {"method": "lora", "base_precision": "int8"},
    "qlora": {"method": "qlora"},
    "qlora, checkpointed": {"method": "qlora", "activation_checkpointing": True},
}
STEPS = 2  # on the CPU, so that no B is zero any more


def first_line(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:300]}"


def tried(call: Callable[[], Any]) -> dict[str, Any]:
    """What a call returns and how long it takes, or the error that it raises."""
    began = time.perf_counter()
    try:
        return {"found": call(), "seconds": time.perf_counter() - began}
    except Exception as error:
        return {"error": first_line(error), "seconds": time.perf_counter() - began}


# ---- what is here ----------------------------------------------------------------------------------------------------


def environment(where: Where) -> Figures:
    """Packages, the machine, what Graft's kernels say of it, and each check before first use."""
    yield "packages", {name: tried(lambda name=name: _version(name, where.small)) for name in PACKAGES}
    device = torch.device(where.device)
    yield "torch", {"version": torch.__version__, "cuda": torch.version.cuda, **_card(device)}
    from machine import described

    yield "machine", described()
    from graftlm import kernels

    yield "backend", tried(lambda: kernels.backend(device))
    yield "self checks", {name: tried(check) for name, check in _self_checks(device)}
    yield "varlen attention", tried(_varlen)
    yield "a tiny base", tried(lambda: _tiny(device))
    from gpu_kernels import matrix_rate

    yield "matrix rate", tried(lambda: matrix_rate(device))


def _version(name: str, small: bool) -> str:
    """A package's version once it is imported; with `small` only whether it is there, which takes no time."""
    if small and importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"No module named {name!r}")
    module = None if small else importlib.import_module(name)
    return str(getattr(module, "__version__", "has no version"))


def _card(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": device.type, "memory": None, "capability": None}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory": found.total_memory,
        "capability": list(torch.cuda.get_device_capability(device)),
    }


def _self_checks(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The check of each operation that Graft has for a GPU, to be called; each runs alone and says why it fails."""
    from graftlm.kernels.native import self_check as of_the_cpu
    from graftlm.kernels.self_check import SelfCheck

    backends = {id(of_the_cpu)}
    for name, module in sorted(sys.modules.items()):
        own = getattr(module, "self_check", None) if name.startswith("graftlm.kernels.") else None
        if not isinstance(own, SelfCheck) or id(own) in backends:
            continue
        backends.add(id(own))
        for operation, check in own._checks.items():  # pyright: ignore[reportPrivateUsage]
            yield f"{own.what}: {operation}", lambda check=check: check(device)


def _varlen() -> str:
    module = importlib.import_module("torch.nn.attention.varlen")
    return f"varlen_attn{inspect.signature(module.varlen_attn)}"


def _tiny(device: torch.device) -> dict[str, Any]:
    from point import base_of, llama

    base = base_of(llama("tiny"), "nf4", str(device))
    return {"packs": base.packs, "why not": base.no_packing_reason, "fused norms": base.fused.norms}


# ---- the CPU's answer beside it --------------------------------------------------------------------------------------


def correct(where: Where) -> Figures:
    """The bundled checkpoint loaded and trained: losses and gradients beside the CPU's, and a run stopped and resumed."""
    methods = dict(list(METHODS.items())[-2:]) if where.small else METHODS
    for name, options in methods.items():
        for dtype in ("float32",) if where.small else ("float32", "bfloat16"):
            found = tried(lambda options=options, dtype=dtype: _beside_the_cpu(where.device, options, dtype))
            yield f"{name}, computed in {dtype}", found
    yield "resumed", tried(lambda: _resumed(where.device))


def _beside_the_cpu(device: str, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    """One micro-batch after two steps on the CPU, there in float32: the loss, and the tensor whose gradient differs most."""
    base, trial = _trial("cpu", options, "float32")
    from graftlm.training.trainer import optimizer_step

    for _ in range(STEPS):
        optimizer_step(base, [trial], 4096)
    other_base, other = _trial(device, options, dtype)
    with torch.no_grad():
        for name, parameter in trial.parameters.items():
            other.parameters[name].copy_(parameter)
    (wanted_loss, wanted), (loss, found) = _gradients(base, trial), _gradients(other_base, other)
    worst, tensor = max((_distance(found[name], gradient), name) for name, gradient in wanted.items())
    return {"cpu_loss": wanted_loss, "loss": loss, "worst_gradient": worst, "tensor": tensor}


def _trial(device: str, options: dict[str, Any], dtype: str) -> tuple[Any, Any]:
    """The bundled base with what the options train on it, over the first of the bundled rows."""
    from graftlm import demo
    from graftlm.base.chat import Encoder
    from graftlm.base.loading import load_base
    from graftlm.config import TrainConfig
    from graftlm.data.sources import named_source
    from graftlm.training.run import make_adapter, make_trial, read_data, set_checkpointing, stored_precision

    config = TrainConfig.build(
        {
            "model": "demo", "data": ["demo"], "out": "unused", "steps": 20, "batch_size": 4, "warmup_ratio": 0.0,
            "max_length": 256, "overlong": "truncate", "compute_dtype": dtype, "device": device, **options,
        }
    )  # fmt: skip
    base = load_base(
        demo.resolve_model("demo"), precision=stored_precision(config), compute_dtype=config.compute_dtype, device=device,
        training=True,
    )  # fmt: skip
    adapter = make_adapter(base, config)
    encoder = Encoder(base.tokenizer, train_on=config.train_on)
    dataset, _ = read_data(config, [named_source("demo", "train")], encoder, base)
    set_checkpointing(config, base)
    return base, make_trial(base, config, adapter, 0 if adapter is None else 1, dataset, None)


def _gradients(base: Any, trial: Any) -> tuple[float, dict[str, torch.Tensor]]:
    from graftlm.training.micro_batch import BatchItem, backward, collate, forward

    trial.optimizer.zero_grad()
    items = [BatchItem(example, trial.slot, (trial.seed, i), 0.01) for i, example in enumerate(trial.examples[:4])]
    loss, _ = forward(base, collate(base, items))
    backward(loss)
    found = {name: p.grad.detach().float().cpu() for name, p in trial.parameters.items()}
    return float(loss.detach()), found


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative difference, by norms."""
    size = float(wanted.norm())
    return float((found - wanted).norm()) / size if size else float(found.norm())


def _resumed(device: str) -> dict[str, Any]:
    """Whether a run of four steps that a signal ends after two, and that goes on, ends in the bits of one that was whole."""
    import graftlm as graft
    from graftlm.errors import Stopped

    class Stop(graft.Callback):
        def on_step(self, metrics: Any) -> None:
            if metrics["step"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    given: dict[str, Any] = {
        "method": "lora", "steps": 4, "batch_size": 4, "device": device, "deterministic": True, "quiet": True,
        "max_length": 128, "overlong": "truncate",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        whole, parts = Path(place) / "whole", Path(place) / "parts"
        graft.train("demo", "demo", out=whole, **given)
        stopped = False
        try:
            graft.train("demo", "demo", out=parts, callbacks=[Stop()], **given)
        except Stopped:
            stopped = True
            graft.train("demo", "demo", out=parts, resume=True, **given)
        name = "adapter/adapter_model.safetensors"
        return {"stopped": stopped, "same bits": (whole / name).read_bytes() == (parts / name).read_bytes()}
