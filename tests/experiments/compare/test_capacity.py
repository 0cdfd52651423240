"""Spectra of adapters: the small matrices give what B A itself would, for plain layers, patterns of ranks and experts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import tiny_run
import torch
from safetensors.torch import load_file

from graftlm.adapters import peft_format as adapter_format
from graftlm.base.loading import load_base
from graftlm.experiments.compare.capacity import effective_rank, measure, singular_values


@pytest.mark.parametrize(("r", "out", "wide"), [(3, 17, 11), (5, 4, 29), (6, 23, 2), (1, 7, 7)])
def test_singular_values_are_those_of_b_a_without_forming_it(r: int, out: int, wide: int) -> None:
    torch.manual_seed(r)
    A, B = torch.randn(r, wide), torch.randn(out, r)
    found = singular_values(A, B)
    expected = torch.linalg.svdvals(B.double() @ A.double())[: len(found)]
    torch.testing.assert_close(found, expected)
    assert len(found) == min(r, out, wide)


def test_small_singular_values_keep_their_digits() -> None:
    Q = torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64)).Q
    A = torch.diag(torch.tensor([1.0, 1e-3, 1e-7], dtype=torch.float64)) @ Q.T  # (3, 9)
    torch.testing.assert_close(singular_values(A, Q), torch.tensor([1.0, 1e-3, 1e-7], dtype=torch.float64))


def test_the_effective_rank_is_r_for_equal_values_and_1_for_one_direction() -> None:
    assert effective_rank(torch.full((7,), 0.3)) == pytest.approx(7)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0
    p = (0.75, 0.25)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))


def test_a_saved_adapter_is_measured_layer_by_layer_with_the_ranks_of_its_patterns(tmp_path: Path) -> None:
    tiny_run.train(tmp_path, rank=3, rank_pattern="q_proj=5", targets="attention")
    found = measure(tmp_path / "run" / "adapter")
    ranks = {s.kind: s.rank for s in found.spectra}
    assert ranks == {"q_proj": 5, "k_proj": 3, "v_proj": 3, "o_proj": 3}
    assert len(found.spectra) == 8
    assert found.rank == 3
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    values = torch.linalg.svdvals(tensors[f"{stem}B.weight"].double() @ tensors[f"{stem}A.weight"].double())[:5]
    own = next(s for s in found.spectra if s.layer == "model.layers.1.self_attn.q_proj")
    assert own.values == pytest.approx((values / values[0]).tolist(), abs=1e-6)
    assert own.effective == pytest.approx(effective_rank(values), rel=1e-5)


def test_every_expert_of_a_stack_is_a_layer_of_its_own(tmp_path: Path) -> None:
    base = load_base(str(tiny.folder("mixtral")), precision="float32")
    adapter = tiny.adapted(base, rank=2)
    adapter_format.save(base, adapter, tmp_path, {})
    found = measure(tmp_path)
    slot = adapter.layers["model.layers.0.mlp.experts.down_proj"]
    for expert in range(3):
        A, B = (t.detach().double() for t in slot.factors(expert))  # type: ignore[union-attr]
        values = torch.linalg.svdvals(B @ A)[:2]
        own = [
            s
            for s in found.spectra
            if s.layer.startswith("model.layers.0.mlp.experts") and s.layer.endswith(f".{expert}")
        ]
        assert any(s.values == pytest.approx((values / values[0]).tolist(), abs=1e-5) for s in own), expert


def test_an_adapter_that_changed_nothing_has_no_effective_rank(tmp_path: Path) -> None:
    base = load_base(str(tiny.folder("llama")), precision="float32")
    adapter = tiny.adapted(base)
    for name, parameter in adapter.parameters().items():
        if name.endswith("lora_B.weight"):
            torch.nn.init.zeros_(parameter)
    adapter_format.save(base, adapter, tmp_path, {})
    found = measure(tmp_path)
    assert (found.effective, found.share, found.saturated) == (0.0, 0.0, False)
    json.dumps([s.values for s in found.spectra])
