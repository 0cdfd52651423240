"""After three steps what should have changed has, what should not has not, and what was never reached is named."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn

from graftlm import progress
from graftlm.base.loading import Base, load_base
from graftlm.errors import Diverged, TrainingError
from graftlm.training.optimizer import AdamW
from graftlm.training.sanity_checks import (
    UpdateCheck,
    check_gradients_reach_every_tensor,
    checksums,
    expert_group,
    find_nonfinite,
)
from graftlm.training.trainer import train

ROWS = tiny.examples()


def loaded(architecture: str = "llama", precision: Any = "float32") -> Base:
    return load_base(str(tiny.folder(architecture)), precision=precision, compute_dtype="float32", device="cpu")


def started(base: Base, **options: Any) -> Any:
    return tiny.trial(base, tiny.adapted(base), ROWS, **{"steps": 4, **options})


# ---- checksums ------------------------------------------------------------------------------------------------------


def checksum(tensor: torch.Tensor) -> int:
    return checksums([tensor])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("length", [211, 212])
def test_any_changed_bit_and_any_two_swapped_values_change_the_checksum(dtype: torch.dtype, length: int) -> None:
    tensor = torch.arange(1, length + 1).to(dtype).reshape(length, 1)[:, 0]
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    assert checksum(torch.cat([tensor[:1], tensor])[1:]) == before, "wherever it begins"
    for at in (0, 7, length - 1):
        changed = tensor.clone()
        changed[at] = changed[at] + 1 if dtype != torch.bfloat16 else changed[at] * 2
        assert checksum(changed) != before
    swapped = tensor.clone()
    swapped[[3, 90]] = tensor[[90, 3]]
    assert checksum(swapped) != before


@pytest.mark.parametrize("bit", range(-16, 15))
def test_the_same_bit_changed_in_two_values_changes_the_checksum(bit: int) -> None:
    """Of two changes the places must decide, the highest bits' among them; what a plain sum would miss cancels there too."""
    tensor = torch.ones(100_000, dtype=torch.bfloat16)  # several blocks
    changed = tensor.clone()
    change = 1 << bit % 16 if bit % 16 < 15 else -(1 << 15)
    changed.view(torch.int16)[5] ^= change
    changed.view(torch.int16)[17 if bit >= 0 else 70_001] ^= change
    assert checksum(changed) != checksum(tensor)


def test_two_small_changes_do_not_cancel() -> None:
    """What a plain sum would miss: one element a step up, another a step down."""
    tensor = torch.ones(1000, dtype=torch.bfloat16)
    changed = tensor.clone()
    changed.view(torch.int16)[5] += 1
    changed.view(torch.int16)[17] -= 1
    assert checksum(changed) != checksum(tensor)


def test_checksums_come_in_the_tensors_order_and_of_none_there_are_none() -> None:
    tensors = [torch.arange(3), torch.ones(70_001), torch.zeros(0), torch.ones(5, dtype=torch.bool)]
    assert checksums(tensors) == [checksum(tensor) for tensor in tensors]
    assert checksums([]) == []


# ---- what must change -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "nf4"])
def test_sound_training_passes_without_a_word_about_tensors(architecture: str, precision: str) -> None:
    trial = started(base := loaded(architecture, precision))
    train(base, [trial], 1000, tiny.Heard())
    assert trial.step == 4
    assert not [note for note in trial.warnings if "stays as it is" in note]


def test_full_training_in_16_bits_at_a_tiny_rate_is_not_called_broken() -> None:
    """Rounded at random, a small tensor may well stand still for three steps; that is no fault."""
    base = loaded(precision="bfloat16")
    train(base, [tiny.trial(base, None, ROWS, steps=4, rate=1e-7)], 1000, tiny.Heard())


def test_an_optimizer_that_leaves_a_tensor_out_is_stopped_at_the_third_step(monkeypatch: pytest.MonkeyPatch) -> None:
    base = loaded()
    trial = started(base)
    step_of = AdamW._step_of  # pyright: ignore[reportPrivateUsage]

    def forgetful(self: AdamW, name: str, *given: Any) -> Any:
        parameter, *others = step_of(self, name, *given)
        return (parameter.detach().clone() if "layers.1.mlp.up_proj" in name else parameter, *others)

    monkeypatch.setattr(AdamW, "_step_of", forgetful)
    with pytest.raises(
        TrainingError, match=r"layers\.1\.mlp\.up_proj\.lora_A\.weight' and 1 more got gradients and has not"
    ):
        train(base, [trial], 1000, tiny.Heard())
    assert trial.step == 3


def test_a_frozen_tensor_that_changes_is_stopped_at_the_third_step() -> None:
    for precision, what in (("float32", r"mlp\.up_proj"), ("nf4", r"mlp\.up_proj.* \(absmax")):
        base = loaded(precision=precision)
        trial = started(base)
        module: Any = base.stored()[next(n for n in base.stored() if "1.mlp.up_proj" in n)]

        class Writing(tiny.Heard):
            def on_step_end(self, trial: Any, result: Any, module: Any = module) -> None:
                with torch.no_grad():
                    if module.compressed is None:
                        module.dense[3, 4] += 1e-3
                    else:
                        module.compressed.absmax_scale[0] *= 1.01

        with pytest.raises(
            TrainingError, match=rf"the frozen tensor 'model\.layers\.1\.{what}.* has changed in 3 steps"
        ):
            train(base, [trial], 1000, Writing())


