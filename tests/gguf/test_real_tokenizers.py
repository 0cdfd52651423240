"""The tokenizers of two real GGUF files give llama.cpp's tokens, text for text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import real_models

from graftlm.base.loading import load_tokenizer, resolve

SHARED = Path(__file__).parents[3] / "shared" / "data"
OWN = (
    "  leading", "trailing  ", "a\n\n\nb\t\tc", "中文 日本語 한국어 🙂👍🏽 é", "<|im_start|>user\nHi<|im_end|>",
    "<start_of_turn>user\nHi<end_of_turn>\n", "x=1;\n    y=2\r\n", "", "It's 1,234.5 or 2^10; isn't it?",
)  # fmt: skip


def texts() -> Iterator[str]:
    """A few hundred texts of three data sets where they are at hand, and some that try a tokenizer's corners."""
    for name in ("gsm8k/train.jsonl", "e2e/valid.jsonl", "pretrain/t0.jsonl.gz"):
        if (SHARED / name).is_file():
            opened: Any = gzip.open if name.endswith(".gz") else open
            with opened(SHARED / name, "rt", encoding="utf-8") as lines:
                for line in islice(lines, 300):
                    yield " ".join(str(value) for value in json.loads(line).values())
    yield from OWN


@pytest.mark.prove
@pytest.mark.parametrize("model", ["smollm2", "gemma"])
def test_every_text_is_llama_cpps_tokens(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install graftlm[bench]")
    file = real_models.smollm2() if model == "smollm2" else real_models.gemma(tmp_path)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    ours: Any = load_tokenizer(resolve(str(file)))
    theirs = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in texts():
        assert ours(text)["input_ids"] == theirs.tokenize(text.encode(), add_bos=True, special=True), text
