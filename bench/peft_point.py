"""The same point by transformers + PEFT, with bitsandbytes if it is installed, for `gpu_steps.py`.

As in their documentation: a base in bfloat16, or in NF4 with double quantization and prepared by
`prepare_model_for_kbit_training`; LoRA on all linear layers; autocast to bfloat16; AdamW; the gradient's norm clipped to 1;
`gradient_checkpointing_enable` where it is asked for. Full training holds bfloat16 weights and takes bitsandbytes' 8-bit
AdamW where it is there, else PyTorch's. Examples are of one length, so nothing is padded on either side.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from point import Point, examples, llama
from torch import nn
from transformers import AutoModelForCausalLM


def missing(point: Point) -> str:
    """Why the peer cannot run a point here; empty when it can."""
    needed = ["peft"] if point.method != "full" else []
    needed += ["bitsandbytes"] if point.method == "qlora" else []
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        return f"{absent[0]} is not installed"
    return "PEFT has no such base" if point.stored == "int8" or "offload_optimizer" in point.options else ""


def build(point: Point, device: torch.device) -> Any:
    """A model of random weights on the device, its linear layers in NF4 for qlora, one weight at a time."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(llama(point.model), dtype=dtype)
    if point.method == "qlora":
        model = _in_nf4(model, dtype)
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is None and next(module.buffers(recurse=False), None) is None:
            continue
        if type(module).__name__ == "Linear4bit":
            _fill(module, device, dtype)
        else:
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
    model.tie_weights()
    model.config.use_cache = False
    return model


def _in_nf4(model: Any, dtype: torch.dtype) -> Any:
    """bitsandbytes' layers in the place of all linear ones but the head."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=dtype, compress_statistics=True,
                quant_type="nf4", quant_storage=torch.uint8, device="meta",
            )  # fmt: skip
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
    model.is_loaded_in_4bit = True  # what PEFT asks before it wraps these layers
    return model


def _fill(layer: Any, device: torch.device, dtype: torch.dtype) -> None:
    import bitsandbytes

    values = torch.randn(layer.out_features, layer.in_features, dtype=dtype, device=device).mul_(0.02)
    made = bitsandbytes.nn.Params4bit(
        values, requires_grad=False, quant_type="nf4", compress_statistics=True, blocksize=64, module=layer
    )
    layer.weight = made.to(device)  # quantizes


def prepare(model: Any, point: Point) -> tuple[Any, torch.optim.Optimizer, str]:
    """The model as it is trained, its optimizer, and the optimizer's name."""
    if point.method != "full":
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        if point.method == "qlora":
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        lora = LoraConfig(r=point.rank, lora_alpha=2 * point.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    if point.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    if point.method == "full" and importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes

        return model, bitsandbytes.optim.AdamW8bit(trained, lr=2e-5), "bitsandbytes AdamW8bit"
    rate = 2e-5 if point.method == "full" else 2e-4
    return model, torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True), "torch AdamW, fused"


def stepper(model: Any, point: Point, device: torch.device) -> tuple[Callable[[], float], str]:
    """A function that takes one optimizer step over the point's examples, the peer's way, and its optimizer's name."""
    model, optimizer, name = prepare(model, point)
    rows = examples(point.batch, point.sequence, model.config.vocab_size).examples
    ids = torch.stack([torch.from_numpy(row.ids.astype("int64")) for row in rows]).to(device)  # (batch, sequence)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> float:
        narrow = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
        with narrow:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, name
