"""A model in a GGUF file is the model that was written: in its blocks, in every precision, trained, saved and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_gguf import MODELS, folder
from torch import Tensor

from graftlm.adapters import peft_format
from graftlm.adapters.attach import attach
from graftlm.adapters.gguf import write_gguf
from graftlm.base import gguf_loading
from graftlm.base.checkpoint_layout import Checkpoint
from graftlm.base.context import ForwardContext
from graftlm.base.fingerprint import fingerprint
from graftlm.base.loading import Base, checkpoint_precision, load_base, load_config, resolve
from graftlm.base.precision import dequantize
from graftlm.commands.generate import generate
from graftlm.commands.train import train
from graftlm.config import GenerateConfig, TrainConfig
from graftlm.distributed.group import Ranks
from graftlm.errors import ModelError
from graftlm.gguf.folder import gguf_of
from graftlm.kernels import GgufBlocks
from graftlm.segments import Segments

gguf = pytest.importorskip("gguf")
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(base: Base, text: str = "hello, world") -> Tensor:
    ids = torch.tensor(base.tokenizer(text)["input_ids"])
    context = ForwardContext(Segments(lengths=(len(ids),), slots=(0,)))
    with torch.no_grad():
        return base.logits(base.hidden(ids, context), context)


def files(place: Path, architecture: str, kind: str, **changes: Any) -> tuple[Path, Path]:
    """A tiny model as a folder and as a GGUF file."""
    plain = folder(place / "model", architecture, **changes)
    write_gguf(plain, place / "model.gguf", kind)
    return plain, place / "model.gguf"


def load(name: Path, precision: Any) -> Base:
    return load_base(str(name), precision=precision, compute_dtype="float32", device="cpu")


@pytest.mark.parametrize("architecture", MODELS)
def test_a_float32_file_gives_the_logits_and_the_tokens_of_the_folder(architecture: str, tmp_path: Path) -> None:
    plain, file = files(tmp_path, architecture, "f32", **MODELS[architecture])
    ours, theirs = load(file, "float32"), load(plain, "float32")
    short = "hey"  # within Mistral's window, which GGUF has no place for: the file says that no text is longer
    assert torch.allclose(logits(ours, short), logits(theirs, short), rtol=1e-5, atol=1e-5)
    text = "Héllo  wörld\n\n123 <|im_end|> 中文"
    assert ours.tokenizer(text)["input_ids"] == theirs.tokenizer(text)["input_ids"]
    assert ours.tokenizer.decode(ours.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("kind", ["q8_0", "f16", "bf16"])
def test_stored_as_in_the_file_it_computes_with_the_values_of_the_file(kind: str, tmp_path: Path) -> None:
    _, file = files(tmp_path, "llama", kind, **WIDE)
    blocks, dense = load(file, "gguf"), load(file, "float32")
    assert checkpoint_precision(str(file)) == "gguf"
    assert torch.allclose(logits(blocks), logits(dense), rtol=1e-4, atol=1e-5)
    kept = blocks.model.model.layers[0].mlp.down_proj.value
    assert isinstance(kept, GgufBlocks) == (kind == "q8_0")
    if kind == "q8_0":
        assert blocks.structure.embedding.blocks is not None
        assert blocks.bytes < 0.35 * dense.bytes


@pytest.mark.parametrize(("precision", "wide"), [("bfloat16", 0), ("nf4", 14)])
def test_only_what_is_quantized_anew_is_ever_dense_in_float32(
    precision: str, wide: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = files(tmp_path, "llama", "q8_0", **WIDE)
    made: list[torch.dtype] = []

    def watched(weight: Any, dtype: torch.dtype) -> Tensor:
        made.append(dtype)
        return dequantize(weight, dtype)

    monkeypatch.setattr(gguf_loading, "dequantize", watched)
    base = load(file, precision)
    assert len(made) == 16  # two layers of seven, embedding and head
    assert made.count(torch.float32) == wide
    values = dequantize(load(file, "gguf").structure.embedding.blocks, torch.float32)
    assert torch.equal(base.structure.embedding.weight, values.bfloat16())


def test_every_block_type_is_read_where_a_file_mixes_them(tmp_path: Path) -> None:
    types = gguf.GGMLQuantizationType
    plain, file = files(tmp_path, "llama", "f32", hidden_size=256, intermediate_size=256, head_dim=64)
    kinds = [types.Q4_0, types.Q4_1, types.Q5_0, types.Q5_1, types.Q8_0, types.F16, types.BF16]
    reader = gguf.GGUFReader(str(file))
    writer = gguf.GGUFWriter(str(tmp_path / "mixed.gguf"), "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(
                field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    for i, tensor in enumerate(reader.tensors):
        kind = kinds[i % len(kinds)] if tensor.data.ndim == 2 else types.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    mixed = tmp_path / "mixed.gguf"
    folder_of_it = resolve(str(mixed))
    checkpoint, exact = Checkpoint(folder_of_it), Checkpoint(plain)
    for name in checkpoint.tensors:
        ours, theirs = checkpoint.read(name), exact.read(name).float()
        assert (ours - theirs).abs().max() <= 0.15 * theirs.abs().max(), name
    assert torch.allclose(logits(load(mixed, "gguf")), logits(load(mixed, "float32")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "nf4"])
def test_its_values_are_brought_to_another_precision(precision: str, tmp_path: Path) -> None:
    plain, file = files(tmp_path, "llama", "f32", **WIDE)
    assert torch.allclose(logits(load(file, precision)), logits(load(plain, precision)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["gguf", "nf4"])
def test_each_rank_keeps_its_rows_of_a_tensor_as_soon_as_it_is_read(precision: Any, tmp_path: Path) -> None:
    _, file = files(tmp_path, "llama", "q8_0", **MODELS["llama"])
    place = resolve(str(file))
    made = precision, torch.float32, torch.device("cpu")
    whole = gguf_loading.load_gguf(place, load_config(place, False), *made)[1].all()
    ranks = [
        gguf_loading.load_gguf(place, load_config(place, False), *made, Ranks(rank, 3))[1].all() for rank in range(3)
    ]
    layers = {name: module.value for name, module in whole.items() if ".layers." in name}
    assert len(layers) > 7
    for name, expected in layers.items():
        for part, tensor in ({"weight": expected} if isinstance(expected, Tensor) else expected.tensors()).items():
            if tensor.ndim:
                own = [piece.own for stored in ranks for piece in stored[name].pieces if piece.name == part]
                assert torch.equal(torch.cat([rows for rows in own if rows is not None]), tensor)
        assert all(parameter.is_meta for stored in ranks for parameter in stored[name].parameters())


def test_the_fingerprint_is_that_of_the_tensors_wherever_the_file_lies(tmp_path: Path) -> None:
    _, file = files(tmp_path, "llama", "q8_0", **WIDE)
    first = fingerprint(resolve(str(file)))
    other = tmp_path / "elsewhere.gguf"
    other.write_bytes(file.read_bytes())
    assert fingerprint(resolve(str(other))) == first
    changed = bytearray(file.read_bytes())
    changed[-5] ^= 1
    other.write_bytes(bytes(changed))
    assert fingerprint(resolve(str(other))) != first


def test_an_adapter_trained_on_blocks_is_what_peft_computes_over_the_dequantized_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    _, file = files(tmp_path, "llama", "q8_0", **WIDE)
    summary = train(trained(tmp_path, file))
    assert summary["base_precision"] == "gguf"
    base = load(file, "gguf")
    model = tiny.plain(folder(tmp_path / "peft", "llama", **WIDE))
    checkpoint = Checkpoint(base.folder)
    state = {name: checkpoint.read(name) for name in checkpoint.tensors}
    model.load_state_dict(state, strict=False)
    adapted = peft.PeftModel.from_pretrained(model, summary["adapter_folder"])
    ids = torch.tensor([base.tokenizer("hello, world")["input_ids"]])
    theirs = adapted(input_ids=ids).logits[0]
    attach(base, peft_format.load(base, Path(summary["adapter_folder"])), 1)
    context = ForwardContext(Segments(lengths=(ids.shape[1],), slots=(1,)))
    with torch.no_grad():
        ours = base.logits(base.hidden(ids[0], context), context)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, logits(base), atol=1e-3)


def trained(place: Path, file: Path, **changes: Any) -> TrainConfig:
    (place / "rows.jsonl").write_text('{"prompt": "hello", "completion": " world"}\n' * 4, encoding="utf-8")
    rank = {} if changes.get("method") == "full" else {"rank": 4}
    return TrainConfig.build(
        {
            "model": str(file), "data": [str(place / "rows.jsonl")], "out": place / "run", "steps": 3, "batch_size": 2,
            "learning_rate": 0.02, **rank, **changes,
        }
    )  # fmt: skip


def test_a_tuned_adapter_answers_on_the_blocks_and_full_training_takes_dense_weights(tmp_path: Path) -> None:
    _, file = files(tmp_path, "llama", "q8_0", **WIDE)
    summary = train(trained(tmp_path, file))
    found = generate(
        GenerateConfig.build(
            {"model": str(file), "prompt": "hello", "adapter": summary["adapter_folder"], "max_tokens": 4}
        )
    )
    assert found["precision"] == "gguf"
    full = train(trained(tmp_path, file, method="full", out=tmp_path / "full", learning_rate=0.001))
    assert full["base_precision"] == "float32"
    with pytest.raises(Exception, match="method full trains every weight"):
        trained(tmp_path, file, method="full", base_precision="gguf")


def test_what_cannot_be_a_base_is_refused_by_name(tmp_path: Path, cache: Path) -> None:
    _, file = files(tmp_path, "llama", "f32", **WIDE)
    whole = file.read_bytes()
    with pytest.raises(ModelError, match=r"keeps the blocks of a GGUF file, and .* is none"):
        load(tmp_path / "model", "gguf")
    for name, data, fault in (
        ("cut.gguf", whole[:-100], "is cut short: tensor"),
        ("other.gguf", b"PK" + whole[2:], "is no GGUF file"),
        ("arch.gguf", whole.replace(b"llama", b"lxama"), "architecture 'lxama', and GGUF files are read for llama"),
        ("name.gguf", whole.replace(b"blk.0.ffn_up", b"blk.0.ffn_xp"), "has tensor 'blk.0.ffn_xp.weight'"),
        ("pre.gguf", whole.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.prx"), "splits text as 'default'"),
        ("tokens.gguf", whole.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.txkens"), "has no tokenizer"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelError, match=fault):
            resolve(str(tmp_path / name))
    with pytest.raises(ModelError, match="there is no file"):
        resolve(str(tmp_path / "none.gguf"))
    assert not list(cache.rglob("*.partial"))
    place = resolve(str(file))
    file.unlink()
    with pytest.raises(ModelError, match=r"model\.gguf is gone"):
        gguf_of(place)


def test_a_type_that_is_not_read_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    _, file = files(tmp_path, "llama", "f32", hidden_size=256, intermediate_size=256, head_dim=64)
    data = bytearray(file.read_bytes())
    at = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    assert data[at : at + 4] == (0).to_bytes(4, "little")
    data[at : at + 4] = (10).to_bytes(4, "little")
    file.write_bytes(bytes(data))
    with pytest.raises(ModelError, match=r"tensor 'blk\.0\.ffn_up\.weight' of type q2_k, and f32, f16, bf16, q4_0"):
        resolve(str(file))