def test_a_tensor_that_never_gets_a_gradient_is_named_and_training_goes_on() -> None:
    base = loaded()
    parameters = {"a": nn.Parameter(torch.ones(5)), "b": nn.Parameter(torch.ones(5))}
    check = UpdateCheck(base, parameters, 1e-8)
    for _ in range(3):
        check.observe_gradient("a", torch.ones(5), 0.1)
        check.observe_gradient("b", torch.zeros(5), 0.1)
        with torch.no_grad():
            parameters["a"] -= 0.1
        notes = check.after_step("x")
    assert notes == ["'b' got no gradient in the first 3 steps and stays as it is"]
    assert check.after_step("x") == []


def test_experts_that_no_token_reached_are_counted_apart() -> None:
    base = loaded("mixtral")
    trial = tiny.trial(base, tiny.adapted(base), tiny.examples((2,)), steps=3)
    train(base, [trial], 1000, tiny.Heard())
    (note,) = [note for note in trial.warnings if "experts" in note]
    assert "experts got no token in the first 3 steps, the first is expert" in note
    assert not [note for note in trial.warnings if "stays as it is" in note]
    counted = int(note.split()[0])
    assert 0 < counted < 12


def test_experts_that_are_modules_of_their_own_are_counted_apart_too() -> None:
    base = loaded()
    names = [f"layers.0.experts.{i}.up.weight" for i in range(3)]
    parameters = {name: nn.Parameter(torch.ones(4)) for name in names}
    check = UpdateCheck(base, parameters, 1e-8)
    for _ in range(3):
        for name in names[:2]:
            check.observe_gradient(name, torch.ones(4), 0.1)
            with torch.no_grad():
                parameters[name] -= 0.1
        notes = check.after_step("x")
    assert notes == [f"1 tensors of experts got no token in the first 3 steps: '{names[2]}'"]


def test_of_experts_that_are_modules_one_with_a_gradient_speaks_for_those_beside_it() -> None:
    names = ["layers.0.mlp.experts.0.up.weight", "layers.0.mlp.experts.1.up.weight", "layers.0.norm.weight"]
    base = loaded()
    trial = tiny.trial(base, tiny.adapted(base), ROWS)
    trial.parameters = {name: nn.Parameter(torch.ones(2)) for name in names}
    trial.optimizer.squares = {name: torch.ones(()) for name in (names[1], names[2])}
    check_gradients_reach_every_tensor(trial)
    del trial.optimizer.squares[names[1]]  # now none of them got a token, or the code does not use them
    with pytest.raises(TrainingError, match=r"experts\.0\.up\.weight' and 1 more"):
        check_gradients_reach_every_tensor(trial)


def test_layers_do_not_speak_for_each_other() -> None:
    assert expert_group("model.layers.1.mixer.dt_proj.weight") is None
    assert expert_group("layers.1.experts.2.up.weight") == expert_group("layers.1.experts.0.up.weight")
    assert expert_group("layers.1.experts.2.up.weight") != expert_group("layers.0.experts.2.up.weight")


# ---- what is not finite ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_the_first_module_and_its_broken_weight() -> None:
    base = loaded()
    trial = started(base)
    module: Any = base.model.get_submodule("model.layers.1.post_attention_layernorm")
    with torch.no_grad():
        module.weight[3] = float("nan")
    with pytest.raises(
        Diverged, match=r"first the output of '.*layers\.1\.post_attention_layernorm', whose own weight is"
    ):
        train(base, [trial], 1000, tiny.Heard())


def test_the_rows_that_are_not_finite_are_told_from_those_beside_them_in_the_micro_batch() -> None:
    base = loaded()
    trial = started(base)
    embedding: Any = base.structure.embedding
    rare = next(int(i) for i in ROWS[1].ids if all(i not in row.ids for k, row in enumerate(ROWS) if k != 1))
    with torch.no_grad():
        embedding.weight[rare] = float("inf")
    with pytest.raises(Diverged, match=r"on rows tiny:2; first the output of 'model\.embed_tokens'"):
        train(base, [trial], 1000, tiny.Heard())


def test_a_gradient_that_is_not_finite_under_a_finite_loss_names_where_it_began() -> None:
    base = loaded()
    trial = started(base)
    before = {n: p.detach().clone() for n, p in trial.parameters.items()}

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0] * float("inf")

    handle = base.model.get_submodule("model.layers.1").register_forward_pre_hook(
        lambda module, args: (Spoiled.apply(args[0]), *args[1:])
    )
    with pytest.raises(
        Diverged, match=r"gradient norm (nan|inf) at step 1 .*; first the output's gradient of 'model\.layers\.0"
    ):
        train(base, [trial], 1000, tiny.Heard())
    handle.remove()
    assert all(torch.equal(p, before[n]) for n, p in trial.parameters.items()), "the step was not taken"


def test_eval_rows_that_are_not_finite_name_the_module_too() -> None:
    base = loaded()
    trial = started(base)
    trial.eval_examples = tiny.examples((5, 8), seed=4)
    with torch.no_grad():
        trial.parameters["model.layers.0.mlp.up_proj.lora_A.weight"][0, 0] = float("inf")
    with pytest.raises(
        Diverged, match=r"after step 0 on eval rows .*; first the output of 'model\.layers\.0\.mlp\.up_proj'"
    ):
        train(base, [trial], 1000, tiny.Heard())


def test_every_example_that_is_run_alone_is_a_sign_of_life() -> None:
    signs, seen = [0], []
    model = nn.Linear(2, 1)

    def run(i: int) -> None:
        seen.append(sum(signs))
        model(torch.full((1, 2), float("nan") if i == 1 else 1.0))

    with progress.heard(lambda quiet_for: signs.append(1)):
        _, bad = find_nonfinite(model, ["a", "b", "c"], [], run)
    assert (seen, sum(signs), bad) == ([0, 1, 2], 3, ["b"])
