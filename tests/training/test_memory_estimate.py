"""Memory: the estimate for a run, its heaviest micro-batch, and a dry run that leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MethodType

import pytest
import tiny
import tiny_run
import torch
from transformers.models.llama import modeling_llama

from graftlm.base.loading import Base, load_base
from graftlm.base.structure import ModelStructure
from graftlm.config import TrainConfig
from graftlm.distributed.group import Ranks
from graftlm.errors import ModelError, TrainingError
from graftlm.planning.hardware import Card
from graftlm.planning.rank_memory import Split, of_one_rank
from graftlm.training import memory as memory_module
from graftlm.training.memory import MemoryEstimate, dry_run, estimate, shape_of
from graftlm.training.trial import Trial

LENGTHS = (20, 5, 31, 9, 27, 12)


def run(tmp_path: Path, **changes: object) -> tuple[TrainConfig, Base, Trial, MemoryEstimate]:
    """A tiny LoRA run, looked at before it begins."""
    tmp_path.mkdir(exist_ok=True)
    config = TrainConfig.build(tiny_run.options(tmp_path, **changes))
    base = load_base(str(tiny.folder("llama")), precision="float32", compute_dtype="float32", device="cpu")
    adapter = tiny.adapted(base)
    trial = tiny.trial(base, adapter, tiny.examples(LENGTHS))
    return config, base, trial, estimate(config, base, [trial], [adapter])


def test_the_heaviest_pass_is_the_fullest_of_a_batch_of_the_longest_documents(tmp_path: Path) -> None:
    _, _, _, found = run(tmp_path, micro_batch_tokens=60)
    assert found.load.longest == max(w.example.tokens for w in found.items)
    assert found.load.examples == len(found.items)
    assert found.load.tokens == sum(w.example.tokens for w in found.items) <= 60
    assert found.load.micro_batches > 1


def test_a_rehearsal_leaves_weights_gradients_and_steps_as_they_were(tmp_path: Path) -> None:
    _, base, trial, found = run(tmp_path)
    before = {name: p.detach().clone() for name, p in trial.parameters.items()}
    assert dry_run(base, [trial], found) > 0
    assert all(torch.equal(before[name], p) for name, p in trial.parameters.items())
    assert all(p.grad is None for p in trial.parameters.values())
    assert (trial.step, trial.optimizer.steps, trial.optimizer.moments) == (0, 0, {})


def test_what_is_foreseen_is_written_down_with_parts_that_sum(tmp_path: Path) -> None:
    _, _, _, found = run(tmp_path)
    said = found.to_json()
    parts = dict(said["predicted"]["parts"])
    assert parts.pop("total") == sum(parts.values()) == said["predicted"]["peak_bytes"]
    assert said["heaviest_micro_batch"]["longest_example"] == 31
    assert 0 < said["predicted"]["dry_run_bytes"] <= said["predicted"]["peak_bytes"]


def test_a_rank_of_a_split_model_is_estimated_as_the_planner_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, base, trial, _ = run(tmp_path)
    alone = estimate(config, base, [trial])
    monkeypatch.setattr(ModelStructure, "sharing", Ranks(0, 2))
    found, shape = estimate(config, base, [trial]), shape_of(config, base)
    assert alone.requirement is not None
    assert shape is not None
    assert found.load == alone.load
    assert found.requirement == of_one_rank(alone.requirement, shape, found.load, Split(shards=2))
    assert found.requirement.parts.weights < alone.requirement.parts.weights


def small(gigabytes: float) -> Card:
    return Card(key="cpu", name="a small machine", kind="cpu", memory=int(gigabytes * 1e9), here=True)


def test_micro_batches_are_as_large_as_fits_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "local", lambda device: small(64))
    assert (
        run(tmp_path / "large", micro_batch_tokens=None)[3].micro_batch_tokens
        == memory_module.DEFAULT_MICRO_BATCH_TOKENS
    )
    monkeypatch.setattr(memory_module, "local", lambda device: small(0.86))
    found = run(tmp_path / "small", micro_batch_tokens=None)[3]
    assert found.micro_batch_tokens == memory_module.MIN_MICRO_BATCH_TOKENS


def test_a_run_far_beyond_the_machine_is_refused_before_anything_is_tried(tmp_path: Path) -> None:
    _, base, trial, found = run(tmp_path)
    assert found.requirement is not None
    beyond = replace(found, card=small(0.855))
    assert found.requirement.training > memory_module.TOO_MUCH * beyond.card.usable
    with pytest.raises(
        TrainingError, match=r"this run would take .*a small machine has 5\.0 MB for it; nothing was started"
    ):
        dry_run(base, [trial], beyond)


def test_memory_that_runs_out_in_the_rehearsal_is_said_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, trial, found = run(tmp_path)

    def no_memory(*given: object, **options: object) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        )

    monkeypatch.setattr(memory_module, "forward", no_memory)
    with pytest.raises(
        TrainingError, match=f"memory runs out in a micro-batch of {found.load.tokens} tokens, before the first step"
    ):
        dry_run(base, [trial], found)


def test_another_error_in_the_rehearsal_is_not_taken_for_a_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, trial, found = run(tmp_path)

    def broken(*given: object, **options: object) -> None:
        raise RuntimeError("shapes do not go together")

    monkeypatch.setattr(memory_module, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not go together"):
        dry_run(base, [trial], found)


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
        dry_run(base, [trial], found)


def test_a_loss_that_no_trained_tensor_has_a_part_in_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, trial, found = run(tmp_path)
    own = memory_module.forward
    monkeypatch.setattr(memory_module, "forward", lambda *given, **options: (own(*given, **options)[0].detach(), None))
    with pytest.raises(TrainingError, match="no trained tensor has a part in the loss"):
        dry_run(base, [trial], found)
