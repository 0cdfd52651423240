"""Before the first step: the plan of the run at hand, its heaviest pass, and a rehearsal that leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MethodType

import pytest
import tiny
import tiny_run
import torch
from transformers.models.llama import modeling_llama

from graftlm.base.load import Base, load_base
from graftlm.config import TrainConfig
from graftlm.errors import ModelError, TrainingError
from graftlm.planning.hardware import Card
from graftlm.training import foresight
from graftlm.training.foresight import Foresight, foresee, rehearse
from graftlm.training.trial import Trial

LENGTHS = (20, 5, 31, 9, 27, 12)


def run(tmp_path: Path, **changes: object) -> tuple[TrainConfig, Base, Trial, Foresight]:
    """A tiny LoRA run, looked at before it begins."""
    tmp_path.mkdir(exist_ok=True)
    config = TrainConfig.build(tiny_run.options(tmp_path, **changes))
    base = load_base(str(tiny.folder("llama")), precision="float32", compute="float32", device="cpu")
    adapter = tiny.adapted(base)
    trial = tiny.trial(base, adapter, tiny.documents(LENGTHS))
    return config, base, trial, foresee(config, base, [trial], [adapter])


def test_the_heaviest_pass_is_the_fullest_of_a_batch_of_the_longest_documents(tmp_path: Path) -> None:
    _, _, _, found = run(tmp_path, tokens_per_pass=60)
    assert found.load.longest == max(w.document.tokens for w in found.work)
    assert found.load.documents == len(found.work)
    assert found.load.tokens == sum(w.document.tokens for w in found.work) <= 60
    assert found.load.passes > 1


def test_a_rehearsal_leaves_weights_gradients_and_steps_as_they_were(tmp_path: Path) -> None:
    _, base, trial, found = run(tmp_path)
    before = {name: p.detach().clone() for name, p in trial.parameters.items()}
    assert rehearse(base, [trial], found) > 0
    assert all(torch.equal(before[name], p) for name, p in trial.parameters.items())
    assert all(p.grad is None for p in trial.parameters.values())
    assert (trial.step, trial.optimizer.steps, trial.optimizer.moments) == (0, 0, {})


def test_what_is_foreseen_is_written_down_with_parts_that_sum(tmp_path: Path) -> None:
    _, _, _, found = run(tmp_path)
    said = found.to_json()
    parts = dict(said["predicted"]["parts"])
    assert parts.pop("total") == sum(parts.values()) == said["predicted"]["peak_bytes"]
    assert said["heaviest_pass"]["longest_document"] == 31
    assert 0 < said["predicted"]["rehearsal_bytes"] <= said["predicted"]["peak_bytes"]


def small(gigabytes: float) -> Card:
    return Card(key="cpu", name="a small machine", kind="cpu", memory=int(gigabytes * 1e9), here=True)


def test_passes_are_as_large_as_fits_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "local", lambda device: small(64))
    assert run(tmp_path / "large", tokens_per_pass=None)[3].tokens_per_pass == foresight.DEFAULT_TOKENS_PER_PASS
    monkeypatch.setattr(foresight, "local", lambda device: small(0.86))
    found = run(tmp_path / "small", tokens_per_pass=None)[3]
    assert found.tokens_per_pass == foresight.FEWEST_TOKENS_PER_PASS


def test_a_run_far_beyond_the_machine_is_refused_before_anything_is_tried(tmp_path: Path) -> None:
    _, base, trial, found = run(tmp_path)
    assert found.need is not None
    beyond = replace(found, card=small(0.855))
    assert found.need.training > foresight.TOO_MUCH * beyond.card.usable
    with pytest.raises(
        TrainingError, match=r"this run would take .*a small machine has 5\.0 MB for it; nothing was started"
    ):
        rehearse(base, [trial], beyond)


def test_memory_that_runs_out_in_the_rehearsal_is_said_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, trial, found = run(tmp_path)

    def no_memory(*given: object, **options: object) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        )

    monkeypatch.setattr(foresight, "forward", no_memory)
    with pytest.raises(
        TrainingError, match=f"memory runs out in a pass of {found.load.tokens} tokens, before the first step"
    ):
        rehearse(base, [trial], found)


def test_another_error_in_the_rehearsal_is_not_taken_for_a_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, trial, found = run(tmp_path)

    def broken(*given: object, **options: object) -> None:
        raise RuntimeError("shapes do not go together")

    monkeypatch.setattr(foresight, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not go together"):
        rehearse(base, [trial], found)


def test_a_fault_of_the_models_own_code_is_said_with_its_class_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, trial, found = run(tmp_path)
    own = modeling_llama.LlamaMLP.forward
    code = "def forward(self, x):\n    assert self.training, 'train in training mode'\n    return own(self, x)"
    scope = {"own": own, "__name__": modeling_llama.__name__}
    exec(code, scope)  # as if it stood in the model's own file
    for module in base.model.modules():
        if isinstance(module, modeling_llama.LlamaMLP):
            monkeypatch.setattr(module, "forward", MethodType(scope["forward"], module))  # pyright: ignore
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM cannot be trained .*AssertionError: train in training mode"
    ):
        rehearse(base, [trial], found)


def test_a_loss_that_no_trained_tensor_has_a_part_in_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, trial, found = run(tmp_path)
    own = foresight.forward
    monkeypatch.setattr(foresight, "forward", lambda *given, **options: (own(*given, **options)[0].detach(), None))
    with pytest.raises(TrainingError, match="no trained tensor has a part in the loss"):
        rehearse(base, [trial], found)
