"""Fused modules give what their own code gave, keep less for the backward pass, and are swapped in only where proven."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CohereConfig
from transformers.models.llama import modeling_llama

from graftlm import kernels
from graftlm.base import fused_autograd
from graftlm.base.context import ForwardContext
from graftlm.base.fused import FusedCounts, fuse, unfuse
from graftlm.base.fused_autograd import Rotary
from graftlm.base.loading import Base, load_base
from graftlm.training.micro_batch import BatchItem, collate, forward

pytestmark = pytest.mark.skipif(
    not kernels.has_fused_ops(torch.device("cpu"), torch.float32), reason="the C kernels are not compiled"
)

ROWS = tiny.examples((9, 4, 12, 9))
# Norms, gated products and rotations of each tiny model; two layers each.
COUNTS = {
    "llama": FusedCounts(5, 2, 2),
    "mistral": FusedCounts(5, 2, 2),
    "qwen2": FusedCounts(5, 2, 2),
    "qwen3": FusedCounts(9, 2, 2),
    "gemma2": FusedCounts(9, 2, 2),
    "gemma3": FusedCounts(13, 2, 2),
    "phi3": FusedCounts(5, 2, 2),
    "gpt2": FusedCounts(),
    "opt": FusedCounts(),
    "falcon": FusedCounts(0, 0, 2),
    "bloom": FusedCounts(),
    "olmo2": FusedCounts(9, 2, 2),
    "starcoder2": FusedCounts(0, 0, 2),
    "mixtral": FusedCounts(5, 2, 2),
    "qwen3_moe": FusedCounts(9, 2, 2),
}


def loaded(architecture: str, **options: Any) -> Base:
    return load_base(str(tiny.folder(architecture)), **{"compute_dtype": "float32", "device": "cpu", **options})


def gradients(base: Base, parameters: dict[str, Any], slot: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a pass over ROWS, dropout included; what no token reached is left out."""
    work = [BatchItem(row, slot, (3, i), 0.1) for i, row in enumerate(ROWS)]
    total = torch.zeros(())
    for p in parameters.values():
        p.grad = None
    for group in [work] if base.packs else [[w] for w in work]:
        micro_batch = collate(base, group)
        loss, _ = forward(base, micro_batch)
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def agree_with_their_own_code(base: Base, parameters: dict[str, Any], slot: int) -> None:
    loss, found = gradients(base, parameters, slot)
    unfuse(base.model)
    try:
        truth, wanted = gradients(base, parameters, slot)
    finally:
        fuse(base.model, base.activation_dtype)
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    assert found.keys() == wanted.keys() != set()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-6, name


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_what_is_fused_is_known(architecture: str) -> None:
    assert loaded(architecture).fused == COUNTS[architecture]


