"""Several adapters in one model: by weight, by TIES, by DARE; equal to PEFT's wherever PEFT works on whole updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from merging import merger, saved, written
from peft import PeftModel
from peft.utils import merge_utils

from graftlm.adapters import combine as ours
from graftlm.adapters.combine import MergeRecipe
from graftlm.adapters.merge import Merger
from graftlm.base.loading import Base, load_base

WEIGHTS = (1.0, 0.3, -0.4)
FULL = 64  # at least the smaller side of every layer: nothing is cut off by the rank


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(str(tiny.folder("llama")), device="cpu", compute_dtype="float32")


@pytest.fixture(scope="module")
def folders(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return three(base, tmp_path_factory.mktemp("three"))


def three(base: Base, root: Path) -> list[Path]:
    """Three adapters of different ranks and scales; the last one is not on every layer that the others are on."""
    return [
        saved(base, root / "a", seed=1),
        saved(base, root / "b", seed=2, rank=5, alpha=7.0),
        saved(base, root / "c", seed=3, rank=2, rank_stabilized=True, targets=("q_proj", "down_proj")),
    ]


def pefts(folders: list[Path], kind: str, **options: Any) -> dict[str, torch.Tensor]:
    """PEFT's combination, merged into the base: its weights by our names."""
    names = ["a", "b", "c"][: len(folders)]
    model: Any = PeftModel.from_pretrained(tiny.plain(tiny.folder("llama")), str(folders[0]), adapter_name="a")
    for name, folder in zip(names[1:], folders[1:]):
        model.load_adapter(str(folder), adapter_name=name)
    with pytest.warns() if options.get("density") == 1.0 else _nothing():
        model.add_weighted_adapter(names, list(WEIGHTS[: len(names)]), "sum", combination_type=kind, **options)
    model.set_adapter("sum")
    return model.merge_and_unload().state_dict()


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def combined(folders: list[Path], recipe: MergeRecipe) -> Merger:
    return merger(tiny.folder("llama"), list(zip(folders, WEIGHTS)), recipe=recipe)


def assert_equal(found: Merger, expected: dict[str, torch.Tensor]) -> None:
    assert len(found.parts) == 14
    for name in found.parts:
        tiny.close(found.weight(name, torch.float32), expected[name], rtol=2e-5)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_linear_is_pefts_exact_sum(kind: str, folders: list[Path]) -> None:
    options = {"svd_rank": FULL, "svd_full_matrices": False} if kind == "svd" else {}
    assert_equal(combined(folders, MergeRecipe("linear")), pefts(folders, kind, **options))


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_pefts_on_full_updates(density: float, folders: list[Path]) -> None:
    expected = pefts(folders, "ties_svd", svd_rank=FULL, svd_full_matrices=False, density=density)
    assert_equal(combined(folders, MergeRecipe("ties", density)), expected)


