"""What runs between body and logits is trained like everything else, and nothing that is trained is skipped in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM

from graftlm import kernels
from graftlm.adapters.bank import LayerBank
from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base, load_base
from graftlm.errors import TrainingError
from graftlm.segments import Segments
from graftlm.training import loss as loss_module
from graftlm.training.loss import tail_parameters, weighted_loss
from graftlm.training.micro_batch import BatchItem, collate, forward
from graftlm.training.trainer import optimizer_step

ROWS = tiny.examples((9, 4, 12))
SPECIAL = {"vocab_size": tiny.VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODERNBERT = transformers.ModernBertDecoderConfig(
    **SPECIAL, hidden_size=28, intermediate_size=44, num_hidden_layers=2, num_attention_heads=2, local_attention=16,
    max_position_embeddings=64, cls_token_id=1, sep_token_id=2,
)  # fmt: skip
MAMBA = transformers.MambaConfig(**SPECIAL, hidden_size=28, state_size=6, num_hidden_layers=2, time_step_rank=5)
BART = transformers.BartConfig(
    **SPECIAL, d_model=28, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=44, max_position_embeddings=64
)  # fmt: skip


def loaded(config: Any, place: Path) -> Base:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    tiny.write(place, model)
    return load_base(str(place), compute_dtype="float32", device="cpu")


def gradients(base: Base, plain: Any) -> None:
    """Fill `grad` of both with that of the mean loss over ROWS."""
    count = sum(int(row.loss_mask[1:].sum()) for row in ROWS)
    work = [BatchItem(row, 0, (0, i), 1.0 / count) for i, row in enumerate(ROWS)]
    for group in [work] if base.packs else [[w] for w in work]:
        micro_batch = collate(base, group)
        forward(base, micro_batch)[0].backward()
    tiny.mean_loss(plain, ROWS).backward()


def test_modules_between_body_and_head_get_the_gradients_of_plain_autograd(tmp_path: Path) -> None:
    base, plain = loaded(MODERNBERT, tmp_path / "base"), tiny.plain(tmp_path / "base")
    base.model.requires_grad_(True)
    gradients(base, plain)
    wanted = dict(plain.named_parameters())
    found = dict(base.model.named_parameters())
    assert {"lm_head.dense.weight", "lm_head.norm.weight"} <= set(found) == set(wanted)
    for name, parameter in found.items():
        assert parameter.grad is not None, name
        assert wanted[name].grad.abs().max() > 0, name
        tiny.close(parameter.grad, wanted[name].grad, rtol=1e-3)


def test_an_adapter_between_body_and_head_is_trained(tmp_path: Path) -> None:
    base = loaded(MODERNBERT, tmp_path / "base")
    adapter = tiny.adapted(base)
    names = [name for name in adapter.parameters() if name.startswith("lm_head.dense.")]
    assert len(names) == 2
    assert {id(p) for p in tail_parameters(base)} == {id(adapter.parameters()[name]) for name in names}
    before = {name: p.detach().clone() for name, p in adapter.parameters().items()}
    optimizer_step(base, [tiny.trial(base, adapter, ROWS)], 100)
    for name, parameter in adapter.parameters().items():
        assert not torch.equal(parameter, before[name]), name


def test_an_adapter_on_a_layer_that_text_alone_does_not_reach_is_refused_by_name(tmp_path: Path) -> None:
    base = loaded(BART, tmp_path / "base")
    adapter = tiny.adapted(base)
    before = {name: p.detach().clone() for name, p in adapter.parameters().items()}
    with pytest.raises(TrainingError, match=r"layers\.0\.encoder_attn\.k_proj\.lora_A\.weight' and 15 more.*--targets"):
        optimizer_step(base, [tiny.trial(base, adapter, ROWS)], 100)
    assert all(torch.equal(p, before[name]) for name, p in adapter.parameters().items())


def test_an_adapter_on_a_layer_whose_weight_the_model_reads_past_it_is_trained(tmp_path: Path) -> None:
    base = loaded(MAMBA, tmp_path / "base")
    adapter = tiny.adapted(base)
    before = {name: p.detach().clone() for name, p in adapter.parameters().items()}
    assert optimizer_step(base, [tiny.trial(base, adapter, ROWS)], 100)[0].step == 1
    assert not [name for name, p in adapter.parameters().items() if torch.equal(p, before[name])]


def test_the_layers_that_are_used_are_trained_without_the_others(tmp_path: Path) -> None:
    base = loaded(BART, tmp_path / "base")
    adapter = tiny.adapted(base, targets=("mlp",))
    assert optimizer_step(base, [tiny.trial(base, adapter, ROWS)], 100)[0].step == 1


def test_full_training_of_a_model_whose_every_tensor_is_used_is_not_refused(tmp_path: Path) -> None:
    base = loaded(MAMBA, tmp_path / "base")
    assert optimizer_step(base, [tiny.trial(base, None, ROWS)], 100)[0].step == 1


@pytest.mark.parametrize("architecture", tiny.MIXTURES)
@pytest.mark.parametrize("full", [True, False])
def test_experts_that_no_token_reached_are_no_error(architecture: str, full: bool) -> None:
    base = load_base(str(tiny.folder(architecture)), compute_dtype="float32", device="cpu")
    one = tiny.examples((2,))
    adapter = None if full else tiny.adapted(base)
    assert optimizer_step(base, [tiny.trial(base, adapter, one)], 100)[0].step == 1


# ---- the head alone --------------------------------------------------------------------------------------------------


def both_ways(
    base: Base, wanted: list[torch.nn.Parameter], monkeypatch: pytest.MonkeyPatch, count: int = 23
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Loss, each token's, and gradients to hidden states and `wanted`: through the plain head, and through the model's code."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(count, base.structure.head.in_features, generator=generator).to(base.activation_dtype)
    labels = torch.randint(0, base.structure.vocabulary, (count,), generator=generator)
    weights = torch.rand(count, generator=generator) + 0.3
    found: list[list[torch.Tensor]] = []
    context = ForwardContext(Segments(lengths=(count,), slots=(0,)))
    for general in (False, True):
        if general:
            monkeypatch.setattr(loss_module, "_plain_head", lambda base, trained: None)
        h = hidden.clone().requires_grad_()
        total, losses = weighted_loss(base, h, labels, weights, [(0, 0, count)], context)
        found.append([total.detach(), losses, *torch.autograd.grad(total * 1.7, [h, *wanted])])
        with torch.no_grad():
            found[-1].append(weighted_loss(base, hidden, labels, weights, [(0, 0, count)], context)[1])
    return found[0], found[1]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "mixtral"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("chunk", [1 << 23, 16 * tiny.VOCABULARY])
def test_the_plain_heads_loss_and_gradients_are_those_of_the_models_own_code(
    architecture: str, trained: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 16)
    base = load_base(str(tiny.folder(architecture)), compute_dtype="float32", device="cpu")
    assert base.structure.head_is_plain_matmul
    base.structure.head.weight.requires_grad_(trained)
    found, wanted = both_ways(base, [base.structure.head.weight] if trained else [], monkeypatch)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        tiny.close(a, b, rtol=1e-5)


def test_a_head_in_bfloat16_gets_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(str(tiny.folder("llama")), precision="bfloat16", compute_dtype="float32", device="cpu")
    base.structure.head.weight.requires_grad_()
    found, wanted = both_ways(base, [base.structure.head.weight], monkeypatch)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        tiny.close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    ("count", "vocabulary"), [(0, 9), (1, 9), (2042, 49152), (2040, 49152), (17, 1 << 30), (5000, 128)]
)
def test_rows_meet_the_head_in_pieces_of_one_size(count: int, vocabulary: int) -> None:
    pieces = loss_module.head_pieces(7, 7 + count, vocabulary, loss_module.CHUNK_LOGITS)
    assert [row for first, last in pieces for row in range(first, last)] == [*range(7, 7 + count)]
    sizes = {last - first for first, last in pieces}
    most = max(loss_module.CHUNK_ROWS, loss_module.CHUNK_LOGITS // vocabulary)
    assert all(0 < size <= most for size in sizes)
    assert len(sizes) <= 1 or max(sizes) - min(sizes) == 1


def test_logits_become_their_gradient_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(str(tiny.folder("llama")), compute_dtype="float32", device="cpu")
    made: list[int] = []
    used: list[int] = []
    base.structure.head.register_forward_hook(lambda module, args, y: made.append(y.data_ptr()))
    own = kernels.matmul_t
    monkeypatch.setattr(kernels, "matmul_t", lambda dy, *rest: used.append(dy.data_ptr()) or own(dy, *rest))
    hidden = torch.randn(9, 28, requires_grad=True)
    weighted_loss(
        base, hidden, torch.arange(9), torch.ones(9), [(0, 0, 9)], ForwardContext(Segments(lengths=(9,), slots=(0,)))
    )
    assert made == used != []


def test_a_model_that_caps_its_logits_has_no_plain_head() -> None:
    base = load_base(str(tiny.folder("gemma2")), compute_dtype="float32", device="cpu")
    assert not base.structure.head_is_plain_matmul
    assert loss_module._plain_head(base, []) is None


def test_a_head_with_an_adapter_or_with_more_that_is_trained_is_not_taken_as_plain() -> None:
    base = load_base(str(tiny.folder("llama")), compute_dtype="float32", device="cpu")
    assert loss_module._plain_head(base, []) is base.structure.head
    assert loss_module._plain_head(base, [torch.nn.Parameter(torch.ones(2))]) is None
    base.structure.head.bank = LayerBank()
    assert loss_module._plain_head(base, []) is None


def test_a_label_that_is_no_token_of_the_model_is_refused() -> None:
    base = load_base(str(tiny.folder("llama")), compute_dtype="float32", device="cpu")
    with pytest.raises(IndexError, match=r"0 \.\. 82"):
        weighted_loss(
            base, torch.randn(1, 28), torch.tensor([83]), torch.ones(1), [(0, 0, 1)],
            ForwardContext(Segments(lengths=(1,), slots=(0,))),
        )  # fmt: skip