@pytest.mark.parametrize("architecture", [name for name in COUNTS if COUNTS[name] != FusedCounts()])
def test_logits_are_those_of_the_plain_model(architecture: str) -> None:
    base, ids = loaded(architecture), tiny.ids()
    truth = tiny.plain_logits(tiny.plain(tiny.folder(architecture)), ids)
    assert (tiny.base_logits(base, ids) - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("architecture", [name for name in COUNTS if COUNTS[name] != FusedCounts()])
def test_gradients_of_every_weight_are_those_of_their_own_code(architecture: str) -> None:
    base = loaded(architecture)
    base.model.requires_grad_(True)
    agree_with_their_own_code(base, dict(base.model.named_parameters()), 0)


@pytest.mark.parametrize("plan", [{}, {"dropout": 0.3}, {"dora": True}])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_adapters_are_those_of_their_own_code(plan: dict[str, Any], checkpointed: bool) -> None:
    base = loaded("qwen3")
    adapter = tiny.adapted(base, **plan)
    base.structure.checkpoint_layers(checkpointed)
    agree_with_their_own_code(base, adapter.parameters(), 1)


def test_a_base_in_four_bits_is_fused_too() -> None:
    base = loaded("llama", precision="nf4")
    assert base.fused == COUNTS["llama"]
    agree_with_their_own_code(base, tiny.adapted(base).parameters(), 1)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_fused_modules_in_bfloat16_are_close_to_the_plain_models(architecture: str) -> None:
    base, ids = loaded(architecture, precision="bfloat16", compute_dtype="bfloat16"), tiny.ids()
    assert base.fused == COUNTS[architecture]
    found = tiny.base_logits(base, ids).float()
    unfuse(base.model)
    truth = tiny.base_logits(base, ids).float()
    assert (found - truth).norm() <= 0.03 * truth.norm()


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
def test_stacks_of_examples_with_the_models_own_attention_are_fused(architecture: str) -> None:
    base, ids = loaded(architecture), tiny.ids(12).view(3, 4)
    with tiny.original_attention(base), torch.no_grad():
        found = base.model(input_ids=ids, use_cache=False).logits
    truth = tiny.plain(tiny.folder(architecture))(input_ids=ids, use_cache=False).logits
    assert (found - truth).norm() <= 1e-5 * truth.norm()


def test_generating_with_a_cache_gives_the_plain_models_tokens() -> None:
    base, ids = loaded("llama"), tiny.ids(5)[None]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    with tiny.original_attention(base):
        found = base.model.generate(ids, **options)
    assert torch.equal(found, tiny.plain(tiny.folder("llama")).generate(ids, **options))


# ---- what is kept for the backward pass ------------------------------------------------------------------------------


def kept_bytes(call: Callable[[], Tensor], *already: Tensor) -> int:
    """Bytes that autograd keeps alive for the backward pass of `call`, without those of `already`."""
    seen = {t.untyped_storage().data_ptr() for t in already}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    assert y.requires_grad
    return sum(sizes.values())


def test_a_norm_keeps_one_number_a_row_beside_its_input() -> None:
    x, w = torch.randn(7, 19, requires_grad=True), torch.randn(19)
    assert kept_bytes(lambda: fused_autograd.rms_norm(x, w, 1e-5), x, w) == 7 * 4


def test_a_gated_activation_saves_nothing_but_gate_and_up() -> None:
    g, u, h = (torch.randn(7, n, requires_grad=True) for n in (19, 19, 38))
    assert kept_bytes(lambda: fused_autograd.gated(g, u), g, u) == 0
    assert kept_bytes(lambda: fused_autograd.gated_halves(h), h) == 0


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "phi3", "mixtral"])
def test_a_forward_pass_saves_less_than_with_the_models_own_code(architecture: str) -> None:
    base = loaded(architecture)
    base.model.requires_grad_(True)
    micro_batch = collate(base, [BatchItem(row, 0, (0, i), 0.1) for i, row in enumerate(ROWS)])

    def kept() -> int:
        return kept_bytes(
            lambda: base.hidden(micro_batch.ids, ForwardContext(micro_batch.segments)), *base.model.parameters()
        )

    ours = kept()
    unfuse(base.model)
    assert ours < kept()


# ---- proofs ----------------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """RMSNorm by a formula that is given."""

    def __init__(self, formula: Callable[[Tensor, Tensor, float], Tensor], epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(19) * 0.2)
        self.eps = epsilon
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.weight, self.eps)


def normed(x: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


NORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "w": lambda x, w, e: normed(x, e) * w,
    "1 + w": lambda x, w, e: normed(x, e) * (1 + w),
}
NOT_NORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "another epsilon": lambda x, w, e: normed(x, 3 * e) * w,
    "the mean taken off": lambda x, w, e: F.layer_norm(x, (19,), w, None, e),
    "2 + w": lambda x, w, e: normed(x, e) * (2 + w),
    "clamped": lambda x, w, e: (normed(x, e) * w).clamp(-1, 1),
    "no gradient through the size": lambda x, w, e: x * torch.rsqrt(x.detach().square().mean(-1, True) + e) * w,
    "a detached weight": lambda x, w, e: normed(x, e) * w.detach() + 0 * w,
    "another type": lambda x, w, e: (normed(x, e) * w).double(),
    "an error": lambda x, w, e: x @ w[:3],
}