@pytest.mark.parametrize("kind", ["dare-linear", "dare-ties"])
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_dare_is_pefts_given_the_same_draws(
    kind: Any, density: float, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = combined(folders, MergeRecipe(kind, density, seed=5))
    draws: list[torch.Tensor] = []
    for name in [n for n in found.parts if n in dict(_modules())]:
        form = found.base.forms[name]
        for index, _ in found.parts[name]:
            ones = torch.ones(form.shape)
            draws.append(ours.dropped(ones, density, 5, (name, -1, index), 0) != 0)
    given = iter(draws)

    def prune(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        mask = next(given)
        assert mask.shape == tensor.shape
        return tensor * mask / density

    monkeypatch.setattr(merge_utils, "random_pruning", prune)
    assert_equal(
        found, pefts(folders, kind.replace("-", "_") + "_svd", svd_rank=FULL, svd_full_matrices=False, density=density)
    )
    if density < 1:
        assert next(given, None) is None


def _modules() -> Any:
    """The weights in the order in which PEFT combines them: that of the model."""
    return tiny.plain(tiny.folder("llama")).named_parameters()


def test_dare_keeps_the_given_density_and_the_sum_on_average() -> None:
    update = torch.ones(300, 400)
    kept = ours.dropped(update, 0.3, 7, ("w", -1, 0), 0)
    assert (kept != 0).float().mean() == pytest.approx(0.3, abs=0.01)
    assert kept.mean() == pytest.approx(1.0, abs=0.03)
    other = ours.dropped(update, 0.3, 7, ("w", -1, 1), 0)
    both = ((kept != 0) & (other != 0)).float().mean()
    assert both == pytest.approx(0.09, abs=0.01)  # two adapters draw apart
    assert torch.equal(
        ours.dropped(update[100:], 0.3, 7, ("w", -1, 0), 100), kept[100:]
    )  # however it is cut into blocks
    assert not torch.equal(ours.dropped(update, 0.3, 8, ("w", -1, 0), 0), kept)


def test_what_dare_drops_is_the_same_for_the_same_seed(folders: list[Path]) -> None:
    first, second, third = (combined(folders[:2], MergeRecipe("dare-linear", 0.5, seed)) for seed in (1, 1, 2))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.weight(name, torch.float32), second.weight(name, torch.float32))
    assert not torch.equal(first.weight(name, torch.float32), third.weight(name, torch.float32))


@pytest.mark.parametrize("kind", ["linear", "ties", "dare-linear", "dare-ties"])
def test_no_block_size_changes_a_number(kind: Any, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = MergeRecipe(kind, 0.5 if kind != "linear" else 1.0, 3)
    names = ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight")
    whole = [combined(folders, recipe).weight(n, torch.float32) for n in names]
    monkeypatch.setattr("graftlm.adapters.merge._BLOCK", 100)
    for name, expected in zip(names, whole):
        tiny.close(combined(folders, recipe).weight(name, torch.float32), expected, rtol=1e-6)


def test_stacked_experts_embeddings_heads_and_dora_are_added_by_weight(tmp_path: Path) -> None:
    base = load_base(str(tiny.folder("mixtral")), device="cpu", compute_dtype="float32")
    one, two = saved(base, tmp_path / "1", seed=1), saved(base, tmp_path / "2", seed=2, modules_to_save=("head",))
    both = merger(base.folder, [(one, 0.5), (two, 0.7)])
    alone = [merger(base.folder, [folder]) for folder in (one, two)]
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.gate.weight", "lm_head.weight"):
        bare = merger(base.folder, []).weight(name, torch.float32)
        updates = [m.weight(name, torch.float32) - bare for m in alone]
        tiny.close(both.weight(name, torch.float32), bare + 0.5 * updates[0] + 0.7 * updates[1], rtol=1e-5)
    llama = load_base(str(tiny.folder("llama")), device="cpu", compute_dtype="float32")
    dora = saved(llama, tmp_path / "3", seed=3, dora=True)
    half = merger(llama.folder, [(dora, 0.5)])
    name = "model.layers.0.self_attn.k_proj.weight"
    bare, full = (m.weight(name, torch.float32) for m in (merger(llama.folder, []), merger(llama.folder, [dora])))
    tiny.close(half.weight(name, torch.float32), (bare + full) / 2, rtol=1e-5)


def test_ties_trims_each_expert_by_itself(tmp_path: Path) -> None:
    base = load_base(str(tiny.folder("mixtral")), device="cpu", compute_dtype="float32")
    folders = [saved(base, tmp_path / str(i), seed=i, targets=("down_proj",)) for i in (1, 2)]
    name = "model.layers.0.mlp.experts.down_proj"
    found = merger(base.folder, list(zip(folders, WEIGHTS)), recipe=MergeRecipe("ties", 0.3)).weight(
        name, torch.float32
    )
    bare = merger(base.folder, []).weight(name, torch.float32)
    alone = [merger(base.folder, [f]).weight(name, torch.float32) - bare for f in folders]
    for expert in range(3):
        expected = merge_utils.ties([a[expert] for a in alone], torch.tensor(WEIGHTS[:2]), 0.3)
        tiny.close(found[expert] - bare[expert], expected, rtol=1e-4)


def test_adapters_on_different_layers_are_merged_side_by_side(base: Base, tmp_path: Path) -> None:
    one = saved(base, tmp_path / "1", targets=("q_proj",))
    two = saved(base, tmp_path / "2", targets=("up_proj",))
    out = written(tmp_path / "out", merger(base.folder, [one, two]))
    state, plain = tiny.plain(out).state_dict(), tiny.plain(base.folder).state_dict()
    changed = {name.split(".")[-2] for name in state if not torch.equal(state[name], plain[name])}
    assert changed == {"q_proj", "up_proj"}
