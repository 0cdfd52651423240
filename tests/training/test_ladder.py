"""The rungs of full training's memory ladder: each alone and together the same training, and contradictions refused."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from safetensors.torch import load_file
from torch import Tensor

from graftlm import kernels
from graftlm.base.loading import Base, load_base
from graftlm.errors import ConfigError, Diverged, RunError, Stopped
from graftlm.kernels import reference_adamw
from graftlm.training import optimizer as optimizer_module
from graftlm.training.logging import Recorder
from graftlm.training.optimizer import AdamW
from graftlm.training.trainer import optimizer_step, train
from graftlm.training.trial import Trial

ONE_PASS = {"micro_batch_tokens": 1 << 20, "max_grad_norm": 0.0}


def stopped(monkeypatch: pytest.MonkeyPatch, place: Path, **options: Any) -> None:
    """A run that ends after its third step, as if a signal had come."""
    on_iteration_end = Recorder.on_iteration_end

    def stopping(self: Recorder, trials: Any) -> bool:
        self.stopped = signal.SIGTERM if self.trial.step == 3 else None
        return on_iteration_end(self, trials)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_iteration_end", stopping)
        with pytest.raises(Stopped):
            tiny_run.train(place, method="full", **options)


def ran(place: Path, **changes: Any) -> tuple[bytes, list[dict[str, Any]], dict[str, Any]]:
    """A run's trained tensors, its metrics without times, and its summary."""
    place.mkdir()
    summary = tiny_run.train(place, **{"method": "full", **changes})
    (saved,) = (place / "run").glob("[am]*/*.safetensors")
    return saved.read_bytes(), tiny_run.without(tiny_run.lines(place / "run" / "metrics.jsonl"), "seconds"), summary


@pytest.mark.parametrize(
    "rungs",
    [
        {},
        {"base_precision": "bfloat16"},
        {"optimizer": "adamw-8bit"},
        {"base_precision": "bfloat16", "optimizer": "adamw-8bit", "activation_checkpointing": True},
        {"method": "lora", "lora_dropout": 0.1, "loraplus_lr_ratio": 3.0},
    ],
    ids=["float32", "bfloat16", "8 bits", "all", "lora"],
)
def test_steps_inside_the_backward_pass_are_the_steps_after_it_bit_for_bit(
    rungs: dict[str, Any], tmp_path: Path
) -> None:
    after = ran(tmp_path / "after", **ONE_PASS, **rungs)
    inside = ran(tmp_path / "inside", **ONE_PASS, **rungs, optimizer_in_backward=True)
    assert inside[0] == after[0]
    assert inside[1] == after[1]  # losses and gradient norms
    assert all(line["grad_norm"] > 0 for line in inside[1] if line["kind"] == "train")


ROWS = tiny.examples((9, 4, 12, 9, 7))


def started(architecture: str, *, inside: bool = True, checkpointing: bool = False) -> tuple[Base, Trial]:
    """A full training of all ROWS a step."""
    base = load_base(str(tiny.folder(architecture)), precision="float32", compute_dtype="float32", device="cpu")
    if checkpointing:
        assert base.structure.checkpoint_layers(True) == 2
    trial = tiny.trial(base, None, ROWS)
    trial.optimizer.in_backward = inside
    return base, trial


def weights(trial: Trial) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trial.parameters.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gemma2", "mixtral"])
def test_tied_weights_experts_and_layers_that_run_again_step_once(architecture: str, checkpointing: bool) -> None:
    """Qwen3, GPT-2 and Gemma have one matrix for embeddings and head; its gradient comes in two parts."""
    found: list[dict[str, Tensor]] = []
    for inside in (False, True):
        base, trial = started(architecture, inside=inside, checkpointing=checkpointing)
        before = weights(trial)
        train(base, [trial], 1000, tiny.Heard())
        found.append(weights(trial))
        assert trial.optimizer.steps == 3
        assert all(p.grad is None for p in trial.parameters.values())
    assert any(not torch.equal(before[name], tensor) for name, tensor in found[1].items())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_no_more_than_a_few_gradients_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, trial = started("llama")
    counts: list[int] = []
    step_of = AdamW._step_of

    def counted(self: AdamW, *given: Any) -> Any:
        counts.append(sum(p.grad is not None for p in trial.parameters.values()))
        return step_of(self, *given)

    monkeypatch.setattr(AdamW, "_step_of", counted)
    optimizer_step(base, [trial], 1000)
    assert len(counts) == len(trial.parameters)
    assert max(counts) <= 2


