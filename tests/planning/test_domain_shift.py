"""How far data are from a base: measured as a plain softmax gives it, on a sample whose error is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

from graftlm import demo, progress
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base, load_base
from graftlm.base.requantizing import requantize
from graftlm.commands import plan as plan_command
from graftlm.commands.plan import plan
from graftlm.config import PlanConfig, Precision
from graftlm.data.dataset import Example, load
from graftlm.data.sources import named_source
from graftlm.planning.domain_shift import mean_of_sample, measure_domain_shift, sample_examples
from graftlm.planning.perplexity import SAMPLE_TOKENS, DomainShift, Estimate
from graftlm.planning.plan import ModelPlan

E2E = Path(__file__).parents[3] / "shared" / "data" / "e2e" / "train.jsonl"


def tiny_base(architecture: str = "llama") -> Base:
    return load_base(str(tiny.folder(architecture)), precision="float32", compute_dtype="float32", device="cpu")


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bloom"])  # packed, with capped logits, and one at a time
def test_loss_and_entropy_are_those_of_the_plain_model(architecture: str) -> None:
    rows = tiny.examples((30, 50, 40, 60))
    found = measure_domain_shift(tiny_base(architecture), rows)
    model = tiny.plain(tiny.folder(architecture))
    losses, entropies, loss_mask = [], [], []
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))
        logits = tiny.plain_logits(model, ids)[:-1].double()
        losses.append(F.cross_entropy(logits, ids[1:], reduction="none"))
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
        loss_mask.append(torch.from_numpy(row.loss_mask[1:]))
    loss, entropy, answer = torch.cat(losses), torch.cat(entropies), torch.cat(loss_mask)
    assert found.answer_loss.value == pytest.approx(float(loss[answer].mean()), rel=1e-4)
    prompt = ~answer if int((~answer).sum()) >= 64 else torch.ones_like(answer)
    assert found.prompt_loss.value == pytest.approx(float(loss[prompt].mean()), rel=1e-4)
    assert found.prompt_entropy.value == pytest.approx(float(entropy[prompt].mean()), rel=1e-4)
    excess = float((loss - entropy)[prompt].mean())
    assert found.excess_loss.value == pytest.approx(excess, abs=2e-4)
    assert (found.rows, found.tokens, found.of_rows) == (4, 180, 4)
    assert found.excess_loss.error == 0  # every row was read


@pytest.mark.parametrize(
    ("excess_loss", "kind"),
    [(-0.1, "near"), (0.499, "near"), (0.5, "between"), (1.0, "between"), (1.001, "far"), (2.3, "far")],
)
def test_surprise_on_the_prompts_decides(excess_loss: float, kind: str) -> None:
    found = DomainShift(
        answer_loss=Estimate(value=9.0),
        prompt_loss=Estimate(value=3.0 + excess_loss),
        prompt_entropy=Estimate(value=3.0),
        excess_loss=Estimate(value=excess_loss),
        rows=1,
        tokens=100,
        of_rows=1,
    )
    assert found.kind == kind


# ---- the sample ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [60, 400, 1000, 10_000])
@pytest.mark.parametrize("lengths", [[20] * 500, [7, 900, 33, 250, 12] * 40, [5000] * 3])
def test_a_sample_has_at_most_the_tokens_that_were_asked_for(lengths: list[int], most: int) -> None:
    rows = tiny.examples(lengths)
    chosen = sample_examples(rows, most)
    tokens = sum(d.tokens for d in chosen)
    assert chosen
    assert tokens <= most
    assert tokens + max(lengths) > most or len(chosen) == len(rows)  # as many as there is room for
    assert len({d.row for d in chosen}) == len(chosen)


def test_a_seed_draws_the_same_sample_and_another_seed_another() -> None:
    rows = tiny.examples([20] * 500)
    first, again, other = (sample_examples(rows, 400, seed=seed) for seed in (3, 3, 4))
    assert [d.row for d in first] == [d.row for d in again]
    assert [d.row for d in first] != [d.row for d in other]


def test_of_a_long_example_the_part_around_its_first_target_token_is_read() -> None:
    mask = np.zeros(900, dtype=bool)
    mask[700:] = True
    long = Example(ids=np.arange(900, dtype=np.int32) % 83, loss_mask=mask, row="x:1", digest="x")
    (part,) = sample_examples([long], 100)
    assert part.ids.tolist() == long.ids[650:750].tolist()
    assert part.loss_mask.tolist() == mask[650:750].tolist()
    (short,) = sample_examples([long], 1000, longest=60)
    assert short.tokens == 60


def test_an_interval_of_two_errors_holds_the_mean_of_all_tokens_about_nineteen_times_of_twenty() -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 60, 400)
    of = np.repeat(np.arange(400), lengths)
    values = draw.normal(1.0, 2.0, len(of)) + np.repeat(draw.normal(0, 0.7, 400), lengths)  # rows differ as wholes
    held = 0
    for _ in range(400):
        rows = draw.permutation(400)[:60]
        own = np.concatenate([values[of == row] for row in rows])
        found = mean_of_sample(own, np.repeat(np.arange(60), lengths[rows]), 60, 400)
        low, high = found.interval
        held += low <= values.mean() <= high
    assert 0.91 <= held / 400 <= 0.985


def test_one_row_of_several_says_nothing_of_the_others() -> None:
    of = np.zeros(5, dtype=np.int64)
    assert mean_of_sample(np.ones(5), of, 1, 9).error == float("inf")
    assert mean_of_sample(np.ones(5), of, 1, 1).error == 0


def demo_rows(count: int) -> tuple[Base, tuple[Example, ...]]:
    base = load_base("demo", precision="float32", compute_dtype="float32", device="cpu")
    dataset = load([named_source(demo.resolve_data("demo", "train"), "train")], Encoder(base.tokenizer))
    return base, dataset.examples[:count]


def test_the_interval_of_a_sample_of_the_bundled_data_contains_the_value_of_all_of_it() -> None:
    base, rows = demo_rows(150)
    whole = measure_domain_shift(base, rows)
    found = measure_domain_shift(base, sample_examples(rows, 3000), of_rows=len(rows))
    again = measure_domain_shift(base, sample_examples(rows, 3000), of_rows=len(rows))
    assert found == again
    assert found.tokens <= 3000 < whole.tokens
    for name in ("excess_loss", "answer_loss", "prompt_loss", "prompt_entropy"):
        (low, high), exact = getattr(found, name).interval, getattr(whole, name)
        assert low <= exact.value <= high, name
        assert 0 < high - low < 0.5, name
        assert exact.error == 0


# ---- NF4 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_requantized_base_has_the_weights_that_loading_gives(architecture: str, precision: Precision) -> None:
    folder = str(tiny.folder(architecture))
    base = load_base(folder, precision="float32", compute_dtype="float32", device="cpu")
    before = {name: module.original(torch.float32) for name, module in base.stored().items()}
    requantize(base, precision)
    loaded = load_base(folder, precision=precision, compute_dtype="float32", device="cpu").stored()
    changed = 0
    for name, module in base.stored().items():
        ours = module.original(torch.float32)
        if torch.equal(ours, before[name]):  # head and routers, which the loaded one has in bfloat16
            assert loaded[name].precision == "bfloat16", name
        else:
            assert torch.equal(ours, loaded[name].original(torch.float32)), name
            changed += 1
    assert changed == sum(module.precision == precision for module in loaded.values()) > 7
    assert base.precision == precision


def test_the_damage_of_nf4_is_the_rise_of_the_loss_on_the_target_tokens() -> None:
    base, rows = demo_rows(12)
    found = measure_domain_shift(base, rows, in_nf4=True)
    other = load_base("demo", precision="nf4", compute_dtype="float32", device="cpu")
    rise = measure_domain_shift(other, rows).answer_loss.value - found.answer_loss.value
    assert found.nf4_damage is not None
    assert found.nf4_damage.value == pytest.approx(rise, abs=2e-3)  # embedding and head of the other are in bfloat16
    assert abs(rise) > 0.005


# ---- in a plan -------------------------------------------------------------------------------------------------------


def planned(data: str) -> ModelPlan:
    return plan(PlanConfig(models=("demo",), data=(data,), gpu="rtx-4090", max_length=0)).plans[0]


class Heard:
    """Remembers every task and how far it came."""

    def __init__(self) -> None:
        self.tasks: list[progress.Task] = []

    def begin(self, task: progress.Task) -> None:
        self.tasks.append(task)

    def moved(self, task: progress.Task) -> None: ...

    def end(self, task: progress.Task) -> None: ...


def test_a_plan_loads_the_base_once_and_says_how_far_it_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def counted(name: str, **options: object) -> Base:
        loaded.append(name)
        return load_base(name, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr("graftlm.base.loading.load_base", counted)
    heard = Heard()
    with progress.shown(heard):
        domain_shift = planned("demo").facts.domain_shift
    assert len(loaded) == 1
    assert domain_shift is not None
    assert domain_shift.tokens <= SAMPLE_TOKENS
    assert domain_shift.of_rows == 1200
    assert domain_shift.nf4_damage is not None
    (task,) = [task for task in heard.tasks if task.what == "measuring the domain shift"]
    assert task.total is not None
    assert task.total >= domain_shift.tokens
    assert 0.9 * task.total < task.done <= task.total


def test_a_large_base_reads_fewer_tokens_and_a_very_large_one_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from graftlm.planning.models import find

    config = PlanConfig(models=("demo",), data=("demo",))
    small, large = find("demo"), find("llama-2-70b")
    notes: list[str] = []
    assert plan_command.sample_tokens(small, config, notes) == SAMPLE_TOKENS
    assert plan_command.sample_tokens(large, config, notes) == 0
    assert "--ask-base yes" in notes[0]
    asked = PlanConfig(models=("demo",), data=("demo",), ask_base="yes")
    assert plan_command.sample_tokens(large, asked, []) == 1024


def test_a_new_voice_over_known_prompts_is_near_and_another_domain_is_far() -> None:
    near = planned("demo").facts.domain_shift
    assert near is not None
    assert near.kind == "near"
    assert near.answer_loss.value > 5  # there is much to learn all the same
    if not E2E.is_file():
        pytest.skip(f"the E2E data are not at {E2E}")
    far = planned(str(E2E)).facts.domain_shift
    assert far is not None
    assert far.kind == "far"
    assert far.excess_loss.interval[0] > near.excess_loss.interval[1]