@pytest.mark.parametrize("form", NORMS)
def test_a_norm_of_either_form_is_recognised_by_what_it_computes(form: str) -> None:
    norm, x = Norm(NORMS[form]), torch.randn(3, 5, 19)
    truth = norm(x)
    assert fuse(norm, torch.float32) == FusedCounts(norms=1)
    torch.testing.assert_close(norm(x), truth)
    assert norm.weight.requires_grad
    unfuse(norm)
    assert "forward" not in norm.__dict__


@pytest.mark.parametrize("form", NOT_NORMS)
def test_a_norm_that_differs_keeps_its_own_code(form: str) -> None:
    norm = Norm(NOT_NORMS[form])
    assert fuse(norm, torch.float32) == FusedCounts()
    assert set(norm.__dict__).isdisjoint({"forward", "graft_fused"})


def test_a_frozen_norm_stays_frozen() -> None:
    norm = Norm(NORMS["w"]).requires_grad_(False)
    assert fuse(norm, torch.float32).norms == 1
    assert not norm.weight.requires_grad


def test_hooks_on_a_norm_still_run() -> None:
    norm, x, seen = Norm(NORMS["w"]), torch.randn(3, 19), list[Tensor]()
    norm.register_forward_hook(lambda module, args, output: seen.append(output))
    assert fuse(norm, torch.float32).norms == 1
    seen.clear()
    assert seen == [] and norm(x) is seen[0]  # noqa: PT018


class Mlp(nn.Module):
    """A gated MLP by a formula that is given."""

    def __init__(self, formula: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 11), nn.Linear(6, 11), nn.Linear(11, 6)
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)


MLPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "silu": lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x)),
    "gelu": lambda m, x: m.down_proj(m.up_proj(x) * F.gelu(m.gate_proj(x), approximate="tanh")),
}
NOT_MLPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "exact gelu": lambda m, x: m.down_proj(F.gelu(m.gate_proj(x)) * m.up_proj(x)),
    "gate and up exchanged": lambda m, x: m.down_proj(m.gate_proj(x) * F.silu(m.up_proj(x))),
    "a scaled gate": lambda m, x: m.down_proj(F.silu(m.gate_proj(x) * 0.9) * m.up_proj(x)),
    "a scaled result": lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x)) * 0.9,
    "a clamp": lambda m, x: m.down_proj(F.silu(m.gate_proj(x)).clamp(max=5) * m.up_proj(x)),
    "a changed input": lambda m, x: m.down_proj(F.silu(m.gate_proj(x * 0.9)) * m.up_proj(x)),
    "a residual": lambda m, x: x + m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x)),
    "its weights read past the layers": lambda m, x: F.silu(x @ m.gate_proj.weight.T) @ m.down_proj.weight.T,
}


@pytest.mark.parametrize("form", MLPS)
def test_a_gated_mlp_is_recognised_and_calls_its_own_projections(form: str) -> None:
    mlp, x, called = Mlp(MLPS[form]), torch.randn(2, 3, 6), list[nn.Module]()
    truth = mlp(x)
    assert fuse(mlp, torch.float32) == FusedCounts(gates=1)
    for child in mlp.children():
        child.register_forward_hook(lambda module, args, output: called.append(module))
    torch.testing.assert_close(mlp(x), truth)
    assert called == [mlp.gate_proj, mlp.up_proj, mlp.down_proj]


@pytest.mark.parametrize("form", NOT_MLPS)
def test_an_mlp_that_differs_keeps_its_own_code(form: str) -> None:
    mlp = Mlp(NOT_MLPS[form])
    children = dict(mlp.named_children())
    assert fuse(mlp, torch.float32) == FusedCounts()
    assert "forward" not in mlp.__dict__
    assert dict(mlp.named_children()) == children