def test_on_a_gpu_losses_and_gradients_are_looked_at_behind_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told that a look waits for a GPU: the same weights and norm; what is not finite is named as it is on a CPU."""
    found: list[tuple[dict[str, Tensor], float]] = []
    for later in (False, True):
        base, trial = started("llama")
        monkeypatch.setattr(optimizer_module.AdamW, "looks_later", lambda self, tensor, later=later: later)
        (result,) = optimizer_step(base, [trial], 1000)
        assert result is not None
        found.append((weights(trial), result.grad_norm))
    assert found[0][1] == found[1][1] > 0
    assert all(torch.equal(tensor, found[1][0][name]) for name, tensor in found[0][0].items())

    name = next(n for n in trial.parameters if n.endswith("layers.1.mlp.down_proj.weight"))
    handle = trial.parameters[name].register_hook(lambda g: g * float("nan"))
    with pytest.raises(Diverged, match=rf"the gradient of '{name}' is not finite at step 2 on rows tiny:"):
        optimizer_step(base, [trial], 1000)
    handle.remove()

    base, trial = started("llama")
    with torch.no_grad():
        base.model.model.norm.weight[0] = float("inf")
    before = weights(trial)
    with pytest.raises(Diverged, match=r"loss (nan|inf) at step 1 on rows tiny:"):
        optimizer_step(base, [trial], 1000)
    assert all(torch.equal(tensor, before[n]) for n, tensor in weights(trial).items())


def test_a_gradient_that_is_not_finite_stops_the_run_before_its_tensor_is_touched() -> None:
    base, trial = started("llama")
    before = weights(trial)
    name = next(n for n in trial.parameters if n.endswith("layers.1.mlp.down_proj.weight"))
    handle = trial.parameters[name].register_hook(lambda g: g * float("nan"))
    with pytest.raises(
        Diverged, match=rf"the gradient of '{name}' is not finite at step 1 on rows tiny:.*--learning-rate"
    ):
        optimizer_step(base, [trial], 1000)
    handle.remove()
    after = weights(trial)
    assert torch.equal(after[name], before[name])
    assert not any(torch.equal(after[n], before[n]) for n in after if n.startswith("lm_head"))  # it had its step
    assert all(torch.equal(after[n], before[n]) for n in after if "layers.0." in n)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not any(p._post_accumulate_grad_hooks for p in trial.parameters.values())


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    base, trial = started("llama")
    with torch.no_grad():
        next(p for n, p in trial.parameters.items() if n.endswith("norm.weight") and "layers" not in n).fill_(
            float("nan")
        )
    before = weights(trial)
    with pytest.raises(Diverged, match="loss nan at step 1"):
        optimizer_step(base, [trial], 1000)
    assert all(torch.equal(tensor.nan_to_num(9), before[n].nan_to_num(9)) for n, tensor in weights(trial).items())
    assert trial.optimizer.moments == {}


def test_two_trials_on_one_base_each_step_in_the_pass_that_they_share() -> None:
    def adapters(inside: tuple[bool, bool]) -> list[dict[str, Tensor]]:
        base = load_base(str(tiny.folder("llama")), precision="nf4", compute_dtype="float32", device="cpu")
        trials = [tiny.trial(base, tiny.adapted(base, slot=slot, seed=slot), ROWS[slot:], slot=slot) for slot in (1, 2)]
        for trial, own in zip(trials, inside):
            trial.optimizer.in_backward = own
        train(base, trials, 1000, tiny.Heard())
        return [weights(trial) for trial in trials]

    plain, mixed = adapters((False, False)), adapters((True, False))
    for one, other in zip(plain, mixed):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# ---- what does not go together ------------------------------------------------------------------------------------


def test_clipping_and_steps_inside_the_backward_pass_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--optimizer-in-backward .*--max-grad-norm 1.* give --max-grad-norm 0, or leave"
    ):
        tiny_run.train(tmp_path, method="full", optimizer_in_backward=True)


def test_a_step_of_several_micro_batches_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"step \d needs \d+: its 5 examples.*--batch-size 5 and --micro-batch-tokens 40"
    ) as e:
        tiny_run.train(tmp_path, method="full", optimizer_in_backward=True, max_grad_norm=0, micro_batch_tokens=40)
    enough = int(str(e.value).split("Give --micro-batch-tokens ")[1].split(",")[0])
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    place = tmp_path / "enough"
    place.mkdir()
    tiny_run.train(place, method="full", optimizer_in_backward=True, max_grad_norm=0, micro_batch_tokens=enough)
    less = tmp_path / "less"
    less.mkdir()
    with pytest.raises(ConfigError, match="--optimizer-in-backward"):
        tiny_run.train(less, method="full", optimizer_in_backward=True, max_grad_norm=0, micro_batch_tokens=enough - 1)


def test_a_model_that_runs_on_stacks_of_one_length_needs_one_document_a_step() -> None:
    base, trial = started("bloom")
    with pytest.raises(ConfigError, match="--batch-size 1, for this model runs on examples of one length"):
        train(base, [trial], 1000, tiny.Heard())
    single = tiny.trial(base, None, ROWS[:1])
    single.optimizer.in_backward = True
    train(base, [single], 1, tiny.Heard())
    assert single.step == 3


@pytest.mark.parametrize("device", ["cpu", None])
def test_states_are_not_moved_to_the_host_in_a_run_that_is_there(device: str | None, tmp_path: Path) -> None:
    if device is None and torch.cuda.is_available():
        pytest.skip("the run would be on the GPU")
    with pytest.raises(ConfigError, match=r"--offload-optimizer .* already are there; leave it out"):
        tiny_run.train(tmp_path, method="full", offload_optimizer=True, device=device)


# ---- states elsewhere, and in checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("eight_bit", [False, True])
def test_states_elsewhere_are_fetched_a_slab_at_a_time_and_put_back(
    eight_bit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine may have one device only, so what is fetched is a copy here, as it would be from another device."""
    fetched: list[int] = []

    def copied(tensor: Tensor, device: torch.device) -> Tensor:
        fetched.append(tensor.numel())
        return tensor.clone()

    def stepped() -> list[Tensor]:
        weight, moments = (
            torch.zeros(10_000),
            kernels.zero_moments(10_000, eight_bit=eight_bit, device=torch.device("cpu")),
        )
        for step in (1, 2, 3):
            update = kernels.update_of(step, 0.01, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.0, key=(1, step))
            reference_adamw.adamw(weight, torch.sin(torch.arange(10_000) * float(step)), moments, update)
        return [weight, *moments.tensors().values()]

    here = stepped()
    monkeypatch.setattr(reference_adamw, "SLAB", 1 << 12)
    monkeypatch.setattr(reference_adamw, "_fetch", copied)
    assert all(torch.equal(a, b) for a, b in zip(here, stepped()))
    assert max(fetched) == 4096


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("eight_bit", [False, True])
def test_states_in_the_hosts_memory_give_what_states_on_the_gpu_give(eight_bit: bool) -> None:
    found: list[Tensor] = []
    for place in (None, torch.device("cpu")):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 9000, device="cuda").bfloat16())
        mine = AdamW(
            {"w": weight},
            beta1=0.9,
            beta2=0.99,
            epsilon=1e-8,
            weight_decay=0.0,
            eight_bit=eight_bit,
            state_device=place,
        )
        for step in range(4):
            weight.grad = torch.sin(torch.arange(9000, device="cuda") * (step + 1.0)).bfloat16()
            mine.step(1e-2)
        states = mine.state()
        assert all(t.device.type == ("cuda" if place is None else "cpu") for t in states.values())
        found += [weight.detach().cpu(), *(t.cpu() for t in states.values())]
    half = len(found) // 2
    assert all(torch.equal(a, b) for a, b in zip(found[:half], found[half:]))


