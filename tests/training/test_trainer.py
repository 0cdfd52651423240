"""The training loop: one optimizer step's numbers, and that they do not depend on how the step was computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from graftlm import kernels
from graftlm.adapters.attach import Adapter
from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base, load_base
from graftlm.base.saving import dense_state_dict
from graftlm.config import ComputeDtype, Precision
from graftlm.data.sampler import make_sampler
from graftlm.errors import TrainingError
from graftlm.training.trainer import StepResult, optimizer_step, train
from graftlm.training.trial import Evaluation, ExampleLoss, Trial

ROWS = tiny.examples((9, 4, 12, 9, 7, 15))
EVAL_ROWS = tiny.examples((6, 11, 8), seed=5)

# Splitting changes the order of sums, so gradients differ in their last bits (1e-6 of the largest). AdamW divides each
# by its own size: where one is nearly zero, those bits would decide its update. This epsilon lies above such noise.
EPSILON = 0.1


def loaded(
    precision: Precision = "float32", architecture: str = "llama", compute_dtype: ComputeDtype = "float32"
) -> Base:
    place = tiny.wide() if compute_dtype == "bf16-mixed" else tiny.folder(architecture)
    return load_base(str(place), precision=precision, compute_dtype=compute_dtype, device="cpu")


@pytest.fixture(params=["float32", "bf16-mixed"])
def compute_dtype(request: pytest.FixtureRequest) -> ComputeDtype:
    """The types of products that keep the residual stream in float32."""
    if request.param == "bf16-mixed" and not kernels.has_bf16_matmul():
        pytest.skip("this processor has no bfloat16 instructions")
    return request.param


def started(base: Base, method: str, *, dropout: float = 0.0, slot: int = 1, **changes: Any) -> Trial:
    """A trial of 3 steps, each on all rows."""
    adapter: Adapter | None = None
    if method == "lora":
        adapter = tiny.adapted(base, dropout=dropout, slot=slot, seed=slot)
    trial = tiny.trial(base, adapter, ROWS, slot=slot, **changes)
    trial.optimizer.epsilon = EPSILON
    return trial


def weights(trial: Trial) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trial.parameters.items()}


def trained(method: str, micro_batch_tokens: int, **changes: Any) -> dict[str, Tensor]:
    base = loaded(changes.pop("precision", "float32"), compute_dtype=changes.pop("compute_dtype", "float32"))
    if not changes.pop("bf16_mixed", True):
        for module in base.stored().values():
            module.bf16_mixed = False
    if changes.pop("checkpointing", False):
        assert base.structure.checkpoint_layers(True) == 2
    trial = started(base, method, **changes)
    before = weights(trial)
    train(base, [trial], micro_batch_tokens, tiny.Heard())
    after = weights(trial)
    assert any(not torch.equal(before[name], after[name]) for name in after)
    return after


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference relative to the largest weight of its tensor."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).abs().max() / a[name].abs().max()).item() for name in a)


METHODS = [("full", 0.0), ("lora", 0.0), ("lora", 0.4)]


@pytest.mark.parametrize(("method", "dropout"), METHODS)
@pytest.mark.parametrize("micro_batch_tokens", [1, 20])
def test_splitting_the_same_rows_otherwise_gives_the_same_weights(
    method: str, dropout: float, micro_batch_tokens: int, compute_dtype: ComputeDtype
) -> None:
    # In bfloat16 a last bit may round to another value in the steps after.
    how: dict[str, Any] = {
        "dropout": dropout,
        "compute_dtype": compute_dtype,
        "steps": 3 if compute_dtype == "float32" else 1,
    }
    assert far(trained(method, 10_000, **how), trained(method, micro_batch_tokens, **how)) < 1e-6


@pytest.mark.parametrize(("method", "dropout"), METHODS)
def test_splitting_with_products_in_bfloat16_changes_later_steps_by_their_rounding_alone(
    method: str, dropout: float
) -> None:
    if not kernels.has_bf16_matmul():
        pytest.skip("this processor has no bfloat16 instructions")
    how: dict[str, Any] = {"dropout": dropout, "compute_dtype": "bf16-mixed"}
    assert far(trained(method, 10_000, **how), trained(method, 1, **how)) < 2e-3


@pytest.mark.parametrize(("method", "dropout"), METHODS)
def test_the_same_training_twice_gives_the_same_bits(method: str, dropout: float, compute_dtype: ComputeDtype) -> None:
    once, again = (trained(method, 25, dropout=dropout, compute_dtype=compute_dtype) for _ in range(2))
    assert far(once, again) == 0


@pytest.mark.parametrize(("method", "dropout"), METHODS)
def test_activation_checkpointing_changes_no_bit(method: str, dropout: float, compute_dtype: ComputeDtype) -> None:
    plain = trained(method, 25, dropout=dropout, compute_dtype=compute_dtype)
    assert far(plain, trained(method, 25, dropout=dropout, compute_dtype=compute_dtype, checkpointing=True)) == 0


def test_products_in_bfloat16_train_as_those_in_float32_do() -> None:
    if not kernels.has_bf16_matmul():
        pytest.skip("this processor has no bfloat16 instructions")
    for method in ("full", "lora"):
        rounded, exact = (trained(method, 25, compute_dtype="bf16-mixed", bf16_mixed=on) for on in (True, False))
        changed = {name for name in exact if not torch.equal(exact[name], rounded[name])}
        assert changed == set(exact)  # every layer's products are rounded, there and back
        assert far(exact, rounded) < 1e-2


def test_dropout_changes_what_is_learnt() -> None:
    assert far(trained("lora", 10_000, dropout=0.4), trained("lora", 10_000)) > 1e-3


def test_the_models_own_attention_on_stacks_trains_as_packing_does() -> None:
    base = loaded()
    trial = started(base, "lora", dropout=0.4)
    with tiny.original_attention(base):
        train(base, [trial], 30, tiny.Heard())
    assert far(trained("lora", 30, dropout=0.4), weights(trial)) < 1e-6


def test_the_loss_is_the_sum_over_trained_tokens_over_their_number() -> None:
    base = loaded()
    trial = started(base, "full")
    result = optimizer_step(base, [trial], 20)[0]
    expected = tiny.mean_loss(tiny.plain(base.folder), ROWS)
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    assert result.tokens == sum(len(row.ids) for row in ROWS)
    assert result.target_tokens == sum(int(row.loss_mask[1:].sum()) for row in ROWS)


def test_the_gradient_is_that_of_the_plain_mean() -> None:
    base = loaded()
    trial = started(base, "full")
    model = tiny.plain(base.folder)
    tiny.mean_loss(model, ROWS).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    assert optimizer_step(base, [trial], 20)[0].grad_norm == pytest.approx(norm, rel=1e-5)


def test_untrained_tokens_get_no_logits() -> None:
    base = loaded()
    trial = started(base, "lora")
    counted: list[int] = []
    base.structure.head.register_forward_hook(lambda module, args, logits: counted.append(len(logits)))
    optimizer_step(base, [trial], 20)
    assert sum(counted) == sum(int(row.loss_mask[1:].sum()) for row in ROWS) < sum(len(row.ids) - 1 for row in ROWS)


def test_two_trials_in_one_loop_learn_what_each_learns_alone(compute_dtype: ComputeDtype) -> None:
    def trials(base: Base, slots: Sequence[int]) -> list[Trial]:
        made: list[Trial] = []
        for slot in slots:
            trial = started(base, "lora", dropout=0.3, slot=slot, steps=4 - slot, rate=4e-3 * slot, clip=0.2 * slot)
            trial.seed = 20 + slot
            trial.sampler = make_sampler(
                [len(ROWS)], [1.0], seed=slot, batch_size=2 + slot, epochs=None, steps=4 - slot
            )
            made.append(trial)
        return made

    base = loaded(compute_dtype=compute_dtype)
    together = trials(base, (1, 2))
    train(base, together, 30, tiny.Heard())
    assert [trial.step for trial in together] == [3, 2]
    for slot, beside in zip((1, 2), together):
        base = loaded(compute_dtype=compute_dtype)
        alone = trials(base, (slot,))
        train(base, alone, 30, tiny.Heard())
        assert far(weights(alone[0]), weights(beside)) < (1e-6 if compute_dtype == "float32" else 2e-3)


class Recording(tiny.Heard):
    """Remembers at which steps an evaluation came, and the steps between."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []
        self.stop_after = 10**9

    def on_step_end(self, trial: Trial, result: StepResult) -> None:
        self.events.append(("step", result.step))

    def on_evaluate(self, trial: Trial, evaluation: Evaluation, best: bool) -> None:
        self.events.append(("eval", evaluation.step))

    def on_iteration_end(self, trials: Sequence[Trial]) -> bool:
        return trials[0].step < self.stop_after


