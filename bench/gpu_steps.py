"""The jobs of training steps of `gpu.py`: Llama 2 of random weights by Graft's own step, and by PEFT, at the same points.

For each point: seconds a step (median; no sanity checks), tokens a second and their share of the matmul rate, allocated and
reserved memory beside the plan, and one more step each under the profiler and under PyTorch's warnings of synchronisations.
A point that runs out of memory is a figure, and the next one is tried.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_checks import first_line
from gpu_jobs import Figures, Where
from gpu_kernels import matrix_rate
from point import Point, base_of, examples, llama

from graftlm.adapters.attach import detach
from graftlm.config import TrainConfig
from graftlm.planning.instantiate import instantiate
from graftlm.planning.shapes import ModelShape
from graftlm.training.run import make_adapter, make_trial
from graftlm.training.trainer import optimizer_step

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "gpu"))

from traced_memory import TracedRun, plan

WARM_UP, TIMED = 2, 3
LADDER = {"optimizer": "adamw-8bit", "optimizer_in_backward": True, "max_grad_norm": 0.0}
"""Full training of bfloat16 weights with everything that saves memory on the GPU itself."""
VARIANTS: dict[str, dict[str, Any]] = {
    "qlora": {"method": "qlora"},
    "lora": {"method": "lora"},
    "full": {"method": "full", "options": LADDER},
}
SIZES = ((512, 1, True), (2048, 4, True), (2048, 4, False))
"""Tokens of an example, examples, activation checkpointing."""


def points(model: str, variant: str, small: bool, side: str = "graft") -> dict[str, Point]:
    """The points of a job by name; of 70B and of full training the first two sizes alone."""
    sizes = SIZES[:1] if model == "70b" else SIZES[:2] if variant == "full" else SIZES
    if small:
        model, sizes = "tiny", tuple((sequence // 16, batch, on) for sequence, batch, on in sizes[:2])
    found: dict[str, Point] = {}
    for sequence, batch, on in sizes:
        name = f"{sequence} x {batch}, {'checkpointed' if on else 'saved'}"
        point = Point(model=model, side=side, sequence=sequence, batch=batch, checkpointing=on, **VARIANTS[variant])
        found[name] = point if side == "graft" else replace(point, options={})
    return found


def flops_per_token(shape: ModelShape, method: str, sequence: int, rank: int) -> float:
    """Operations of the matmuls that a token's training needs; what checkpointing runs again is not counted.

    Forward 2 for each value of a weight, gradient to the input 2, to a trained weight 2. Causal attention of an example of
    L tokens: two matmuls over L / 2 positions forward, four back.
    """
    full = method == "full"
    head = shape.width * shape.vocabulary
    products = (6 if full else 4) * (shape.stored + head)
    adapter = 0 if full else 6 * rank * sum(w.count * (w.out + w.inner) for w in shape.weights)
    attention = 6 * sequence * shape.attention_width * shape.layers
    return products + adapter + attention


def planned(point: Point, fused: bool) -> dict[str, Any]:
    """What the planner makes of a point from its config alone."""
    config = llama(point.model)
    given = {**point.options, "activation_checkpointing": point.checkpointing, "rank": point.rank}
    run = TracedRun(
        name="", model=_values(config), method=point.method, tokens=point.sequence, batch=point.batch,
        options={**given, "base_precision": point.stored},
    )  # fmt: skip
    found = plan(run, fused=fused)
    return {"bytes": found.training, "moment": found.moment}


def _values(config: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    more = ("vocab_size", "max_position_embeddings", "tie_word_embeddings")
    return {name: getattr(config, name) for name in (*names, *more)}


# ---- Graft's side ----------------------------------------------------------------------------------------------------


def steps(where: Where, *, model: str, variant: str) -> Figures:
    """A base once, then its points, in the order of their memory."""
    device = torch.device(where.device)
    rate = matrix_rate(device)
    yield "matrix rate", rate
    chosen = points(model, variant, where.small)
    first = next(iter(chosen.values()))
    began = time.perf_counter()
    base = base_of(llama(first.model), first.stored, where.device)
    yield "base", {"seconds": time.perf_counter() - began, "bytes": base.bytes, "packs": base.packs,
                   "why not": base.no_packing_reason, "fused norms": base.fused.norms}  # fmt: skip
    shape = instantiate(llama(first.model))
    for name, point in chosen.items():
        found = within_memory(lambda point=point: _ours(base, point, device))
        if "seconds_per_step" in found:
            flops = flops_per_token(shape, point.method, point.sequence, point.rank)
            found["share"] = found["tokens_per_second"] * flops / rate["flops"]
        yield name, {"plan": planned(point, base.fused.norms > 0), **found}
        _release(device)


def within_memory(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a call returns, or that memory ran out; other errors end the job."""
    try:
        return call()
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": True, "error": first_line(error)}


