"""Small rows for the tests of data, and an encoder whose tokenizer is learnt in no time."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from graftlm.base.chat import Encoder
from graftlm.data.sources import Source


@functools.cache
def encoder() -> Encoder:
    """Of a byte-level tokenizer without a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    corpus = ["The pub near the river serves cheap Chinese food. How many pieces of 12 does she have in all?"] * 9
    tokenizer.train_from_iterator(corpus, trainer)
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>"))


def write(path: Path, rows: list[dict[str, Any]]) -> Source:
    """Rows as a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path))


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Prompts with completions, all different; those of the same numbers are the same."""
    return [{"prompt": f"{index}:", "completion": f" {index * 7919}"} for index in range(start, start + count)]