def test_evaluation_comes_before_the_first_step_every_n_steps_and_at_the_end() -> None:
    base = loaded()
    trial = started(base, "lora", steps=5)
    trial.eval_examples, trial.eval_every = EVAL_ROWS, 2
    callback = Recording()
    train(base, [trial], 100, callback)
    assert [step for kind, step in callback.events if kind == "eval"] == [0, 2, 4, 5]
    assert callback.events[0] == ("eval", 0)
    assert callback.events[-2:] == [("step", 5), ("eval", 5)]
    assert [step for step, _ in trial.evaluations] == [0, 2, 4, 5]


def test_without_eval_rows_nothing_is_evaluated() -> None:
    base = loaded()
    trial = started(base, "lora", steps=2)
    callback = Recording()
    train(base, [trial], 100, callback)
    assert trial.first is None
    assert all(kind == "step" for kind, _ in callback.events)


def test_the_callback_ends_the_run_after_a_step() -> None:
    base = loaded()
    trial = started(base, "lora", steps=5)
    callback = Recording()
    callback.stop_after = 2
    train(base, [trial], 100, callback)
    assert trial.step == 2


def evaluation(step: int, loss: float) -> Evaluation:
    return Evaluation(step, (ExampleLoss("a:1", 2, 2 * loss), ExampleLoss("a:2", 3, 3 * loss)))