def test_a_model_that_turns_neighbours_instead_of_halves_keeps_its_own_rotation(tmp_path: Path) -> None:
    config = CohereConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=24, intermediate_size=44, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    tiny.write(tmp_path / "cohere", AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    base, ids = load_base(str(tmp_path / "cohere"), compute_dtype="float32", device="cpu"), tiny.ids()
    assert base.fused == FusedCounts(norms=0, gates=1, rotary=0)
    truth = tiny.plain_logits(tiny.plain(tmp_path / "cohere"), ids)
    assert (tiny.base_logits(base, ids) - truth).norm() <= 1e-5 * truth.norm()


def test_no_other_model_of_the_same_code_is_changed() -> None:
    own = modeling_llama.apply_rotary_pos_emb
    plain = tiny.plain(tiny.folder("llama"))
    base = loaded("llama")
    assert modeling_llama.apply_rotary_pos_emb is own
    assert all("forward" not in module.__dict__ for module in plain.modules())
    assert all("graft_fused" not in module.__dict__ for module in plain.modules())
    attention = base.model.model.layers[0].self_attn
    ours = inspect.unwrap(attention.forward.__func__)  # below what transformers decorates it with
    assert ours.__globals__["apply_rotary_pos_emb"] is not own
    assert isinstance(ours.__globals__["apply_rotary_pos_emb"], Rotary)
    assert inspect.unwrap(type(attention).forward).__globals__["apply_rotary_pos_emb"] is own


def test_a_copy_of_a_model_uses_its_own_weights() -> None:
    base, x = loaded("llama"), torch.randn(3, 28)
    norm = base.model.model.norm
    twin = copy.deepcopy(norm)
    with torch.no_grad():
        twin.weight.zero_()
    assert not twin(x).any()
    assert norm(x).abs().min() > 0


def test_what_a_rotation_was_not_proven_for_goes_to_the_models_own() -> None:
    asked: list[int] = []

    def own(*args: Any, **kwargs: Any) -> Any:
        asked.append(len(args) + len(kwargs))
        return modeling_llama.apply_rotary_pos_emb(*args, **kwargs)

    rotary = fused_autograd.Rotary(own, some=False)
    q, k, angle = torch.randn(2, 3, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 5, 4).repeat(1, 1, 2)
    c, s = angle.cos(), angle.sin()
    for found, truth in zip(rotary(q, k, c, s), modeling_llama.apply_rotary_pos_emb(q, k, c, s), strict=True):
        torch.testing.assert_close(found, truth)
    assert asked == []
    rotary(q, k, c, s, unsqueeze_dim=1)
    rotary(q, k, c.double(), s.double())
    rotary(q[:1], k[:1], c[:1, None][:, 0].requires_grad_(), s[:1])
    assert asked == [5, 4, 4]


def test_without_anything_faster_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_fused_ops", lambda device, dtype: False)
    assert fuse(tiny.plain(tiny.folder("llama")), torch.float32) == FusedCounts()


def test_a_rotation_that_is_called_in_another_way_is_the_models_own() -> None:
    asked: list[tuple[int, list[str]]] = []

    def own(q: torch.Tensor, k: Any = None, cos: Any = None, sin: Any = None, unsqueeze_dim: int = 1) -> torch.Tensor:
        asked.append((q.ndim, [name for name, given in (("k", k), ("cos", cos), ("sin", sin)) if given is not None]))
        return q

    rotary = Rotary(own, some=True)
    q, angles = torch.randn(1, 2, 5, 6), torch.randn(1, 5, 6)
    assert rotary(q, cos=angles, sin=angles, unsqueeze_dim=2) is q
    assert asked == [(4, ["cos", "sin"])]
    rotary(q, q, angles, angles)
    assert len(asked) == 1


def test_a_module_without_parameters_of_its_own_is_asked_for_on_its_models_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compressed weights are none: on a GPU such a module would run the CPU's fused operations as plain PyTorch."""
    seen: set[str] = set()
    monkeypatch.setattr(kernels, "has_fused_ops", lambda device, dtype: bool(seen.add(device.type)))
    fuse(nn.Sequential(nn.Linear(4, 4, device="meta"), nn.SiLU()), torch.float32)
    assert seen == {"meta"}
