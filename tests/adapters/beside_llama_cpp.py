"""What the proofs beside llama.cpp share: prompts, its greedy answers with logits, Graft's, and what differs."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.attach import attach
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base
from graftlm.commands.train import train
from graftlm.config import TrainConfig
from graftlm.serving.engine.generate import AdapterPrompt, generate_all

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "e2e"


def trained(file: Path, place: Path, steps: int) -> Path:
    """An adapter trained for some steps on restaurants' descriptions, on a GGUF file's own blocks; skips without the data."""
    if not DATA.is_dir():
        pytest.skip("the E2E set is not in shared/data beside the checkout")
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (place / "rows.jsonl").write_text("\n".join(lines[:: len(lines) // 240]), encoding="utf-8")
    options = {
        "model": str(file), "data": [str(place / "rows.jsonl")], "base_precision": "gguf", "compute_dtype": "float32",
        "device": "cpu", "steps": steps, "batch_size": 4, "learning_rate": 2e-3, "rank": 8, "rank_stabilized": True,
        "out": str(place / "run"), "seed": 5,
    }  # fmt: skip
    return Path(train(TrainConfig.build(options))["adapter_folder"])


def prompts(count: int) -> list[str]:
    """Inputs that differ, in the eval set's order."""
    rows = [json.loads(line) for line in (DATA / "valid.jsonl").read_text(encoding="utf-8").splitlines()]
    found = list(dict.fromkeys(row["prompt"] for row in rows))
    return found[:: len(found) // count][:count]


class LlamaCpp:
    """llama.cpp, with an adapter or without, by token ids."""

    def __init__(self, base: Path, adapter: Path | None = None, **options: bool) -> None:
        llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
        self.model = llama_cpp.Llama(
            model_path=str(base), lora_path=None if adapter is None else str(adapter), n_ctx=256, n_threads=1,
            n_threads_batch=1, logits_all=True, type_k=0, type_v=0, verbose=False, **options,
        )  # fmt: skip

    def greedy(self, prompt: Sequence[int], stop: Collection[int], most: int) -> tuple[list[int], Tensor]:
        """Its most likely tokens, the one that ends the answer included, and the logits of each (tokens, vocabulary)."""
        self.model.reset()
        self.model.eval(list(prompt))
        tokens, rows = list[int](), list[Tensor]()
        while len(tokens) < most and not (tokens and tokens[-1] in stop):
            rows.append(torch.from_numpy(np.array(self.model.scores[self.model.n_tokens - 1])))
            tokens.append(int(rows[-1].argmax()))
            self.model.eval([tokens[-1]])
        return tokens, torch.stack(rows)


def answers(base: Base, encoder: Encoder, folder: Path, asked: Sequence[list[int]], most: int) -> list[list[int]]:
    """Graft's most likely tokens, as `graft generate` decodes them."""
    given = [AdapterPrompt(ids, encoder, adapter_format.inspect_folder(folder).digest, folder) for ids in asked]
    found: list[list[int]] = [[] for _ in asked]
    generate_all(base, given, max_tokens=most, on_output=lambda output: found[int(output.id)].extend(output.tokens))
    return found


@dataclass
class Compared:
    """Answers of both, token by token, the one that ends an answer included."""

    total: int = 0
    """Tokens of the longer answer of each prompt."""
    before_parting: int = 0
    """Tokens that are equal before the first one that differs: what follows has another text in front of it."""
    likeliest: int = 0
    """Tokens of llama.cpp's answers that are Graft's most likely ones too, behind llama.cpp's own text."""
    answered: int = 0
    """Tokens of llama.cpp's answers."""
    logits: list[float] = field(default_factory=list[float])
    """|z - z'| / |z'| of the logits behind each prompt."""
    partings: list[float] = field(default_factory=list[float])
    """Where answers part: the gap between both tokens' logits in standard deviations of z - z' there, the smaller of two."""


def compare(llama_cpp: LlamaCpp, base: Base, folder: Path, count: int, most: int) -> Compared:
    """Both on `count` prompts, with answers of at most `most` tokens."""
    encoder = Encoder(base.tokenizer)
    asked = [encoder.prompt_text(prompt) for prompt in prompts(count)]
    generated = answers(base, encoder, folder, asked, most)
    attach(base, adapter_format.load(base, folder), slot=1)  # after the engine, which empties its slots when it closes
    found = Compared()
    for prompt, ours in zip(asked, generated):
        theirs, logits = llama_cpp.greedy(prompt, encoder.stop_ids, most)
        own = tiny.base_logits(base, torch.tensor(prompt + theirs[:-1]))[len(prompt) - 1 :]  # (tokens, vocabulary)
        same = parting(ours, theirs)
        found.total += max(len(ours), len(theirs))
        found.before_parting += same
        found.likeliest += int((own.argmax(1) == torch.tensor(theirs)).sum())
        found.answered += len(theirs)
        found.logits.append(float((own[0] - logits[0]).norm() / logits[0].norm()))
        if same < min(len(ours), len(theirs)):
            noise = float((own[same] - logits[same]).std())
            gaps = [abs(float(row[ours[same]] - row[theirs[same]])) for row in (own[same], logits[same])]
            found.partings.append(min(gaps) / noise)
    return found


def parting(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens of two answers are equal before the first one that differs."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
