"""Families whose layers keep states of their own, or read weights past the layer: decoded, trained, in every precision."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import families
import pytest
import tiny
import tiny_run
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import attach
from graftlm.adapters.store import Store
from graftlm.base import caches
from graftlm.base.attention import prove_stacks
from graftlm.base.caches import Asking, Past, may_cache, prove_decoding
from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base, load_base
from graftlm.base.modules import StoredLinear
from graftlm.base.saving import dense_state_dict, save_model
from graftlm.config import Precision, ServeConfig
from graftlm.errors import ModelError
from graftlm.segments import Segments
from graftlm.serving.engine.engine import Engine
from graftlm.serving.engine.request import Request
from graftlm.serving.engine.scheduler import EngineLimits
from graftlm.serving.http.server import build
from graftlm.training.trainer import train

CACHED = (
    "bamba", "deepseek_v4", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "mamba", "mamba2", "minimax",
    "qwen3_next", "zamba",
)  # fmt: skip
UNCACHED = ("nemotron_h", "recurrent_gemma", "roberta", "rwkv", "xlstm", "zamba2")
"""Their cache says something else than the whole text in this release of transformers."""
READING = ("falcon_mamba", "jamba", "longcat_flash", "mamba", "mamba2", "minimax_m3_vl_text")
"""Their code reads a weight past its layer: to multiply, or for its dtype."""


@cache
def folder(family: str) -> Path:
    return tiny.write(Path(mkdtemp(prefix="graft-family-")) / family, families.random_model(family))


def loaded(family: str, precision: Precision = "float32") -> Base:
    return load_base(str(folder(family)), precision=precision, compute_dtype="float32", device="cpu")


def reference(base: Base) -> Any:
    """Plain transformers with the very weights that the base holds."""
    model = tiny.plain(base.folder)
    state = {name: value.clone() for name, value in dense_state_dict(base.model, torch.float32).items()}
    _, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    model.tie_weights()
    return model


PROMPTS = [
    tiny.ids(7, seed=1).tolist(),
    tiny.ids(7, seed=2).tolist(),
    tiny.ids(3, seed=3).tolist(),
    tiny.ids(7, seed=4).tolist(),
]
LENGTHS = (5, 2, 6, 4)


def answers(base: Base, adapter: bool = False) -> tuple[list[list[int]], Engine]:
    """What the engine writes behind four prompts; of those that run together, one ends early."""
    engine = Engine(base, EngineLimits(max_num_seqs=4, cache_tokens=256, max_loras=1))
    if adapter:
        engine.adapter_cache.pin("it", 1)
    for i, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS)):
        engine.add_request(Request(id=str(i), prompt=tuple(prompt), max_tokens=length, adapter="it" if adapter else ""))
    found: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
    while engine.busy:
        for output in engine.step():
            assert not output.error
            found[output.id] += output.tokens
    engine.close()
    return list(found.values()), engine


def greedy(logits: Any, prompt: Sequence[int], length: int) -> list[int]:
    """The likeliest token after token, by the whole text."""
    text = list(prompt)
    for _ in range(length):
        text.append(int(logits(torch.tensor(text))[-1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("family", [*CACHED, *UNCACHED])
def test_an_answer_is_what_the_whole_text_says_with_the_classs_own_cache_where_that_is_right(family: str) -> None:
    base = loaded(family)
    found, engine = answers(base)
    plain = reference(base)
    assert found == [greedy(lambda ids: tiny.plain_logits(plain, ids), p, n) for p, n in zip(PROMPTS, LENGTHS)]
    assert not engine.paged
    assert (engine.decoding.cache is not None) == (family in CACHED)
    assert bool(engine.decoding.why_not_cache) == (family in UNCACHED)


@pytest.mark.parametrize("family", ["bamba", "jamba", "kimi_linear", "minimax"])
def test_an_adapter_on_every_linear_layer_follows_a_cache_that_runs_layers_over_the_past(family: str) -> None:
    base = loaded(family)
    tiny.adapted(base)
    found, _ = answers(base, adapter=True)
    assert found == [greedy(lambda ids: tiny.base_logits(base, ids), p, n) for p, n in zip(PROMPTS, LENGTHS)]


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("family", READING)
def test_a_weight_that_is_read_past_its_layer_is_used_as_it_is_stored(family: str, precision: Precision) -> None:
    base = loaded(family, precision)
    tiny.close(tiny.base_logits(base, tiny.ids(), slot=0), tiny.plain_logits(reference(base), tiny.ids()))


@pytest.mark.parametrize("precision", ["bfloat16", "nf4"])
@pytest.mark.parametrize("family", ["jamba", "minimax"])
def test_lora_trains_every_layer_and_is_read_back(family: str, precision: Precision, tmp_path: Path) -> None:
    base = loaded(family, precision)
    adapter = tiny.adapted(base)
    before = {name: p.detach().clone() for name, p in adapter.parameters().items()}
    heard = tiny.Heard()
    train(base, [tiny.trial(base, adapter, tiny.examples(), steps=2)], 23, heard)
    assert heard.losses[1] < heard.losses[0]
    assert not [name for name, p in adapter.parameters().items() if torch.equal(p, before[name])]
    adapter_format.save(base, adapter, tmp_path, {})
    again = loaded(family, precision)
    attach(again, adapter_format.load(again, tmp_path), slot=1)
    tiny.close(tiny.base_logits(again, tiny.ids()), tiny.base_logits(base, tiny.ids()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["afmoe", "jamba", "minimax"])
def test_full_training_changes_all_but_what_the_class_never_trains_and_is_saved(
    family: str, precision: Precision, tmp_path: Path
) -> None:
    base = loaded(family, precision)
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    train(base, [tiny.trial(base, None, tiny.examples(), steps=2)], 23, tiny.Heard())
    same = {name for name, p in base.model.named_parameters() if torch.equal(p, before[name])}
    assert same == set(base.fixed)
    assert bool(same) == (family == "afmoe")  # the bias that balances its experts
    save_model(base.model, str(tmp_path), torch.float32)
    tiny.close(tiny.plain_logits(tiny.plain(tmp_path), tiny.ids()), tiny.base_logits(base, tiny.ids(), slot=0))


def test_a_read_weight_multiplies_as_the_layer_does_with_its_adapter() -> None:
    base = loaded("mamba", "nf4")
    tiny.adapted(base)
    name, layer = next((n, m) for n, m in base.stored().items() if n.endswith("dt_proj"))
    assert isinstance(layer, StoredLinear)
    x = torch.randn(1, layer.in_features, 5, generator=torch.Generator().manual_seed(3))
    with ForwardContext(Segments(lengths=(5,), slots=(1,), batched=True)), torch.no_grad():
        found = layer.weight @ x  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
        expected = layer(x.transpose(1, 2)) - layer.bias
    assert found.shape == (1, layer.out_features, 5)
    tiny.close(found, expected.transpose(1, 2))
    assert layer.weight.dtype == torch.float32  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(TypeError, match="changes a stored weight in place"):
        layer.weight.mul_(2)  # pyright: ignore[reportOptionalMemberAccess]
    assert (found - layer.original(torch.float32) @ x).abs().max() > 0.01, name


def test_layers_that_a_class_ties_share_one_stored_form_and_have_adapters_of_their_own() -> None:
    base = loaded("zamba", "nf4")
    shared = [m for n, m in base.stored().items() if n.endswith("shared_transf.self_attn.q_proj")]
    assert len(shared) == 2
    assert shared[0].compressed is shared[1].compressed
    assert base.parameters == sum(p.numel() for p in tiny.plain(base.folder).parameters())
    tiny.adapted(base)
    assert shared[0].bank is not shared[1].bank


def test_rwkv_keeps_its_weights_as_they_are_while_it_runs_and_its_config_when_it_is_saved(tmp_path: Path) -> None:
    base = loaded("rwkv")
    before = dense_state_dict(base.model, torch.float32)["rwkv.blocks.1.attention.output.weight"].clone()
    tiny.base_logits(base, tiny.ids(), slot=0)
    save_model(base.model, str(tmp_path), torch.float32)
    assert torch.equal(tiny.plain(tmp_path).state_dict()["rwkv.blocks.1.attention.output.weight"], before)
    assert tiny.plain(tmp_path).config.rescale_every == 1


@pytest.mark.parametrize("family", ["minimax", "rwkv"])
def test_a_server_answers_what_graft_train_trained_and_says_when_it_has_no_cache(family: str, tmp_path: Path) -> None:
    model = families.random_model(family, vocab_size=tiny_run.VOCABULARY)
    model.save_pretrained(tmp_path / "base")
    tiny_run.byte_tokenizer().save_pretrained(tmp_path / "base")
    tiny_run.train(tmp_path, model=str(tmp_path / "base"), steps=2, base_precision="bfloat16")
    told: list[str] = []
    built = build(ServeConfig.build({"model": str(tmp_path / "base"), "base_precision": "bfloat16"}), told.append)
    engine = built.state.async_engine.engine
    version, _ = Store(tmp_path / "store").publish(tmp_path / "run" / "adapter", "trained")
    request = Request(id="a", prompt=(3, 4, 5), max_tokens=3, adapter=version.digest)
    outputs = list(engine.generate([(request, version.folder)]))
    assert sum(len(output.tokens) for output in outputs) == 3
    assert outputs[-1].finish_reason == "length"
    assert any("each token costs a forward pass over the whole text: its cache" in line for line in told) == (
        family == "rwkv"
    )
    engine.close()


@pytest.mark.parametrize("family", ["bert", "roberta", "xlnet"])
def test_a_model_that_reads_both_ways_is_refused_when_it_is_loaded(family: str, tmp_path: Path) -> None:
    changes = {"is_decoder": False} if family != "xlnet" else {}
    place = tiny.write(tmp_path, families.random_model(family, **changes))
    with pytest.raises(ModelError, match="can neither be trained nor generated with: a token attends to later ones"):
        load_base(str(place), precision="float32")


def test_a_base_that_cannot_decode_is_refused_with_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    base = loaded("minimax")
    own = base.structure.body.forward

    def forward(**kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 1:
            raise ValueError("one text at a time")
        return own(**kwargs)

    monkeypatch.setattr(base.structure.body, "forward", forward)
    with pytest.raises(ModelError, match=r"MiniMaxForCausalLM .* two examples of equal length \(ValueError: one text"):
        prove_stacks(base)
    monkeypatch.setattr(caches, "check_kv_cache", lambda base: ({}, "no blocks"))
    base.packs = True
    with pytest.raises(ModelError, match="one text at a time"):
        Engine(base, EngineLimits(max_num_seqs=2, cache_tokens=64))


def test_a_cache_that_changes_a_logit_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    base = loaded("jamba")
    argument = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"
    assert may_cache(base) == (Asking(argument, True), "")
    own = Past.step
    calls: list[int] = []

    def step(self: Past, ids: Tensor) -> Tensor:
        calls.append(1)
        return own(self, ids) * (1.01 if ids.shape[1] == 1 else 1)

    monkeypatch.setattr(Past, "step", step)
    monkeypatch.setattr(base.structure, "logits", lambda hidden, context: hidden)
    found = prove_decoding(base)
    assert calls
    assert found.cache is None
    assert "its cache changes its logits (by 0.01" in found.why_not_cache
