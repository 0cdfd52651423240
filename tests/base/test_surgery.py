"""Which parts of a model are replaced by stored ones, for every architecture; fails first when transformers changes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn

from graftlm.base.loading import Base, load_base
from graftlm.base.modules import StoredStack
from graftlm.base.surgery import convert_model, find_replacements, replace_modules
from graftlm.errors import ModelError

every = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


def loaded(architecture: str, precision: Any = "float32", compute_dtype: Any = "float32") -> Base:
    return load_base(str(tiny.folder(architecture)), precision=precision, compute_dtype=compute_dtype, device="cpu")


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


def test_the_linear_layers_are_replaced_and_nothing_else_is() -> None:
    base = loaded("llama")
    plain = {name: type(m).__name__ for name, m in tiny.plain(base.folder).named_modules()}
    found = {name: type(m).__name__ for name, m in base.model.named_modules()}
    assert set(found) == set(plain)
    assert {found[name] for name, kind in plain.items() if kind == nn.Linear.__name__} == {"StoredLinear"}
    assert found["model.embed_tokens"] == "StoredEmbedding"
    assert {name: kind for name, kind in found.items() if not kind.startswith("Stored")} == {
        name: kind for name, kind in plain.items() if kind not in ("Linear", "Embedding")
    }


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
def test_matmuls_may_run_in_bfloat16(architecture: str) -> None:
    exact, base = loaded(architecture), loaded(architecture, "bfloat16", "bfloat16")
    expected, found = (tiny.base_logits(b, tiny.ids(), slot=0).float() for b in (exact, base))
    assert (found - expected).norm() < 0.1 * expected.norm()


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


def test_a_router_that_does_not_multiply_with_its_weight_keeps_it_and_what_was_decided_stays_as_it_was() -> None:
    model = tiny.random_model("mixtral")
    router: Any = model.model.layers[1].mlp.gate
    router.forward = lambda hidden, weight=router.weight: hidden.matmul(weight.t())
    decided = find_replacements(model, "float32")
    names, weight = list(decided.routers), router.weight
    replaced = replace_modules(model, decided, "float32", torch.float32)
    assert names == list(decided.routers) == [f"model.layers.{i}.mlp.gate.weight" for i in (0, 1)]
    assert (decided.not_converted, list(replaced.routers)) == ({}, names[:1])
    assert list(replaced.not_converted) == ["model.layers.1.mlp.gate"]
    assert "does not multiply with F.linear" in replaced.not_converted["model.layers.1.mlp.gate"]
    assert torch.equal(model.get_parameter(names[1]), weight)


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
