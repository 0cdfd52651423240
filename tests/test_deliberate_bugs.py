"""Bugs put in on purpose, and the test that catches each.

Every entry names a mistake that could be made in a line of code, makes it, and runs a test of the suite: the test must pass on
the code as it is and fail on the code with the bug. A list that grows where a test would not have noticed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch

from graftlm import files
from graftlm.adapters import canary, manifest, merge, peft_folder
from graftlm.adapters import merge_writer as merged
from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters import peft_tensors as fit
from graftlm.adapters.attach import adaptable
from graftlm.adapters.merge_drift import Drift
from graftlm.base.loading import Base
from graftlm.commands import merge as merging
from graftlm.config import TrainConfig
from graftlm.gguf import layout as gguf_layout
from graftlm.training import checkpoint
from graftlm.training import optimizer as optimizers
from graftlm.training.logging import Recorder

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / room) for room in ("adapters", "commands", "training")]

import test_combine  # noqa: E402
import test_files  # noqa: E402
import test_gguf  # noqa: E402
import test_merge  # noqa: E402
import test_merge_command  # noqa: E402
import test_peft_loading  # noqa: E402
import test_resume  # noqa: E402
import test_targets  # noqa: E402


class Bench:
    """What the tests that are run here want as fixtures."""

    def __init__(self, place: Path, patch: pytest.MonkeyPatch) -> None:
        place.mkdir()
        self.place, self.patch = place, patch

    @property
    def base(self) -> Base:
        return test_peft_loading.loaded(tiny_run.folder())

    @property
    def saved(self) -> Path:
        return test_peft_loading.write(self.base, self.place / "adapter")

    @property
    def three(self) -> list[Path]:
        return test_combine.three(test_merge.loaded(tiny.folder("llama")), self.place)

    @property
    def trained(self) -> Path:
        return test_merge_command.run_on_four_bits(Path(tempfile.mkdtemp(dir=self.place.parent)))

    def stop_after(self, step: int) -> None:
        on_iteration_end = getattr(Recorder.on_iteration_end, "plain", Recorder.on_iteration_end)

        def stopping(recorder: Recorder, trials: Any) -> bool:
            if recorder.trial.step == step:
                recorder.stopped = 15
            return on_iteration_end(recorder, trials)

        stopping.plain = on_iteration_end  # type: ignore[attr-defined]
        self.patch.setattr(Recorder, "on_iteration_end", stopping)


@dataclass(frozen=True)
class Bug:
    room: str
    what: str
    make: Callable[[pytest.MonkeyPatch], Any]
    caught_by: Callable[[Bench], Any]


def nothing(*args: Any, **kwargs: Any) -> None:
    return None


def set_to(owner: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], Any]:
    return lambda patch: patch.setattr(owner, name, value)


def around(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], Any]:
    return lambda patch: patch.setattr(owner, name, wrap(getattr(owner, name)))


# ---- bugs of the loader ---------------------------------------------------------------------------------------------


def loads_what_is_missing(patch: pytest.MonkeyPatch) -> None:
    for owner, name in ((peft_folder, "_same_plan"), (peft_folder, "check_files"), (fit, "_complete")):
        patch.setattr(owner, name, nothing)
    patch.setattr(peft_folder, "digest_of", lambda content: content["digest"])
    patch.setattr(canary, "check", lambda *given: 0.0)


LOADER = (
    Bug(
        "loader",
        "the base's fingerprint is not compared",
        set_to(adapter_format, "_same_base", nothing),
        lambda b: test_peft_loading.test_another_base_of_the_same_shape_is_refused_with_both_fingerprints(
            b.base, b.saved, b.place
        ),
    ),
    Bug(
        "loader",
        "missing tensors are passed over",
        loads_what_is_missing,
        lambda b: test_peft_loading.test_tensors_that_are_not_those_of_the_plan_are_refused_by_name(
            b.base, b.saved, "missing"
        ),
    ),
    Bug(
        "loader",
        "checksums are not compared",
        set_to(peft_folder, "check_files", nothing),
        lambda b: test_peft_loading.test_one_flipped_byte_anywhere_is_found_and_the_file_is_named(
            b.base, b.saved, "adapter_model.safetensors"
        ),
    ),
    Bug(
        "loader",
        "the digest leaves the manifest out",
        lambda patch: [
            patch.setattr(module, "digest_of", lambda content: manifest.digest_of({"files": content["files"]}))
            for module in (adapter_format, peft_folder)
        ],
        lambda b: test_peft_loading.test_a_manifest_that_is_damaged_is_refused_by_the_entry(
            b.base, b.saved, "changed by hand"
        ),
    ),
    Bug(
        "loader",
        "the digest depends on the folder's name",
        around(adapter_format, "inspect_folder", lambda real: lambda path: _renamed(real(path))),
        lambda b: test_peft_loading.test_a_folder_is_named_by_its_content_alone(b.base, b.saved, b.place),
    ),
    Bug(
        "loader",
        "the scale is r / alpha",
        set_to(fit, "scale_of", lambda alpha, rank, stabilized: rank / alpha),
        lambda b: test_peft_loading.test_loading_says_where_an_adapter_came_from_and_leaves_the_base_as_it_was(
            b.base, b.saved
        ),
    ),
    Bug(
        "loader",
        "alpha of PEFT's config is believed whatever was trained",
        set_to(peft_folder, "FORMULA", ()),
        lambda b: (
            test_peft_loading.test_a_config_that_means_another_mathematics_than_was_trained_is_refused_with_both_values(
                b.base, b.saved, "alpha"
            )
        ),
    ),
    Bug(
        "loader",
        "layers that the config leaves out are loaded",
        set_to(fit, "applied", lambda base, targets: (set(adaptable(base)), set(), str)),
        lambda b: test_targets.test_what_the_file_holds_and_its_config_leaves_out_is_refused_by_name(
            test_targets.loaded("llama"), b.place, "one of seven kinds"
        ),
    ),
    Bug(
        "loader",
        "a manifest's tolerance is believed",
        set_to(canary, "check_kept", nothing),
        lambda b: test_peft_loading.test_a_canary_that_cannot_be_is_refused(
            b.base, b.saved, "a tolerance of everything"
        ),
    ),
    Bug(
        "loader",
        "the template's rendering is not compared",
        set_to(canary, "check_golden", nothing),
        lambda b: test_peft_loading.test_another_template_is_refused_for_an_adapter_of_chats_and_not_for_one_of_texts(
            b.place
        ),
    ),
    Bug(
        "loader",
        "the canary always sings",
        set_to(canary, "distance", lambda found, expected: 0.0),
        lambda b: test_peft_loading.test_a_base_with_the_same_weights_and_another_config_is_found_by_the_canary(
            b.saved, b.place
        ),
    ),
    Bug(
        "loader",
        "the canary stays in its slot",
        set_to(canary, "detach", nothing),
        lambda b: test_peft_loading.test_loading_says_where_an_adapter_came_from_and_leaves_the_base_as_it_was(
            b.base, b.saved
        ),
    ),
)


def _renamed(found: Any) -> Any:
    return replace(found, digest=manifest.digest_of({"name": found.path.name, "digest": found.digest}))


# ---- bugs of checkpoints --------------------------------------------------------------------------------------------


def goes_on_the_same(b: Bench) -> None:
    test_resume.test_a_run_that_was_stopped_and_goes_on_ends_like_one_that_was_not(b.place, b.stop_after, 2, "lora")


def one_step_late(real: Callable[..., None]) -> Callable[..., None]:
    def load(folder: Path, trial: Any) -> None:
        real(folder, trial)
        trial.step += 1

    return load


def forgets_its_steps(real: Callable[..., None]) -> Callable[..., None]:
    def load(self: Any, state: Any, steps: int) -> None:
        real(self, state, 0)

    return load


def keeps_what_is_newest_by_name(run: Path, step: int, keep: int) -> None:
    for folder in checkpoint._folders(run)[:-keep]:  # pyright: ignore[reportPrivateUsage]
        checkpoint.shutil.rmtree(folder)


CHECKPOINT = (
    Bug("checkpoint", "the optimizer's state is not put back", set_to(optimizers.AdamW, "load", nothing), goes_on_the_same),
    Bug(
        "checkpoint", "AdamW's bias correction begins anew", around(optimizers.AdamW, "load", forgets_its_steps),
        goes_on_the_same,
    ),
    Bug("checkpoint", "the position in the data is one step off", around(checkpoint, "load", one_step_late), goes_on_the_same),
    Bug("checkpoint", "the trained tensors are not put back", set_to(checkpoint, "load_parameters", nothing), goes_on_the_same),
    Bug(
        "checkpoint", "a damaged checkpoint is taken", set_to(checkpoint, "find_damage", nothing),
        lambda b: test_resume.test_whatever_happened_to_whichever_file_the_checkpoint_before_is_used(b.place, b.stop_after),
    ),
    Bug(
        "checkpoint", "damaged later ones count among those that are kept",
        set_to(checkpoint, "_remove_old", keeps_what_is_newest_by_name),
        lambda b: test_resume.test_a_damaged_future_does_not_push_out_what_is_written_after_it(b.place, b.stop_after),
    ),
    Bug(
        "checkpoint", "--resume takes whatever options it gets",
        set_to(checkpoint, "_FREE", set(TrainConfig.model_fields)),
        lambda b: test_resume.test_going_on_with_another_option_is_refused_with_both_values(
            b.place, b.stop_after, {"batch_size": 4}, "batch-size was 5, now 4"
        ),
    ),
    Bug(
        "checkpoint", "nothing is flushed before the rename", set_to(files, "flush", nothing),
        lambda b: test_files.test_files_and_folders_are_flushed_before_the_folder_is_named(b.place, b.patch),
    ),
    Bug(
        "checkpoint", "what is not finite is saved",
        set_to(checkpoint, "finite", lambda tensor: True),
        lambda b: test_resume.test_a_checkpoint_that_is_not_finite_is_not_written(b.place, b.patch),
    ),
)  # fmt: skip

# ---- bugs of merging ------------------------------------------------------------------------------------------------


def of_merger(**wrong: Any) -> Callable[[pytest.MonkeyPatch], Any]:
    """What a merger knows of itself, otherwise."""

    def wrap(real: Callable[..., None]) -> Callable[..., None]:
        def begin(self: Any) -> None:
            real(self)
            for name, value in wrong.items():
                setattr(self, name, value)

        return begin

    return around(merge.Merger, "__post_init__", wrap)


def without_magnitude(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def applied(slot: Any, *given: Any) -> torch.Tensor:
        return real(replace(slot, magnitude=None) if getattr(slot, "magnitude", None) is not None else slot, *given)

    return applied


def rounded_before_it_is_added(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda self, weight, row, rows: rows + (real(self, weight, row, rows) - rows).bfloat16().float()


@contextmanager
def in_place(place: Path) -> Iterator[Path]:
    place.mkdir(parents=True)
    yield place


def kind(which: str, architecture: str) -> Callable[[Bench], None]:
    return lambda b: test_merge.test_every_kind_of_adapter_merges_to_the_live_models_logits(
        which, architecture, b.place
    )


MERGE = (
    Bug(
        "merge", "the scale alpha / r is lost",
        around(merge, "low_rank_rows", lambda real: lambda slot, *given: real(slot, *given) / slot.scale),
        kind("plain", "llama"),
    ),
    Bug("merge", "DoRA's magnitude is left out", around(merge, "applied", without_magnitude), kind("dora", "llama")),
    Bug(
        "merge", "an embedding that is trained whole stays the head", of_merger(unties=False),
        kind("whole embeddings", "qwen3"),
    ),
    Bug(
        "merge", "a head that repeats the embedding stays behind", of_merger(head_copies=[]),
        lambda b: test_merge.test_a_head_that_the_checkpoint_repeats_does_not_stay_behind("plain", b.place),
    ),
    Bug(
        "merge", "the update is rounded before it is added", around(merge.Merger, "merged", rounded_before_it_is_added),
        lambda b: test_merge.test_each_weight_is_rounded_once_from_float32(b.place),
    ),
    Bug(
        "merge", "it goes onto the original base whatever is asked", of_merger(onto="original"),
        lambda b: test_merge.test_merged_onto_the_dequantized_base_it_is_the_model_that_was_trained("llama", "nf4", b.place),
    ),
    Bug(
        "merge", "TIES counts weights in the vote on the sign",
        around(merge, "combine", lambda real: lambda updates, weights, how: real(
            [w * u for u, w in zip(updates, weights)], [1.0] * len(weights), how)),
        lambda b: test_combine.test_ties_is_pefts_on_full_updates(0.5, b.three),
    ),
    Bug(
        "merge", "what DARE keeps is not made larger", 
        around(merge, "dropped", lambda real: lambda update, density, *given: density * real(update, density, *given)),
        lambda b: test_combine.test_dare_is_pefts_given_the_same_draws("dare-linear", 0.4, b.three, b.patch),
    ),
    Bug(
        "merge", "a merge that fails leaves half of a model", set_to(merged, "atomic_folder", in_place),
        lambda b: test_merge.test_a_merge_that_fails_on_the_way_leaves_nothing(b.place, b.patch),
    ),
    Bug(
        "merge", "the drift is never above the limit",
        set_to(merging, "compare", lambda base, onto, live: Drift(onto, live.loss, 0.0, 1.0)),
        lambda b: test_merge_command.test_above_max_drift_nothing_is_written_and_the_way_out_is_named(b.trained, b.place),
    ),
    Bug(
        "merge", "GGUF has the rows of q and k in transformers' order",
        set_to(gguf_layout, "interleaved", lambda rows, heads: rows),
        lambda b: test_gguf.test_transformers_reads_the_file_with_the_same_logits("llama", b.place),
    ),
)  # fmt: skip

BUGS = (*LOADER, *CHECKPOINT, *MERGE)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.room}: {bug.what}")
def test_the_bug_is_caught(tmp_path: Path, bug: Bug) -> None:
    with pytest.MonkeyPatch.context() as patch:
        bug.caught_by(Bench(tmp_path / "sound", patch))
    with pytest.MonkeyPatch.context() as patch:
        bench = Bench(tmp_path / "broken", patch)
        bug.make(patch)
        with pytest.raises((Exception, pytest.fail.Exception)):
            bug.caught_by(bench)
