"""Every architecture, tiny and random, with all three methods; its adapter and its model as others read them.

What is trained is compared with plain transformers, PEFT and torch's AdamW, example by example, without packing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftlm.adapters import peft_format as adapter_format
from graftlm.base.loading import Base, load_base
from graftlm.base.modules import StoredLinear, StoredStack
from graftlm.base.saving import dense_state_dict, save_model
from graftlm.config import Precision
from graftlm.training.trainer import train

every = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
ROWS = tiny.examples()


def loaded(architecture: str, precision: Precision) -> Base:
    return load_base(str(tiny.folder(architecture)), precision=precision, compute_dtype="float32", device="cpu")


def reference(base: Base) -> Any:
    """Plain transformers with the very weights that our base holds, dequantized."""
    model = tiny.plain(base.folder)
    state = {name: value.clone() for name, value in dense_state_dict(base.model, torch.float32).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    model.tie_weights()
    assert set(missing) <= {base.structure.head_name + ".weight"}
    return model


def state_of(base: Base) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in dense_state_dict(base.model, torch.float32).items()}


def trained_plainly(model: Any, steps: int = 3, rate: float = 5e-3) -> list[float]:
    """The same training in plain PyTorch: every example alone, torch's AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0)
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = tiny.mean_loss(model, ROWS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained_by_us(base: Base, adapter: Any, steps: int = 3, micro_batch_tokens: int = 23) -> list[float]:
    heard = tiny.Heard()
    train(base, [tiny.trial(base, adapter, ROWS, steps=steps)], micro_batch_tokens, heard)
    return heard.losses


@every
def test_full_training_equals_plain_pytorch_and_the_saved_folder_loads_in_transformers(
    architecture: str, tmp_path: Path
) -> None:
    base = loaded(architecture, "float32")
    plain = tiny.plain(base.folder)
    before = state_of(base)
    ours, theirs = trained_by_us(base, None), trained_plainly(plain)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]
    unchanged = [name for name, value in state_of(base).items() if torch.equal(value, before[name])]
    assert not [name for name in unchanged if "inv_freq" not in name]

    save_model(base.model, str(tmp_path), torch.float32)
    again = tiny.plain(tmp_path)
    for length in (11, 3):
        found = tiny.plain_logits(again, tiny.ids(length))
        tiny.close(found, tiny.base_logits(base, tiny.ids(length), slot=0))
        tiny.close(found, tiny.plain_logits(plain, tiny.ids(length)), rtol=2e-3)  # three steps of AdamW apart


@every
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4"])
def test_lora_training_equals_peft_and_peft_reads_the_adapter(
    architecture: str, precision: Precision, tmp_path: Path
) -> None:
    base = loaded(architecture, precision)
    plain = reference(base)
    tiny.close(tiny.base_logits(base, tiny.ids(), slot=0), tiny.plain_logits(plain, tiny.ids()))
    before = state_of(base)
    adapter = tiny.adapted(base)
    started = {name: p.detach().clone() for name, p in adapter.parameters().items()}
    first, last = tmp_path / "first", tmp_path / "last"
    first.mkdir()
    last.mkdir()
    adapter_format.save(base, adapter, first, {})

    ours = trained_by_us(base, adapter)
    adapter_format.save(base, adapter, last, {})
    peft = tiny.read_peft(plain, first)
    assert not [name for name, p in peft.named_parameters() if p.requires_grad and "lora_" not in name]
    theirs = trained_plainly(peft)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]

    assert all(torch.equal(value, before[name]) for name, value in state_of(base).items())
    assert not [name for name, p in adapter.parameters().items() if torch.equal(p, started[name])]
    found = tiny.base_logits(base, tiny.ids())
    tiny.close(tiny.plain_logits(peft, tiny.ids()), found, rtol=2e-3)  # three steps of AdamW apart
    read = tiny.read_peft(reference(base), last)
    tiny.close(tiny.plain_logits(read, tiny.ids()), found)


@every
def test_all_linear_names_the_tensors_that_pefts_all_linear_names(architecture: str, tmp_path: Path) -> None:
    base = loaded(architecture, "float32")
    peft = tiny.with_peft(tiny.plain(base.folder), tiny.peft_config(target_modules="all-linear"))
    peft.save_pretrained(tmp_path)
    theirs = {name: tuple(p.shape) for name, p in adapter_format.load(base, tmp_path).parameters().items()}
    ours = {name: tuple(p.shape) for name, p in tiny.adapted(base).parameters().items()}
    if architecture not in tiny.MIXTURES:
        assert ours == theirs
    # In mixtures PEFT doubles the rank of the fused gate and up stacks, and leaves out a layer without experts.
    assert set(theirs) == {name for name in ours if architecture != "qwen3_moe" or ".1.mlp." not in name}


@every
def test_an_adapter_of_pefts_gives_pefts_logits(architecture: str, tmp_path: Path) -> None:
    base = loaded(architecture, "float32")
    peft = tiny.with_peft(tiny.plain(base.folder), tiny.peft_config(target_modules="all-linear", use_rslora=True))
    peft.save_pretrained(tmp_path)
    adapter = adapter_format.load(base, tmp_path)
    tiny.attach(base, adapter, slot=1)
    expected = tiny.plain_logits(peft, tiny.ids())
    tiny.close(tiny.base_logits(base, tiny.ids()), expected)
    assert (tiny.base_logits(base, tiny.ids(), slot=0) - expected).abs().max() > 0.05


@every
def test_the_nf4_base_holds_what_bitsandbytes_stores(architecture: str) -> None:
    base = loaded(architecture, "nf4")
    source = dict(tiny.plain(base.folder).state_dict())
    found = dense_state_dict(base.model, torch.float32)
    modules = dict(tiny.plain(base.folder).named_modules())
    quantized = 0
    for name, module in base.stored().items():
        if module.compressed is None:
            continue
        quantized += 1
        key = name if isinstance(module, StoredStack) else f"{name}.weight"
        transposed = isinstance(module, StoredLinear) and isinstance(modules[name], Conv1D)
        weight = source[key].T.contiguous() if transposed else source[key]
        # Flat: on CPUs bitsandbytes 0.50 mixes up the scales of rows longer than 64 that are no multiple of 64.
        codes, state = bnb.quantize_4bit(weight.reshape(-1), blocksize=64, compress_statistics=True, quant_type="nf4")
        expected = bnb.dequantize_4bit(codes, state).reshape(weight.shape)
        assert torch.equal(found[key], expected.T if transposed else expected), key
    linears = [m for n, m in modules.items() if isinstance(m, (nn.Linear, Conv1D)) and n != base.structure.head_name]
    assert quantized >= len(linears)
    head = base.structure.head.weight
    assert isinstance(head, nn.Parameter)
    assert head.dtype == torch.bfloat16
