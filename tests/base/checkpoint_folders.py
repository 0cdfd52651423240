"""Changing what is in a model folder, and loading it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftlm.base.loading import Base, load_base
from graftlm.errors import ModelError


def loaded(place: Path, precision: Any = "float32") -> Base:
    return load_base(str(place), precision=precision, compute_dtype="float32", device="cpu")


def refused(place: Path | str, *words: str, **options: Any) -> None:
    with pytest.raises(ModelError) as error:
        load_base(str(place), device="cpu", **options)
    for word in words:
        assert word in str(error.value), str(error.value)


def change(folder: Path, act: Callable[[dict[str, Tensor]], Any]) -> None:
    named = load_file(folder / "model.safetensors")
    act(named)
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(json.dumps(config))