def _ours(base: Any, point: Point, device: torch.device) -> dict[str, Any]:
    config = TrainConfig.build(
        {
            "model": point.model, "data": ["random"], "out": "random", "method": point.method, "base_precision": point.stored,
            "steps": 100, "batch_size": point.batch, "lr_scheduler": "constant", "warmup_ratio": 0.0,
            "activation_checkpointing": point.checkpointing, **point.options,
            **({} if point.method == "full" else {"rank": point.rank}),
        }
    )  # fmt: skip
    _reset_peak(device)
    adapter = make_adapter(base, config)
    try:
        rows = examples(point.batch, point.sequence, base.structure.vocabulary)
        trial = make_trial(base, config, adapter, 0 if adapter is None else 1, rows, None)
        base.structure.checkpoint_layers(config.activation_checkpointing)
        found = timed(lambda: optimizer_step(base, [trial], point.tokens), point, device)
        return {**found, **watched(lambda: optimizer_step(base, [trial], point.tokens), device)}
    finally:
        if adapter is not None:
            detach(base, 1)


def timed(step: Callable[[], Any], point: Point, device: torch.device) -> dict[str, Any]:
    """Seconds a step and peak memory from before the first one."""
    warm_up, count = (1, 1) if point.model == "tiny" else (WARM_UP, TIMED)
    times: list[float] = []
    for _ in range(warm_up + count):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[warm_up:])
    return {
        "seconds_per_step": seconds,
        "tokens_per_second": point.tokens / seconds,
        "first_step": times[0],
        **_peak(device),
    }


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"allocated": None, "reserved": None}
    return {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def watched(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """A step under the profiler, and one under the warnings of synchronisations; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"profile": _profile(step, device), "synchronisations": _synchronisations(step)}


def _profile(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile, supported_activities

    wanted = [one for one in (ProfilerActivity.CPU, ProfilerActivity.CUDA) if one in supported_activities()]
    with profile(activities=wanted) as found:
        began = time.perf_counter()
        step()
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in found.events() or []:
        if event.device_type == DeviceType.CUDA:
            spent[event.name[:120]] += event.time_range.elapsed_us()
            count[event.name[:120]] += 1
    return {
        "seconds": seconds, "launches": count.total(), "busy": spent.total() / 1e6 / seconds,
        "top": [
            {"kernel": name, "share": us / max(1, spent.total()), "count": count[name]} for name, us in spent.most_common(12)
        ],
    }  # fmt: skip


def _synchronisations(step: Callable[[], Any]) -> dict[str, int]:
    """How often the host waited in a step, by file and line."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]
    return dict(Counter(lines).most_common(12))


# ---- the peer --------------------------------------------------------------------------------------------------------


def peer_steps(where: Where, *, model: str, variant: str) -> Figures:
    """The points of `steps` with 8,192 tokens by transformers, PEFT and bitsandbytes; why not, where these are missing."""
    import peft_point

    device = torch.device(where.device)
    chosen = points(model, variant, where.small, "peft")
    for name, point in list(chosen.items())[1:]:
        why = peft_point.missing(point)
        if why:
            yield name, {"left out": why}
            continue

        def measured(point: Point = point) -> dict[str, Any]:
            made = peft_point.build(point, device)
            _reset_peak(device)
            step, optimizer = peft_point.stepper(made, point, device)
            return {**timed(step, point, device), "optimizer": optimizer, **watched(step, device)}

        yield name, within_memory(measured)
        _release(device)
