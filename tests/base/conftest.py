"""Fixtures of this room."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A llama's folder that a test may change."""
    return Path(shutil.copytree(tiny.folder("llama"), tmp_path / "llama"))
