"""Small runs for tests: a random Llama with a tokenizer of bytes, small files of rows, and a run in this process."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graftlm.commands.train import train as train_command
from graftlm.config import TrainConfig
from graftlm.training.view import View

SPECIAL = ("<pad>", "<s>", "</s>")
VOCABULARY = 3 + 256
_WORDS = [
    "the",
    "old",
    "mill",
    "by",
    "a",
    "river",
    "turned",
    "slowly",
    "while",
    "seven",
    "small",
    "boats",
    "went",
    "past",
    "it",
    "in",
    "silence",
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after pad, start and end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@functools.cache
def folder() -> Path:
    """A random Llama (width 28, 2 layers) that reads bytes, as a folder; written once in a session, never changed."""
    place = Path(tempfile.mkdtemp(prefix="graft-tiny-run-")) / "base"
    model = tiny.random_model("llama", vocab_size=VOCABULARY, max_position_embeddings=256)
    model.save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts with completions, of different lengths and all different."""
    generator = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    for i in range(count):
        words = [str(word) for word in generator.choice(_WORDS, 2 + i % 4)]
        found.append({"prompt": f"{i} {words[0]}: ", "completion": " ".join(words)})
    return found


def write_rows(path: Path, values: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def options(place: Path, **changes: Any) -> dict[str, Any]:
    """Options of a run of 6 steps in `place`/run, on 12 rows and 5 eval ones."""
    data = place / "train.jsonl"
    eval_rows_file = place / "valid.jsonl"
    if not data.exists():
        write_rows(data, rows(12))
        write_rows(eval_rows_file, rows(5, seed=1))
    given = {
        "model": str(folder()), "data": [str(data)], "eval_data": str(eval_rows_file), "out": str(place / "run"),
        "steps": 6, "batch_size": 5, "rank": 3, "alpha": 7, "learning_rate": 0.01, "base_precision": "float32",
        "compute_dtype": "float32", "device": "cpu", "eval_every": 2, "seed": 11, **changes,
    }  # fmt: skip
    idle = {"rank", "alpha"} if given.get("method") == "full" else set[str]()  # options that this run has no use for
    idle |= {"eval_every"} if given["eval_data"] is None else set()
    return {name: value for name, value in given.items() if name in changes or name not in idle}


def contrary(place: Path) -> dict[str, Any]:
    """Options under which the eval loss soon rises: what is learnt in training is wrong there."""
    write_rows(place / "train.jsonl", [{"prompt": f"{i}: ", "completion": "a" * (3 + i)} for i in range(12)])
    write_rows(place / "valid.jsonl", [{"prompt": f"{i}: ", "completion": "the old mill"} for i in range(5)])
    return {"learning_rate": 0.1, "lr_scheduler": "constant", "eval_every": 1}


def train(place: Path, **changes: Any) -> dict[str, Any]:
    """Run `options`; returns the summary."""
    return heard(place, **changes)[0]


def heard(place: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    """Run `options`; returns the summary and what a person would have read."""
    text = StringIO()
    config = TrainConfig.build({k: v for k, v in options(place, **changes).items() if v is not None})
    summary = train_command(config, View(Console(file=text, width=100)))
    return summary, text.getvalue()


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def lines(path: Path) -> list[dict[str, Any]]:
    """A JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without(found: Sequence[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in keys} for line in found]
