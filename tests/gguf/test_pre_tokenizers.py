"""Every pre-tokenizer that is known here splits text as llama.cpp does; what is not known, or odd, is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_files as files
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from graftlm.errors import ModelError
from graftlm.gguf.header import read_gguf
from graftlm.gguf.tokenizer import MAX_TOKEN_LENGTH, PRE_TOKENIZERS, tokenizer_of

TEXTS = [
    "It's 1,234.5 or 2^10; isn't it?", "WE'LL see, They'Ve said; don't", "  two  spaces\tand\ttabs \n\n  lines\r\n\r\nend ",
    "x=1;\n    y = {'a': [2, -3.5e10]}  # 007", "naïve Größe Привет мир Ελλάδα", "中文 日本語 한국어", "🙂👍🏽 ½ ² Ⅷ № ...!?",
    "camelCase XMLHttp ALLCAPS snake_case a/b/c \n/x", "a   b\n c", " ", "\n", "'s 's", "12345678901",
]  # fmt: skip

LONG = "a" * (MAX_TOKEN_LENGTH + 1)


def trained() -> dict[str, Any]:
    """tokenizer.json of BPE whose merges pass over spaces, digits and punctuation, so that a pattern decides."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False, min_frequency=2)
    backend.train_from_iterator([text for text in TEXTS for _ in range(3)], trainer)
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    return json.loads(backend.to_str())


def vocabulary(pre: str, **more: Any) -> dict[str, Any]:
    model = trained()["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {
        "general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": files.Int32([1] * len(tokens)),
        "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.eos_token_id": 6, **more,
    }  # fmt: skip


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_known_pre_tokenizer_splits_as_llama_cpp_does(pre: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    llama = {"llama.context_length": 64, "llama.embedding_length": 32, "llama.block_count": 1, "llama.feed_forward_length": 32,
             "llama.attention.head_count": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5}  # fmt: skip
    file = files.write(tmp_path / "m.gguf", files.header(vocabulary(pre, **llama), []))
    ours = Tokenizer.from_str(json.dumps(tokenizer_of(read_gguf(file))[0]))
    theirs = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == ours.encode(text).ids, text


def test_a_text_begins_with_the_first_token_where_llama_cpp_says_so_for_a_name(tmp_path: Path) -> None:
    for pre, first in (("llama-v3", True), ("tekken", True), ("gpt-2", False), ("smaug-bpe", False)):
        file = files.write(tmp_path / f"{pre}.gguf", files.header(vocabulary(pre), []))
        assert (tokenizer_of(read_gguf(file))[0]["post_processor"] is not None) is first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "splits text as 'deepseek-llm' .*, and gpt-2, .*tekken are known"),
        ({"tokenizer.ggml.model": "t5"}, "a tokenizer of kind 't5', and gpt2 .* and llama"),
        ({"tokenizer.ggml.model": 3}, "a tokenizer of kind '3'"),
        ({"tokenizer.ggml.tokens": []}, "has no tokenizer"),
        ({"tokenizer.ggml.tokens": "abc"}, "tokens is no list of str"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokens is no list of str"),
        ({"tokenizer.ggml.tokens": [LONG] * 9, "tokenizer.ggml.token_type": []}, "a token of 1,025 characters, and at most"),
        ({"tokenizer.ggml.token_type": [1]}, r"token_type has 1 values for \d+ tokens"),
        ({"tokenizer.ggml.token_type": ["a"]}, "token_type is no list of int"),
        ({"tokenizer.ggml.merges": ["ab"]}, "merge 'ab' of its tokenizer does not give"),
        ({"tokenizer.ggml.merges": ["no such"]}, "merge 'no such' of its tokenizer does not give"),
        ({"tokenizer.ggml.eos_token_id": 1 << 20}, "eos_token_id is 1048576, and its tokenizer has tokens 0 to"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id is x, and its tokenizer has tokens 0 to"),
        ({"tokenizer.ggml.model": "llama"}, "its SentencePiece tokenizer has no scores"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.5]}, "scores has 1 values for"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_is_odd_or_not_known_is_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = files.write(tmp_path / "m.gguf", files.header(vocabulary("gpt-2", **change), []))
    with pytest.raises(ModelError, match=message) as error:
        tokenizer_of(read_gguf(file))
    assert str(file) in str(error.value)
