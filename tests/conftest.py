"""For all tests: this folder is importable (`import tiny`), one thread, and a cache folder that is nobody's own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

os.environ.setdefault("GRAFT_CACHE", tempfile.mkdtemp(prefix="graft-test-cache-"))
torch.set_num_threads(1)


@pytest.fixture
def graft_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
