"""How far data are from a base: measured as a plain softmax gives it, and seen before training on real data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

from graftlm.base.loading import load_base
from graftlm.commands.plan import plan
from graftlm.config import PlanConfig
from graftlm.data.dataset import Example
from graftlm.planning.domain_shift import measure_domain_shift, sample_examples
from graftlm.planning.perplexity import DomainShift
from graftlm.planning.plan import ModelPlan

E2E = Path(__file__).parents[3] / "shared" / "data" / "e2e" / "train.jsonl"


def test_loss_and_entropy_are_those_of_the_plain_model() -> None:
    rows = tiny.examples((30, 50, 40, 60))
    base = load_base(str(tiny.folder("llama")), precision="float32", compute_dtype="float32", device="cpu")
    found = measure_domain_shift(base, rows)
    model = tiny.plain(tiny.folder("llama"))
    losses, entropies, loss_mask = [], [], []
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))
        logits = tiny.plain_logits(model, ids)[:-1].double()
        losses.append(F.cross_entropy(logits, ids[1:], reduction="none"))
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
        loss_mask.append(torch.from_numpy(row.loss_mask[1:]))
    loss, entropy, answer = torch.cat(losses), torch.cat(entropies), torch.cat(loss_mask)
    assert found.answer_loss == pytest.approx(float(loss[answer].mean()), rel=1e-4)
    prompt = ~answer if int((~answer).sum()) >= 64 else torch.ones_like(answer)
    assert found.prompt_loss == pytest.approx(float(loss[prompt].mean()), rel=1e-4)
    assert found.prompt_entropy == pytest.approx(float(entropy[prompt].mean()), rel=1e-4)
    assert (found.rows, found.tokens) == (4, 180)


@pytest.mark.parametrize(("excess_loss", "kind"), [(-0.1, "near"), (0.3, "near"), (0.7, "between"), (2.3, "far")])
def test_surprise_on_the_prompts_decides(excess_loss: float, kind: str) -> None:
    found = DomainShift(answer_loss=9.0, prompt_loss=3.0 + excess_loss, prompt_entropy=3.0, rows=1, tokens=100)
    assert found.kind == kind
    assert found.to_json()["excess_loss"] == pytest.approx(excess_loss)


def test_a_sample_is_spread_over_the_data_and_about_as_large_as_asked() -> None:
    rows = tiny.examples([20] * 500)
    chosen = sample_examples(rows, most_tokens=400)
    places = [rows.index(example) for example in chosen]
    assert 300 <= sum(d.tokens for d in chosen) <= 500
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] == 499
    gaps = np.diff(places)
    assert gaps.max() <= 2 * gaps.min()


def test_one_document_longer_than_the_sample_is_still_read() -> None:
    long = Example(ids=np.arange(900, dtype=np.int32) % 83, loss_mask=np.ones(900, dtype=bool), row="x:1", digest="x")
    assert sample_examples([long], most_tokens=100) == [long]


def planned(data: str) -> ModelPlan:
    return plan(PlanConfig(models=("demo",), data=(data,), gpu="rtx-4090", max_length=0)).plans[0]


def test_a_new_voice_over_known_prompts_is_near_and_lora_is_advised() -> None:
    plan = planned("demo")
    domain_shift = plan.facts.domain_shift
    assert domain_shift is not None
    assert domain_shift.kind == "near"
    assert domain_shift.answer_loss > 5  # there is much to learn all the same
    assert plan.advice.setting is not None
    assert plan.advice.setting.method == "lora"
    assert any(f"excess loss {domain_shift.excess_loss:.2f} nats" in text for text in plan.advice.would_change)


def test_another_domain_is_seen_to_be_far_before_anything_is_trained() -> None:
    if not E2E.is_file():
        pytest.skip(f"the E2E data are not at {E2E}")
    plan = planned(str(E2E))
    domain_shift = plan.facts.domain_shift
    assert domain_shift is not None
    assert domain_shift.kind == "far"
    assert domain_shift.excess_loss > 2 * planned("demo").facts.domain_shift.excess_loss  # pyright: ignore[reportOptionalMemberAccess]
    assert plan.advice.setting is not None
    assert plan.advice.setting.full
    assert any("The data are far from this base" in text for text in plan.advice.reasons)
