"""Bytes of each part: equal to what the implementation stores, and parts that sum to the peak."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from graftlm import kernels
from graftlm.adapters import peft_format as adapter_format
from graftlm.base.loading import load_base
from graftlm.base.precision import nbytes, quantize
from graftlm.config import Precision
from graftlm.kernels import moments, reference_adamw, stored
from graftlm.planning import full_step, memory
from graftlm.planning.activations import Workload
from graftlm.planning.instantiate import instantiate
from graftlm.planning.memory import optimizer_bytes, requirement, saved_bytes, stored_bytes, weight_bytes
from graftlm.planning.method import METHODS, NO_ADAPTER, TrainingSetting, adapter_shape
from graftlm.planning.models import find
from graftlm.planning.shapes import Weights
from graftlm.training import loss
from graftlm.training.optimizer import AdamW

LOAD = Workload(tokens=2048, target_tokens=2000, longest=512, examples=4)
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8", "nf4")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(44, 28), (3, 88, 28), (512, 640), (77, 130)], ids=str)
def test_a_stored_weight_takes_the_bytes_that_are_planned(shape: tuple[int, ...], precision: Precision) -> None:
    weight = quantize(torch.randn(shape), precision)
    *experts, out, inner = shape
    planned = Weights(name="x", part="mlp", out=out, inner=inner, count=1, experts=experts[0] if experts else 0)
    assert stored_bytes(planned, precision) == nbytes(weight)


def test_nf4_takes_4_127_bits_a_value() -> None:
    one = Weights(name="x", part="mlp", out=4096, inner=11008, count=1)
    assert stored_bytes(one, "nf4") * 8 / one.values == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_loaded_base_takes_the_bytes_that_are_planned(architecture: str, precision: Precision) -> None:
    base = load_base(str(tiny.folder(architecture)), precision=precision, compute_dtype="float32", device="cpu")
    setting = TrainingSetting(key="", label="", method="lora", precision=precision, compute_dtype="float32")
    assert weight_bytes(instantiate(base.model.config), setting) == base.bytes


@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
def test_embeddings_and_head_stay_in_16_bits(precision: Precision) -> None:
    shape = find("qwen3-8b").shape
    setting = TrainingSetting(key="", label="", method="lora", precision=precision)
    matrices = sum(stored_bytes(w, precision) for w in shape.weights)
    assert weight_bytes(shape, setting) == matrices + 2 * (shape.embedding + shape.head + shape.small)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_optimizer_takes_the_bytes_that_are_planned(eight_bit: bool) -> None:
    values = {"a": nn.Parameter(torch.randn(64, 128)), "b": nn.Parameter(torch.randn(256, 48))}
    optimizer = AdamW(values, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.0, eight_bit=eight_bit)
    for parameter in values.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    setting = TrainingSetting(
        key="", label="", method="full", precision="float32", optimizer="adamw-8bit" if eight_bit else "adamw"
    )
    trained = sum(p.numel() for p in values.values())
    assert optimizer_bytes(trained, setting) == sum(m.nbytes for m in optimizer.moments.values())


def test_an_adapter_file_takes_the_bytes_that_are_planned(tmp_path: object) -> None:
    from pathlib import Path

    base = load_base(str(tiny.folder("llama")), precision="nf4", compute_dtype="float32", device="cpu")
    adapter = tiny.adapted(base, rank=3)
    place = Path(str(tmp_path)) / "adapter"
    place.mkdir()
    adapter_format.save(base, adapter, place, {})
    shape = instantiate(base.model.config)
    planned = saved_bytes(shape, METHODS[-1], adapter_shape(shape, ("all-linear",), 3))
    file = (place / adapter_format.TENSORS).stat().st_size
    assert planned == adapter.bytes
    assert planned < file < planned + 8000  # the header with the tensors' names


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", ["llama-2-7b", "mixtral-8x7b", "gemma-2-2b", "gpt2"])
def test_parts_sum_to_the_peak_at_every_moment(name: str, device: memory.Device) -> None:
    shape = find(name).shape
    for setting in METHODS:
        adapter = NO_ADAPTER if setting.full else adapter_shape(shape, ("all-linear",), 16)
        found = requirement(shape, setting, adapter, LOAD, device, fused=True)
        values = found.parts.to_json()
        assert values.pop("total") == sum(values.values()) == found.training
        assert found.training == max(parts.total for parts in found.moments.values())
        assert found.moments[found.moment] == found.parts


def test_each_rung_of_the_ladder_takes_less_than_the_one_above_it() -> None:
    shape = find("llama-3.1-8b").shape
    full = [requirement(shape, s, NO_ADAPTER, LOAD, "cuda", fused=True).training for s in METHODS if s.full]
    again = [
        requirement(shape, s.checkpointed(), NO_ADAPTER, LOAD, "cuda", fused=True).training for s in METHODS if s.full
    ]
    assert full == sorted(full, reverse=True)
    assert again == sorted(again, reverse=True)
    assert again[-1] < 0.2 * full[0]
    narrow = [m for m in METHODS if not m.full]
    adapters = [
        requirement(shape, s, adapter_shape(shape, ("all-linear",), 16), LOAD, "cuda", fused=True).training
        for s in narrow
    ]
    assert adapters == sorted(adapters, reverse=True)


def test_gradients_of_earlier_passes_are_there_when_a_later_one_runs() -> None:
    shape, setting = find("smollm2-135m").shape, METHODS[0]
    one = requirement(shape, setting, NO_ADAPTER, LOAD, "cuda", fused=True)
    more = requirement(shape, setting, NO_ADAPTER, replace(LOAD, micro_batches=2), "cuda", fused=True)
    assert one.moments["loss"].gradients == 0
    assert more.moments["loss"].gradients == 4 * shape.parameters
    assert more.training > one.training


def test_offloaded_states_are_in_the_hosts_memory() -> None:
    shape = find("llama-2-7b").shape
    setting = next(m for m in METHODS if m.offload_optimizer)
    found = requirement(shape, setting, NO_ADAPTER, LOAD, "cuda", fused=True)
    assert found.parts.optimizer == 0
    assert found.host == optimizer_bytes(shape.parameters, setting)


def test_a_processor_holds_the_tokenizer_beside_the_tensors() -> None:
    small = find("smollm2-135m").shape
    large = replace(small, vocabulary=262_144)
    adapter = adapter_shape(small, ("all-linear",), 16)
    for setting in (m for m in METHODS if not m.full):
        found = [requirement(s, setting, adapter, LOAD, "cpu", fused=True).parts.runtime for s in (small, large)]
        assert found[1] - found[0] == memory.TOKENIZER_BYTES * (262_144 - 49_152)
        assert requirement(large, setting, adapter, LOAD, "cuda", fused=True).parts.runtime == 0


def test_a_gguf_files_blocks_are_read_once_and_others_are_wide_one_at_a_time() -> None:
    shape = replace(find("smollm2-135m").shape, gguf_bytes=95_000_000)
    setting = TrainingSetting(key="", label="", method="lora", precision="gguf", compute_dtype="float32")
    runtime = memory.RUNTIME_BYTES + memory.TOKENIZER_BYTES * shape.vocabulary
    proof = 4 * 24 * shape.vocabulary * 4  # logits of the texts that a base is tried on
    assert memory.loading_bytes(shape, setting, "cpu") == 95_000_000 + runtime + proof
    # In 16 bits: the blocks of the embedding are there beside its dense form, which stays.
    dense, blocks = replace(setting, precision="bfloat16"), shape.embedding * 95_000_000 / shape.parameters
    assert memory.loading_bytes(shape, dense, "cpu") == int(weight_bytes(shape, dense) + runtime + blocks)
    # In 4 bits: a linear layer is there as blocks and in float32, and neither stays.
    few = replace(shape, embedding=10_000, vocabulary=10)
    anew, runtime = replace(setting, precision="nf4"), memory.RUNTIME_BYTES + memory.TOKENIZER_BYTES * 10
    wide = 576 * 1536 * (4 + 95_000_000 / few.parameters)
    assert memory.loading_bytes(few, anew, "cpu") == int(weight_bytes(few, anew) + runtime + wide)


def test_where_the_vocabulary_is_large_reading_the_tokenizer_takes_more_than_a_base_in_blocks() -> None:
    shape = replace(find("smollm2-135m").shape, gguf_bytes=95_000_000, vocabulary=262_144)
    setting = TrainingSetting(key="", label="", method="lora", precision="gguf", compute_dtype="float32")
    reading = memory.RUNTIME_BYTES + memory.TOKENIZER_READING_BYTES * 262_144
    assert memory.loading_bytes(shape, setting, "cpu") == reading
    assert memory.loading_bytes(shape, setting, "cuda") < reading


def test_dora_takes_more_than_plain_adapters() -> None:
    shape, setting = find("smollm2-135m").shape, replace(METHODS[-1], compute_dtype="float32")
    adapter = adapter_shape(shape, ("all-linear",), 16, dora=True)
    plain = requirement(shape, setting, adapter, LOAD, "cpu", fused=True).moments["backward"]
    found = requirement(shape, replace(setting, dora=True), adapter, LOAD, "cpu", fused=True).moments["backward"]
    assert found.workspace > plain.workspace
    # DoRA: the result of each of the adapted matrices, once more.
    assert found.activations - plain.activations == 30 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576) * 4 * LOAD.tokens


def test_the_same_bits_on_a_gpu_are_planned_with_what_its_attention_then_keeps() -> None:
    """One example of 4,096 tokens with 32 heads of 128: a sum is 64 MiB."""
    shape, one = find("llama-2-7b").shape, Workload(tokens=4096, target_tokens=4096, longest=4096)
    same = replace(METHODS[-1], deterministic=True)
    assert memory.deterministic_bytes(shape, same, one, "cuda") == 4 * 64 << 20
    assert memory.deterministic_bytes(shape, same, replace(one, examples=5), "cuda") == 0
    few, adapter = replace(shape, heads=16), adapter_shape(shape, ("attention",), 8)
    for device in ("cuda", "cpu"):
        off, on = (
            requirement(few, setting, adapter, one, device, fused=True).moments["backward"].workspace
            for setting in (METHODS[-1], same)
        )
        assert on == max(off, memory.deterministic_bytes(few, same, one, device))
        assert (on > off) == (device == "cuda")


@pytest.mark.parametrize("trained", [1, 500, 2042, 2048])
def test_the_logits_that_are_planned_are_those_of_the_largest_piece(trained: int) -> None:
    llama = find("llama-3.2-1b").shape
    for device in ("cpu", "cuda"):
        for plain in (True, False):
            shape, most = replace(llama, plain_head=plain), loss.chunk_logits(device, plain)
            largest = max(last - first for first, last in loss.head_pieces(0, trained, shape.vocabulary, most))
            assert memory.chunk_rows(shape, replace(LOAD, target_tokens=trained), device) == largest


def test_the_plans_constants_are_the_implementations() -> None:
    assert (memory.CHUNK_LOGITS, memory.CHUNK_ROWS) == (loss.CHUNK_LOGITS, loss.CHUNK_ROWS)
    assert (memory.CHUNK_LOGITS_GPU, memory.CHUNK_LOGITS_CAPPED) == (loss.CHUNK_LOGITS_GPU, loss.CHUNK_LOGITS_CAPPED)
    assert (memory.MOMENT_BLOCK, memory.SMALL) == (moments.MOMENT_BLOCK, moments.SMALL)
    assert (memory.NF4_BLOCK, memory.NF4_GROUP) == (stored.BLOCK, stored.GROUP)
    assert kernels.native.PANEL_BYTES_FOR_MANY <= memory.PANEL


def test_the_constants_of_a_full_steps_end_are_the_implementations() -> None:
    assert full_step.HOST_SLAB == kernels.triton.adamw.SLAB
    assert full_step.SQUARES_SLAB == reference_adamw.SLAB


@pytest.mark.parametrize("method", ["full-8bit", "qlora"])
def test_activations_on_the_host_leave_two_layers_inputs_on_the_gpu(method: str) -> None:
    shape = find("llama-2-7b").shape
    off = next(m for m in METHODS if m.key == method).checkpointed()
    adapter = NO_ADAPTER if off.full else adapter_shape(shape, ("all-linear",), 8)
    load = Workload(tokens=4096, target_tokens=4096, longest=4096)
    before, after = (
        requirement(shape, replace(off, offload_activations=on), adapter, load, "cuda", fused=True)
        for on in (False, True)
    )
    one = 4096 * shape.width * 2
    assert after.host - before.host == shape.layers * one
    assert before.moments["loss"].activations - after.moments["loss"].activations == (shape.layers - 2) * one
    assert "--offload-activations" in after.setting.flags


@pytest.mark.parametrize(
    ("tied", "tokens", "lookups"), [(False, 4096, -1), (False, 16, 0), (True, 4096, 0), (True, 16, 1)]
)
def test_the_lookups_gradient_on_a_gpu_is_not_there_while_the_first_layer_runs_back(
    tied: bool, tokens: int, lookups: int
) -> None:
    """With few tokens the moment behind the layers is the higher one: then it is. A tied head's waits for it: then both are."""
    shape = find("llama-2-7b").shape
    shape = replace(shape, head=0) if tied else shape
    full = next(m for m in METHODS if m.key == "full-8bit")
    load = Workload(tokens=tokens, target_tokens=tokens, longest=tokens)
    found = requirement(shape, full, NO_ADAPTER, load, "cuda", fused=True).moments["end"]
    assert found.gradients == 2 * (shape.parameters + lookups * shape.embedding)
