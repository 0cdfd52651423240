"""The gradient of an embedding that is the head too: what autograd would sum, in the head's own memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from graftlm.base import hf
from graftlm.base.load import load_base
from graftlm.base.lookup import Share, look_up
from graftlm.segments import Segments, running
from graftlm.training.loss import weighted_loss


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("given", [True, False], ids=["with the head's", "alone"])
def test_rows_are_added_to_the_heads_gradient_and_sum_in_float32(padding: int | None, given: bool) -> None:
    random = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(11, 5, generator=random).bfloat16())
    ids = torch.tensor([3, 7, 3, 0, 7, 7])
    dy, head = torch.randn(6, 5, generator=random), torch.randn(11, 5, generator=random).bfloat16()
    share = Share()
    rows = look_up(weight, ids, padding, torch.float32, share)
    assert torch.equal(rows, weight.detach()[ids].float())
    share.gradient = kept = head.clone() if given else None
    (found,) = torch.autograd.grad(rows, weight, dy)
    wide = weight.detach().float().requires_grad_()
    (truth,) = torch.autograd.grad(F.embedding(ids, wide, padding), wide, dy)
    assert torch.equal(found, (truth + (head.float() if given else 0)).bfloat16())
    assert share.gradient is None
    assert kept is None or found.data_ptr() == kept.data_ptr()


def test_a_tied_head_and_its_lookup_give_one_gradient_in_the_heads_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tiny.write(tmp_path, tiny.random_model("llama", tie_word_embeddings=True))
    base = load_base(str(place), precision="bfloat16", compute="float32")
    base.model.requires_grad_(True)
    ids, labels = torch.tensor([5, 9, 5, 2]), torch.tensor([9, 5, 2])
    shares: list[Any] = []

    def gradient() -> torch.Tensor:
        weight = base.anatomy.embedding.weight
        weight.grad = None
        with running(Segments(lengths=(4,), slots=(0,))):
            hidden = base.hidden(ids, Segments(lengths=(4,), slots=(0,)))
            shares.append(getattr(base.anatomy.head, "share", None))
            total, _ = weighted_loss(base, hidden[:3], labels, torch.full((3,), 1 / 3), ((0, 0, 3),))
        total.backward()
        assert weight.grad is not None
        return weight.grad.float()

    ours = gradient()
    base.anatomy.head.late = True
    assert torch.equal(gradient(), ours)
    base.anatomy.head.late = False
    monkeypatch.setattr(
        hf, "look_up", lambda weight, ids, padding, wide, share: F.embedding(ids, weight, padding).to(wide)
    )
    monkeypatch.setattr(hf, "Share", lambda: None)
    plain = gradient()
    assert isinstance(shares[0], Share)
    assert shares[-1] is None
    torch.testing.assert_close(ours, plain, rtol=2**-6, atol=float(plain.abs().max()) * 2**-8)
    assert ours.abs().sum(1).count_nonzero() == len(ours)  # the head's rows, all of them
