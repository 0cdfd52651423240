"""What Graft relies on in transformers, for every architecture; these fail first when transformers changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from graftlm.base.loading import Base, load_base
from graftlm.base.modules import Stored, StoredLinear, StoredStack
from graftlm.base.random_init import random_model
from graftlm.base.saving import dense_state_dict, save_model
from graftlm.base.structure import ModelStructure
from graftlm.base.surgery import convert_model, find_replacements
from graftlm.errors import ModelError
from graftlm.training.trainer import BatchItem, collate, forward

every = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)

PARTS = {  # body, embedding, head
    "gpt2": ("transformer", "transformer.wte", "lm_head"),
    "bloom": ("transformer", "transformer.word_embeddings", "lm_head"),
    "falcon": ("transformer", "transformer.word_embeddings", "lm_head"),
    "opt": ("model", "model.decoder.embed_tokens", "lm_head"),
}


def loaded(architecture: str, precision: Any = "float32", compute_dtype: Any = "float32") -> Base:
    return load_base(str(tiny.folder(architecture)), precision=precision, compute_dtype=compute_dtype, device="cpu")


@every
def test_body_embedding_head_and_layers_are_found(architecture: str) -> None:
    structure = loaded(architecture).structure
    body, embedding, head = PARTS.get(architecture, ("model", "model.embed_tokens", "lm_head"))
    assert (structure.embedding_name, structure.head_name) == (embedding, head)
    assert structure.body_name in (body, "model.decoder")
    assert len(structure.layers) == 2
    assert structure.vocabulary == tiny.VOCABULARY
    assert structure.max_positions == (0 if architecture == "bloom" else 64)


@every
def test_body_and_head_give_the_untouched_models_logits(architecture: str) -> None:
    base = loaded(architecture)
    expected = tiny.plain_logits(tiny.plain(base.folder), tiny.ids(13))
    assert torch.equal(expected, expected.clamp(-2, 2)) == (architecture == "gemma2")  # the soft cap of its logits
    tiny.close(tiny.base_logits(base, tiny.ids(13), slot=0), expected, rtol=1e-5)


@every
def test_every_linear_layer_router_and_stack_is_stored(architecture: str) -> None:
    base = loaded(architecture)
    assert not base.not_converted
    model = tiny.plain(base.folder)
    expected = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, transformers.pytorch_utils.Conv1D))}
    expected |= {n for n, p in model.named_parameters() if p.ndim == 3}
    found = {n.removesuffix(".stored") for n in base.stored()}
    routers = {n for n in found if n.endswith("mlp.gate")}
    assert found == expected | routers
    assert len(routers) == {"mixtral": 2, "qwen3_moe": 1}.get(architecture, 0)


@every
def test_plain_state_is_what_transformers_saves_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    base = loaded(architecture)
    state = dense_state_dict(base.model, torch.float32)
    model = tiny.plain(base.folder)
    own = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set[str]()
    assert set(state) == set(own) - tied
    assert all(torch.equal(value, own[name]) for name, value in state.items())
    save_model(base.model, str(tmp_path), torch.float32)
    source, written = load_file(base.folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(written) == set(source)
    assert all(torch.equal(value, source[name]) for name, value in written.items())
    settings = [json.loads((place / "config.json").read_text()) for place in (base.folder, tmp_path)]
    assert settings[0] == settings[1]


@every
@pytest.mark.parametrize("precision", ["bfloat16", "int8", "nf4"])
def test_a_precision_is_kept_by_every_stored_weight_and_16_bits_by_embedding_and_head(
    architecture: str, precision: Any
) -> None:
    base = loaded(architecture, precision)
    head = base.structure.head
    for name, module in base.stored().items():
        router = name.endswith("gate.stored")
        if precision == "bfloat16" or module is head or router:
            assert module.dense is not None, name
            assert module.dense.dtype == torch.bfloat16, name
        else:
            assert module.dense is None, name
            assert type(module.compressed).__name__.lower() == precision, name
    others = {n: p for n, p in base.model.named_parameters() if ".weight" not in n or p.ndim == 1}
    assert {p.dtype for p in others.values()} <= {torch.float32}
    embedding: Any = base.structure.embedding
    assert embedding.weight.dtype == torch.bfloat16
    assert (embedding.weight is head.weight) == bool(base.model.config.tie_word_embeddings)
    assert tiny.base_logits(base, tiny.ids(), slot=0).dtype == torch.float32


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "mixtral"])
def test_products_may_run_in_bfloat16(architecture: str) -> None:
    exact, base = loaded(architecture), loaded(architecture, "bfloat16", "bfloat16")
    expected, found = (tiny.base_logits(b, tiny.ids(), slot=0).float() for b in (exact, base))
    assert (found - expected).norm() < 0.1 * expected.norm()


@every
def test_layers_that_run_again_in_the_backward_pass_give_the_same_gradients(architecture: str) -> None:
    rows = tiny.examples((7, 7, 7), seed=4)
    found: list[dict[str, Tensor]] = []
    runs: list[int] = []
    for again in (False, True):
        base = loaded(architecture)
        adapter = tiny.adapted(base, **({} if architecture in tiny.MIXTURES else {"dropout": 0.3}))
        base.model.requires_grad_(True)
        if again:
            assert base.structure.checkpoint_layers(True) == 2
        count = [0]
        projection = next(m for m in base.structure.layers[0].modules() if isinstance(m, StoredLinear))
        projection.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        micro_batch = collate(base, [BatchItem(row, 1, (3, i), 0.1) for i, row in enumerate(rows)])
        forward(base, micro_batch)[0].backward()
        runs.append(count[0])
        trained = {**dict(base.model.named_parameters()), **adapter.parameters()}
        found.append({n: p.grad for n, p in trained.items() if p.grad is not None})
    assert runs[1] == 2 * runs[0]
    once, twice = found
    assert set(once) == set(twice)
    assert [name for name, gradient in once.items() if not torch.equal(gradient, twice[name])] == []


class Tail(transformers.LlamaForCausalLM):
    """A model that reads more of its body's output than the last hidden states."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        first = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        noise = self.model.embed_tokens(input_ids)  # the tokens themselves, which the head does not get
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(first) + self.lm_head(noise))


