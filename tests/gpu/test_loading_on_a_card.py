"""A checkpoint comes to a card without packages beside those that are installed with the package."""

from __future__ import annotations

import pytest
import tiny
from fixtures import Worker


@pytest.mark.parametrize(
    ("architecture", "precision"), [("llama", "bfloat16"), ("qwen3", "float32"), ("mixtral", "nf4"), ("llama", "int8")]
)
def test_a_checkpoint_loads_on_a_card_without_accelerate(card: Worker, architecture: str, precision: str) -> None:
    found = card.ask("load", folder=str(tiny.folder(architecture)), precision=precision)
    assert {device for device, _ in found.values()} == {"cuda:1"}, found