def test_a_stopped_run_with_states_in_8_bits_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rungs = {**ONE_PASS, "base_precision": "bfloat16", "optimizer": "adamw-8bit", "optimizer_in_backward": True}
    straight = ran(tmp_path / "straight", **rungs)
    place = tmp_path / "stopped"
    place.mkdir()
    stopped(monkeypatch, place, **rungs)
    states = load_file(place / "run" / "checkpoints" / "000003" / "optimizer.safetensors")
    kinds = {(name.split(".")[0], tensor.dtype) for name, tensor in states.items()}
    assert {("mean", torch.uint8), ("square", torch.uint8), ("mean_scale", torch.float32)} <= kinds
    tiny_run.train(place, method="full", resume=True, **rungs)
    (saved,) = (place / "run" / "model").glob("*.safetensors")
    assert saved.read_bytes() == straight[0]


def test_going_on_with_states_in_other_bits_must_be_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(monkeypatch, tmp_path)
    with pytest.raises(RunError, match="optimizer was 'adamw', now 'adamw-8bit'"):
        tiny_run.train(tmp_path, method="full", optimizer="adamw-8bit", resume=True)
    summary = tiny_run.train(tmp_path, method="full", optimizer="adamw-8bit", resume=True, allow_change=["optimizer"])
    assert summary["steps"] == 6