def test_a_model_whose_tail_reads_more_than_the_hidden_states_is_refused() -> None:
    torch.manual_seed(0)
    model = Tail(tiny.config("llama")).eval()
    with pytest.raises(ModelError, match="Tail: the part between its layers and its logits"):
        ModelStructure(model, torch.float32)


def test_a_model_without_linear_layers_is_refused() -> None:
    class Empty(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.layers = nn.ModuleList()

    with pytest.raises(ModelError, match="no linear layer"):
        find_replacements(Empty(tiny.config("llama")), "float32")


def test_a_linear_layer_that_computes_more_is_kept_and_named() -> None:
    class ScaledLinear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 1.7

    model = tiny.random_model("llama")
    layer: Any = model.model.layers[0].mlp
    layer.up_proj = ScaledLinear(28, 44, bias=False)
    with torch.no_grad():
        expected = model(input_ids=tiny.ids()[None]).logits
        model, targets = convert_model(model, "float32", torch.float32)
        assert list(targets.not_converted) == ["model.layers.0.mlp.up_proj"]
        assert "ScaledLinear" in targets.not_converted["model.layers.0.mlp.up_proj"]
        tiny.close(model(input_ids=tiny.ids()[None]).logits, expected)


def test_experts_outside_of_transformers_interface_are_kept_and_named() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.zeros(3, 4, 5))

    model = tiny.random_model("llama")
    model.model.layers[1].mlp.extra = Stack()
    assert list(find_replacements(model, "float32").not_converted) == ["model.layers.1.mlp.extra"]


def test_experts_give_the_eager_experts_output_and_gradients() -> None:
    base = loaded("mixtral")
    model = tiny.plain(base.folder)
    model.set_experts_implementation("eager")
    x = torch.randn(7, 28, generator=torch.Generator().manual_seed(1))
    ours: Any = base.model.model.layers[1].mlp
    theirs: Any = model.model.layers[1].mlp
    assert isinstance(ours.experts.gate_up_proj, StoredStack)
    gradients: list[Tensor] = []
    outputs: list[Tensor] = []
    for block in (ours, theirs):
        own = x.clone().requires_grad_()
        y = block(own[None])
        y = y[0] if isinstance(y, tuple) else y
        y.square().sum().backward()
        outputs.append(y.detach().reshape(7, 28))
        assert own.grad is not None
        gradients.append(own.grad)
    tiny.close(outputs[0], outputs[1], rtol=1e-5)
    tiny.close(gradients[0], gradients[1])


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    config = tiny.config("qwen2")
    torch.manual_seed(5)
    first = random_model(config, 3, False).state_dict()
    torch.manual_seed(6)
    again, other = random_model(config, 3, False).state_dict(), random_model(config, 4, False).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_random_weights_are_never_taken_for_the_folders(tmp_path: Path) -> None:
    tiny.config("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    base = load_base(str(tmp_path), init="random", seed=2, device="cpu")
    assert base.random
    assert base.fingerprint == "random"
    assert all(isinstance(m, Stored) for m in base.stored().values())


def test_taking_logits_never_changes_the_model_that_another_thread_looks_at() -> None:
    base = load_base(str(tiny.folder("llama")), compute_dtype="float32", device="cpu")
    names = [name for name, _ in base.model.named_modules()]
    seen: list[list[str]] = []

    def watch(module: nn.Module, args: object) -> None:
        seen.append([name for name, _ in base.model.named_modules()])

    handle = base.structure.head.register_forward_pre_hook(watch)
    base.structure.logits(torch.zeros(2, base.model.config.hidden_size))
    handle.remove()
    assert seen == [names]
