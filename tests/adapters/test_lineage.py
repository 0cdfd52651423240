"""What made a version, and how two differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import stores
import torch
from safetensors.torch import load_file

from graftlm.adapters.store import Store
from graftlm.adapters.store.lineage import differences, distances, lineage


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "store")
    first, _ = found.publish(stores.run(tmp_path / "run1", 1), "formal", note="the first")
    found.publish(
        stores.run(tmp_path / "run2", 2, evaluation={"before": 3.0, "after": 1.5}, lineage={"parents": [first.digest]}),
        "formal",
    )
    return found


def test_show_has_base_data_config_losses_and_parents(store: Store) -> None:
    found = lineage(store, store.find("formal@2"))
    assert found["base"]["fingerprint"] == stores.BASE
    assert found["data"]["digest"] == "d" * 32
    assert (found["config"]["learning_rate"], found["config"]["seed"]) == (2e-4, 2)
    assert found["metrics"] == {"before": 3.0, "after": 1.5}
    assert found["parents"] == [{"digest": store.find("formal@1").digest, "version": "formal@1"}]
    assert lineage(store, store.find("formal@1"))["children"] == ["formal@2"]
    assert (found["tensors"], found["parameters"]) == (4, 2 * (3 * 7 + 11 * 3))


def test_a_parent_that_was_removed_is_still_named_by_its_digest(store: Store) -> None:
    digest = store.find("formal@1").digest
    store.remove("formal@1")
    assert lineage(store, store.find("formal@2"))["parents"] == [{"digest": digest, "version": None}]


def test_diff_names_what_differs_and_nothing_else(store: Store) -> None:
    found = differences(store, store.find("formal@1"), store.find("formal@2"))
    assert {row["key"]: (row["first"], row["second"]) for row in found["config"]} == {"config.seed": (1, 2)}
    assert [(row["key"], row["first"], row["second"]) for row in found["metrics"]] == [("after", 2.0, 1.5)]
    assert found["plan"] == []
    same = differences(store, store.find("formal@1"), store.find("formal@1"))
    assert (same["config"], same["metrics"], same["plan"], same["weights"]["distance"]) == ([], [], [], 0.0)


def test_the_distance_of_each_layer_is_that_of_the_updates(tmp_path: Path) -> None:
    a, b = stores.adapter(tmp_path / "a", 1), stores.adapter(tmp_path / "b", 2, scale=0.5)
    named = [load_file(folder / "adapter_model.safetensors") for folder in (a, b)]
    found = {d.layer: d for d in distances(a, b)}
    assert len(found) == 2
    for layer in (0, 1):
        U, V = (5 / 3 * n[stores.LAYER.format(layer, "B")] @ n[stores.LAYER.format(layer, "A")] for n in named)
        d = found[f"model.layers.{layer}.self_attn.q_proj"]
        assert d.distance == pytest.approx(float((U - V).norm() / U.norm()), rel=1e-5)
        assert d.cosine == pytest.approx(float((U * V).sum() / U.norm() / V.norm()), rel=1e-4)
        assert (d.first, d.second) == (
            pytest.approx(float(U.norm()), rel=1e-5),
            pytest.approx(float(V.norm()), rel=1e-5),
        )


def test_factors_that_make_the_same_update_are_at_no_distance(tmp_path: Path) -> None:
    a = stores.adapter(tmp_path / "a", 1)
    named = load_file(a / "adapter_model.safetensors")
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0] * 1.7
    for layer in (0, 1):
        A, B = (stores.LAYER.format(layer, kind) for kind in "AB")
        named[A], named[B] = turn @ named[A], named[B] @ torch.linalg.inv(turn)
    (tmp_path / "b").mkdir()
    b = stores.written(tmp_path / "b", {n: t.contiguous() for n, t in named.items()})
    assert all(d.distance is not None and d.distance < 1e-5 for d in distances(a, b))
