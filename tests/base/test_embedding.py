"""The input embedding: never written to by a pass, and one gradient with the head that shares its matrix."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from graftlm.base.context import ForwardContext, TiedGradient
from graftlm.base.embedding import StoredEmbedding, look_up
from graftlm.base.loading import load_base
from graftlm.segments import Segments
from graftlm.training.loss import weighted_loss


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("given", [True, False], ids=["with the head's", "alone"])
def test_rows_are_added_to_the_heads_gradient_and_sum_in_float32(padding: int | None, given: bool) -> None:
    random = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(11, 5, generator=random).bfloat16())
    ids = torch.tensor([3, 7, 3, 0, 7, 7])
    dy, head = torch.randn(6, 5, generator=random), torch.randn(11, 5, generator=random).bfloat16()
    tied = TiedGradient()
    rows = look_up(weight, ids, padding, torch.float32, tied)
    assert torch.equal(rows, weight.detach()[ids].float())
    tied.gradient = kept = head.clone() if given else None
    (found,) = torch.autograd.grad(rows, weight, dy)
    wide = weight.detach().float().requires_grad_()
    (truth,) = torch.autograd.grad(F.embedding(ids, wide, padding), wide, dy)
    assert torch.equal(found, (truth + (head.float() if given else 0)).bfloat16())
    assert tied.gradient is None
    assert kept is None or found.data_ptr() == kept.data_ptr()


def test_a_tied_head_and_its_lookup_give_one_gradient_in_the_heads_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tiny.write(tmp_path, tiny.random_model("llama", tie_word_embeddings=True))
    base = load_base(str(place), precision="bfloat16", compute_dtype="float32", device="cpu")
    base.model.requires_grad_(True)
    ids, labels = torch.tensor([5, 9, 5, 2]), torch.tensor([9, 5, 2])
    left: list[TiedGradient | None] = []

    def gradient(*, last: bool = False) -> torch.Tensor:
        weight = base.structure.embedding.weight
        weight.grad = None
        context = ForwardContext(Segments(lengths=(4,), slots=(0,)), head_gradient_last=last)
        hidden = base.hidden(ids, context)
        left.append(context.tied)
        total, _ = weighted_loss(base, hidden[:3], labels, torch.full((3,), 1 / 3), ((0, 0, 3),), context)
        assert context.tied is None
        total.backward()
        return weight.grad.float()

    ours = gradient()
    assert torch.equal(gradient(last=True), ours)
    monkeypatch.setattr(StoredEmbedding, "_shares_gradient", lambda self, weight: False)
    plain = gradient()
    assert [type(one) for one in left] == [TiedGradient, TiedGradient, type(None)]
    torch.testing.assert_close(ours, plain, rtol=2**-6, atol=float(plain.abs().max()) * 2**-8)
    assert ours.abs().sum(1).count_nonzero() == len(ours)  # the head's rows, all of them


@pytest.mark.parametrize(
    "architecture", ["gemma3", "llama", "opt"]
)  # scaled behind the lookup; plain; with a padding row
def test_an_embedding_gives_what_transformers_gives_whatever_type_it_is_stored_in(architecture: str) -> None:
    plain = tiny.plain(tiny.folder(architecture)).get_input_embeddings()
    ids = torch.tensor([[5, 0, 9], [1, 2, 5]])
    for precision in ("float32", "bfloat16"):
        base = load_base(str(tiny.folder(architecture)), precision=precision, compute_dtype="float32", device="cpu")
        embedding = base.structure.embedding
        assert isinstance(embedding, StoredEmbedding)
        assert embedding is base.model.get_input_embeddings()
        rows = embedding(ids)
        wide = plain.weight.detach() if precision == "float32" else plain.weight.detach().bfloat16().float()
        scale = getattr(plain, "embed_scale", torch.tensor(1.0))
        assert torch.equal(rows, F.embedding(ids, wide) * scale)
        assert (embedding.num_embeddings, embedding.padding_idx) == (plain.num_embeddings, plain.padding_idx)


@pytest.mark.parametrize("held", [0, 1], ids=["the base held", "an adapter's own rows held"])
def test_a_forward_pass_inside_another_threads_lookup_gets_its_own_rows_and_leaves_the_others_alone(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interleaving is forced: one thread stays inside the class's own code while another makes a whole pass."""
    base = load_base(str(tiny.folder("gemma3")), precision="bfloat16", compute_dtype="float32", device="cpu")
    tiny.adapted(base, trainable_tokens=(4, 9, 11))
    embedding = base.structure.embedding
    prompts = [(tiny.ids(7, seed=1), 0), (torch.tensor([4, 11, 9]), 1)]

    def rows(i: int) -> torch.Tensor:
        ids, slot = prompts[i]
        with torch.no_grad(), ForwardContext(Segments(lengths=(len(ids),), slots=(slot,))):
            return embedding(ids)

    alone = [rows(0), rows(1)]
    before = dict(embedding.__dict__), dict(embedding.original.__dict__), dict(embedding.original._parameters)
    kind, main = type(embedding.original), threading.get_ident()
    own, inside, leave = kind.forward, threading.Event(), threading.Event()

    def waiting(self: Any, ids: torch.Tensor) -> torch.Tensor:
        if threading.get_ident() != main:
            inside.set()
            assert leave.wait(10)
        return own(self, ids)

    monkeypatch.setattr(kind, "forward", waiting)
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(rows(held)))
    thread.start()
    assert inside.wait(10)
    assert torch.equal(rows(1 - held), alone[1 - held])
    leave.set()
    thread.join(10)
    assert torch.equal(found[0], alone[held])
    assert (dict(embedding.__dict__), dict(embedding.original.__dict__), dict(embedding.original._parameters)) == before


def test_moving_or_replacing_the_weight_reaches_what_the_class_itself_reads() -> None:
    original = nn.Embedding(7, 5)
    stored = StoredEmbedding(original, torch.float32)
    stored.weight = nn.Parameter(stored.weight.detach().bfloat16(), requires_grad=False)
    assert original.weight is stored.weight
    stored.to(torch.float64)
    assert original.weight.dtype == torch.float64
    assert [name for name, _ in stored.named_parameters()] == ["weight"]
