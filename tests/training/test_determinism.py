"""`--deterministic` on a GPU: PyTorch is told in time, once, and only for as long as the run takes."""

from __future__ import annotations

import os

import pytest
import torch

from graftlm.errors import ConfigError
from graftlm.training.determinism import deterministic_algorithms

GPU = torch.device("cuda")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def test_pytorch_uses_deterministic_algorithms_while_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    with deterministic_algorithms(GPU):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled(), "flash attention then stays as it is"
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ[WORKSPACE] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fills
    assert WORKSPACE not in os.environ


def test_on_a_cpu_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    with deterministic_algorithms(torch.device("cpu"), loaded=True):
        assert not torch.are_deterministic_algorithms_enabled()
        assert WORKSPACE not in os.environ


def test_a_workspace_that_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic_algorithms(GPU, loaded=True):
        assert os.environ[WORKSPACE] == ":16:8"
    assert os.environ[WORKSPACE] == ":16:8"


@pytest.mark.parametrize(("size", "loaded"), [(None, True), (":4096:2:16:8", False)])
def test_a_workspace_that_comes_too_late_or_changes_bits_is_refused(
    size: str | None, loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    if size is not None:
        monkeypatch.setenv(WORKSPACE, size)
    with (
        pytest.raises(ConfigError, match=f"{WORKSPACE} to be :4096:8 before .* set it before Python starts"),
        deterministic_algorithms(GPU, loaded=loaded),
    ):
        pass
    assert not torch.are_deterministic_algorithms_enabled()