def test_the_best_evaluation_is_one_of_trained_weights() -> None:
    trial = started(loaded(), "lora")
    assert [trial.record(evaluation(step, loss)) for step, loss in ((0, 1.0), (2, 3.0), (4, 2.0), (6, 2.5))] == [
        False, True, True, False,
    ]  # fmt: skip
    assert trial.first is not None
    assert trial.best is not None
    assert trial.last is not None
    assert (trial.first.step, trial.best.step, trial.last.step) == (0, 4, 6)
    assert trial.best.loss == pytest.approx(2.0)


def test_a_loss_that_is_not_finite_names_its_rows_and_leaves_the_weights() -> None:
    base = loaded()
    trial = started(base, "lora")
    before = weights(trial)
    hidden = base.structure.hidden

    def broken(ids: Tensor, context: ForwardContext) -> Tensor:
        states = hidden(ids, context).clone()
        segments = context.segments
        if 12 not in segments.lengths:
            return states
        at = segments.starts[segments.lengths.index(12)]
        states[at : at + 12] = float("nan")
        return states

    base.structure.hidden = broken  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TrainingError, match=r"loss nan at step 1 on rows tiny:3; first .*\. Lower --learning-rate"):
        train(base, [trial], 1000, tiny.Heard())
    assert far(before, weights(trial)) == 0


def test_an_evaluation_that_is_not_finite_names_its_rows() -> None:
    base = loaded()
    trial = started(base, "lora")
    trial.eval_examples = EVAL_ROWS
    with torch.no_grad():
        next(iter(trial.parameters.values())).fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"not finite after step 0 on eval rows tiny:1"):
        train(base, [trial], 1000, tiny.Heard())


def test_clipping_is_by_the_norm_of_all_gradients() -> None:
    def moved(clip: float) -> Tensor:
        base = loaded()
        trial = started(base, "lora", clip=clip)
        trial.optimizer.beta1 = trial.optimizer.beta2 = 0.0
        trial.optimizer.epsilon = 1e6  # so large that the update is in proportion to the gradient
        before = weights(trial)
        train(base, [replace_steps(trial)], 1000, tiny.Heard())
        return torch.cat([(p.detach().double() - before[n].double()).flatten() for n, p in trial.parameters.items()])

    def replace_steps(trial: Trial) -> Trial:
        trial.sampler = replace(trial.sampler, steps=1)
        trial.schedule = replace(trial.schedule, peak=1e6)
        return trial

    norm = moved(0.0).norm()
    assert norm > 0.5
    assert moved(0.25).norm().item() == pytest.approx(0.25, rel=1e-3)
    assert moved(100.0).norm().item() == pytest.approx(norm.item(), rel=1e-6)


def test_full_training_in_bfloat16_keeps_bfloat16_weights_and_moves_them_by_tiny_updates() -> None:
    base = loaded("bfloat16")
    trial = started(base, "full", rate=1e-5, steps=3)
    before = weights(trial)
    train(base, [trial], 1000, tiny.Heard())
    after = weights(trial)
    assert all(p.dtype == torch.bfloat16 for name, p in after.items() if p.ndim > 1)
    matrices = [name for name, p in after.items() if p.ndim > 1]
    moved = sum(int((before[name] != after[name]).sum()) for name in matrices)
    total = sum(after[name].numel() for name in matrices)
    assert 0.001 < moved / total < 0.3  # few cross to a neighbour; plain rounding would move none of normal size
    drift = torch.cat([(after[n].float() - before[n].float()).flatten() for n in matrices]).abs().mean()
    assert drift < 1e-4


def test_training_touches_nothing_but_its_parameters() -> None:
    base = loaded("nf4")
    before = {name: value.clone() for name, value in dense_state_dict(base.model, torch.float32).items()}
    train(base, [started(base, "lora")], 30, tiny.Heard())
    after = dense_state_dict(base.model, torch.float32)
    assert all(torch.equal(before[name], after[name]) for name in before)
