"""A folder's tokenizer in GGUF's terms: tokens and their types, merges, special tokens, chat template.

llama.cpp knows pre-tokenizers by name and splits text with its own code for each. So a tokenizer is written only if its
pattern is one of those; any other would be split differently without a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.base.chat import Encoder
from graftlm.base.loading import load_tokenizer
from graftlm.errors import ModelError
from graftlm.gguf.tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, name_of
from graftlm.jsonfile import MOST_TOKENIZER_BYTES, read_json


@dataclass(frozen=True)
class GgufTokenizer:
    """A byte-level BPE tokenizer in GGUF's terms."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    stop: list[int]
    adds_bos: bool
    template: str | None


def read_vocab(folder: Path, size: int) -> GgufTokenizer:
    """The folder's tokenizer. Raises ModelError for one with which llama.cpp would split text differently."""
    tokenizer: Any = load_tokenizer(folder)
    tokenizer_json = (
        read_json(folder / "tokenizer.json", ModelError, most=MOST_TOKENIZER_BYTES)
        if (folder / "tokenizer.json").is_file()
        else {}
    )
    model: dict[str, Any] = tokenizer_json.get("model") or {}
    pre = _pre_tokenizer(tokenizer_json, model)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = {int(t["id"]): t for t in tokenizer_json.get("added_tokens") or ()}
    last = max(vocabulary.values())
    if last >= size:
        raise ModelError(f"{folder}: its tokenizer has token {last}, and its embedding {size} rows")
    by_id = {i: token for token, i in vocabulary.items()}
    tokens, types = list[str](), list[int]()
    for i in range(size):
        tokens.append(by_id.get(i, f"[PAD{i}]"))
        if i not in by_id:
            types.append(UNUSED)
        elif i in added:
            types.append(CONTROL if added[i].get("special") else USER_DEFINED)
        else:
            types.append(NORMAL)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or ()]
    encoder = Encoder(tokenizer)
    special = {
        name: int(i) for name in ("bos", "eos", "unk", "pad")
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None
    }  # fmt: skip
    first = tokenizer("a")["input_ids"][:1]
    return GgufTokenizer(
        pre=pre, tokens=tokens, types=types, merges=merges, special=special, stop=sorted(encoder.stop_ids),
        adds_bos=bool(first and first[0] == special.get("bos")), template=_template(tokenizer),
    )  # fmt: skip


def _template(tokenizer: Any) -> str | None:
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def _pre_tokenizer(tokenizer_json: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer. Raises ModelError for one that it does not have."""
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece-like BPE" if model.get("byte_fallback") else model.get("type") or "unknown"
        raise ModelError(
            f"its tokenizer is {kind}, and only byte-level BPE is supported; convert the plain folder with llama.cpp's "
            "own converter"
        )
    steps: dict[str, Any] = tokenizer_json.get("pre_tokenizer") or {}
    parts: list[dict[str, Any]] = steps.get("pretokenizers") or [steps]
    normalizer = (tokenizer_json.get("normalizer") or {}).get("type")
    name = name_of(parts, normalizer, ignore_merges=bool(model.get("ignore_merges")))
    if name is None:
        raise ModelError(
            "its tokenizer splits text in a way that llama.cpp has no name for, so it would give other tokens there; "
            "those of GPT-2, Llama 3, Qwen 2 and SmolLM are supported"
        )
    return name


def write_vocab(writer: Any, vocab: GgufTokenizer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    writer.add_token_merges(vocab.merges)
    for name, token in vocab.special.items():
        getattr(writer, f"add_{name}_token_id")(token)
    turn = [i for i in vocab.stop if i != vocab.special.get("eos")]
    if turn:  # the end-of-turn token differs from the end of text
        writer.add_eot_token_id(turn[0])
    writer.add_add_bos_token(vocab.adds_bos)
    if vocab.template is not None:
        writer.add_chat_template(vocab.template)
