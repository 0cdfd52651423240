"""A folder's tokenizer as the metadata of a GGUF file: tokens and their types, merges or scores, special tokens, chat template.

    tokenizer.ggml.model "gpt2"     byte-level BPE: merges, and the name of a pre-tokenizer
    tokenizer.ggml.model "llama"    SentencePiece: a score for each token, and a token for each byte

A base that is a GGUF file lends its own values, as long as the tokenizer is still that one. Any other is converted from its
`tokenizer.json`. llama.cpp splits and joins text with its own code, so a tokenizer with which it would find other tokens is
refused: by its form, and by reading the values back (`gguf/tokenizer.py`, which is held against llama.cpp) and comparing texts.
"""

from __future__ import annotations

import filecmp
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from graftlm.base.chat import Encoder
from graftlm.base.loading import load_tokenizer
from graftlm.errors import ModelError
from graftlm.gguf.folder import gguf_of
from graftlm.gguf.header import GgufFile
from graftlm.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    name_of,
    tokenizer_of,
)
from graftlm.jsonfile import MOST_TOKENIZER_BYTES, read_json

_KEYS = {
    # tokenizer.*              GGUF type        what llama.cpp takes where a file does not say
    "ggml.model":              "STRING",        # nothing: it refuses the file
    "ggml.pre":                "STRING",        # gpt2: a pattern of its own, `default`
    "ggml.tokens":             "STRING[]",      # nothing: it refuses the file; a token twice is refused too
    "ggml.token_type":         "INT32[]",       # all normal: special tokens are not found in a text
    "ggml.scores":             "FLOAT32[]",     # llama: all 0, so the leftmost pair is joined
    "ggml.merges":             "STRING[]",      # gpt2, nothing: it refuses the file
    "ggml.bos_token_id":       "UINT32",        # gpt2: 11, llama: 1
    "ggml.eos_token_id":       "UINT32",        # gpt2: 11, llama: 2
    "ggml.unknown_token_id":   "UINT32",        # gpt2: none, llama: 0
    "ggml.padding_token_id":   "UINT32",        # none
    "ggml.eot_token_id":       "UINT32",        # a token with a known text, such as <|im_end|>
    "ggml.eom_token_id":       "UINT32",        # <|eom_id|>
    "ggml.add_bos_token":      "BOOL",          # gpt2: by the pre-tokenizer, llama: true; refused without a bos_token_id
    "ggml.add_eos_token":      "BOOL",          # false
    "ggml.add_space_prefix":   "BOOL",          # gpt2: false, llama: true
    "chat_template":           "STRING",        # ChatML, whatever the model was trained with
}  # fmt: skip
"""The values that are written, from `llama_vocab::impl::load` in llama.cpp's `src/llama-vocab.cpp`."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_PREFIXED = [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
_NEVER_SPLITS = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
"""Gemma's pre-tokenizer, behind a normalizer that leaves no space."""
_WAY_OUT = "write the plain folder and convert it with llama.cpp's own converter"
_TEXTS = (
    "The quick brown fox isn't jumping over 1,234.5 lazy dogs; it's 2^10!", "  two spaces,   three,\ttabs\t\t \n\n lines\r\n",
    "def f(x):\n    return {'a': [x, -1.5e-3], \"b\": None}  # ok\n", "Größe, naïve, Ελλάδα, Привет, мир",
    "中文 日本語 한국어 हिन्दी العربية", "🙂👍🏽 ½ № ™ ﬁ", "Don't SHOUT, WE'LL see; they'Ve",
    "ALLCAPS camelCase snake_case x2y 007",
)  # fmt: skip
"""Texts on which a converted tokenizer must give the tokens of the folder's."""


_MOST_BESIDE = 20
"""Number of added tokens that are tried in a text of their own."""


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer in GGUF's terms."""

    values: dict[str, Any]
    """By the keys of `_KEYS`."""
    stop: list[int]
    """The tokens that end an answer."""
    notes: list[str]

    @property
    def tokens(self) -> list[str]:
        return self.values["ggml.tokens"]

    def metadata(self) -> dict[str, Any]:
        """The values by their keys in the file."""
        return {f"tokenizer.{key}": value for key, value in self.values.items()}


def read_vocab(folder: Path, size: int, base: Path | None = None) -> GgufTokenizer:
    """The folder's tokenizer with `size` tokens; `base` is the folder of the model that it was made of.

    Raises ModelError for one that llama.cpp would refuse, or with which it would find other tokens in a text.
    """
    tokenizer: Any = load_tokenizer(folder)
    encoder = Encoder(tokenizer)
    own = None if base is None else _own_values(folder, base)
    values = _padded(folder, _converted(folder, tokenizer, encoder) if own is None else own, size)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    notes = list[str]()
    if isinstance(template, str):
        values["chat_template"] = template
    else:
        values.pop("chat_template", None)
        notes.append("it has no chat template, so llama.cpp takes ChatML for chats; prompts as plain text are the same")
    _check_loads(folder, values)
    if own is None:
        _check_tokens(folder, tokenizer, values)
    return GgufTokenizer(values, sorted(encoder.stop_ids), notes)


def write_vocab(writer: Any, kinds: Any, vocab: GgufTokenizer) -> None:
    """Add the values to a GGUFWriter; `kinds` is the gguf package's GGUFValueType."""
    for key, kind in _KEYS.items():
        if key in vocab.values:
            item = kinds[kind.removesuffix("[]")]
            whole, part = (kinds.ARRAY, item) if kind.endswith("[]") else (item, None)
            writer.add_key_value(f"tokenizer.{key}", vocab.values[key], whole, part)


# ---- where the values come from --------------------------------------------------------------------------------------


def _own_values(folder: Path, base: Path) -> dict[str, Any] | None:
    """The values of the GGUF file that is the base, if the folder's tokenizer is that one; else None."""
    source = gguf_of(base)
    names = ("tokenizer.json", "tokenizer_config.json")
    if source is None or not all(
        (folder / name).is_file() and filecmp.cmp(folder / name, base / name, shallow=False) for name in names
    ):
        return None
    return {key: source.metadata[f"tokenizer.{key}"] for key in _KEYS if f"tokenizer.{key}" in source.metadata}


def _converted(folder: Path, tokenizer: Any, encoder: Encoder) -> dict[str, Any]:
    """The values that follow from a folder's `tokenizer.json`."""
    file = folder / "tokenizer.json"
    tokenizer_json = read_json(file, ModelError, most=MOST_TOKENIZER_BYTES) if file.is_file() else {}
    model: dict[str, Any] = tokenizer_json.get("model") or {}
    added: dict[int, AddedToken] = tokenizer.added_tokens_decoder
    stripping = next((token for token in added.values() if token.lstrip or token.rstrip or token.single_word), None)
    if stripping is not None:
        raise ModelError(
            f"{folder}: its token '{stripping.content}' takes spaces beside it (lstrip, rstrip or single_word), which GGUF "
            f"has no place for; {_WAY_OUT}"
        )
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    tokens = [by_id.get(i, "") for i in range(max(by_id) + 1)]
    types = [UNUSED if i not in by_id else _type_of(added.get(i)) for i in range(len(tokens))]
    special = {
        key: int(i)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None
    }
    turns = sorted(encoder.stop_ids - {special.get("eos")})  # the end of a turn, where it is not the end of the text
    special.update(zip(("eot", "eom"), turns))
    ids = tokenizer("a")["input_ids"]
    values: dict[str, Any] = {
        "ggml.tokens": tokens, "ggml.token_type": types,
        **{f"ggml.{name}_token_id": i for name, i in special.items()},
        "ggml.add_bos_token": bool(ids) and ids[0] == special.get("bos"),
        "ggml.add_eos_token": len(ids) > 1 and ids[-1] == special.get("eos"),
    }  # fmt: skip
    if model.get("type") == "BPE" and (model.get("byte_fallback") or _spaces(tokenizer_json) is not None):
        return {**values, **_sentencepiece(folder, tokenizer_json, model, tokens, types, added)}
    if model.get("type") == "BPE":
        return {**values, **_byte_level(tokenizer_json, model)}
    raise ModelError(
        f"{folder}: its tokenizer is {model.get('type') or 'of a kind that is not known'}, and byte-level BPE and "
        f"SentencePiece's BPE can be written; {_WAY_OUT}"
    )


def _type_of(added: AddedToken | None) -> int:
    if added is None:
        return NORMAL
    return CONTROL if added.special else USER_DEFINED


def _byte_level(tokenizer_json: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Merges, and llama.cpp's name of the pre-tokenizer. Raises ModelError for one that it does not have."""
    steps: dict[str, Any] = tokenizer_json.get("pre_tokenizer") or {}
    parts: list[dict[str, Any]] = steps.get("pretokenizers") or [steps]
    normalizer = (tokenizer_json.get("normalizer") or {}).get("type")
    name = name_of(parts, normalizer, ignore_merges=bool(model.get("ignore_merges")))
    if name is None:
        raise ModelError(
            "its tokenizer splits text in a way that llama.cpp has no name for, so it would give other tokens there; "
            "those of GPT-2, Llama 3, Qwen 2, SmolLM and Mistral's Tekken are supported"
        )
    merges = _merges(model)
    spaced = next((pair for pair in merges if any(" " in part for part in pair)), None)
    if spaced is not None:
        raise ModelError(f"its tokenizer has the merge {spaced!r:.80}, and GGUF divides both tokens by a space")
    return {"ggml.model": "gpt2", "ggml.pre": name, "ggml.merges": [" ".join(pair) for pair in merges]}


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json, which has each as a pair or as a text with a space between."""
    found: list[tuple[str, str]] = []
    for merge in model.get("merges") or ():
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        found.append((left, right))
    return found


def _spaces(tokenizer_json: Mapping[str, Any]) -> bool | None:
    """Whether a SentencePiece tokenizer puts a space before a text; None for one that treats spaces in another way."""
    normalizer, splits = tokenizer_json.get("normalizer"), tokenizer_json.get("pre_tokenizer")
    if normalizer is None and splits is not None and splits.get("type") == "Metaspace":
        scheme = splits.get("prepend_scheme", "always")
        plain = splits.get("replacement") == SPACE and splits.get("split") is False
        return {"always": True, "never": False}.get(scheme) if plain else None
    steps = (normalizer or {}).get("normalizers") or [normalizer]
    if splits not in (None, _NEVER_SPLITS):
        return None
    return True if steps == _PREFIXED else False if steps == _PREFIXED[1:] else None


def _sentencepiece(
    folder: Path, tokenizer_json: Mapping[str, Any], model: Mapping[str, Any], tokens: list[str], types: list[int],
    added: Mapping[int, AddedToken],
) -> dict[str, Any]:  # fmt: skip
    """Scores, tokens and types as llama.cpp has them. Raises ModelError where it would join or split a text otherwise."""
    spaces = _spaces(tokenizer_json)
    if spaces is None or model.get("ignore_merges"):
        raise ModelError(
            f"{folder}: its SentencePiece tokenizer does not treat spaces as llama.cpp does, which replaces each by '{SPACE}' "
            f"and puts one before a text, or none; {_WAY_OUT}"
        )
    if not model.get("byte_fallback"):
        raise ModelError(
            f"{folder}: its SentencePiece tokenizer takes its unknown token for a character that it does not have, and "
            f"llama.cpp takes the tokens of its bytes; {_WAY_OUT}"
        )
    unknown = model.get("unk_token")
    for i, token in enumerate(tokens):
        if types[i] == NORMAL and _BYTE_TOKEN.fullmatch(token):
            types[i] = BYTE
        elif token == unknown:
            types[i] = UNKNOWN
    normalized = {i for i, kind in enumerate(types) if kind == USER_DEFINED and added[i].normalized}
    found_first = {  # in a text, by both, before anything is joined
        token for i, token in enumerate(tokens)
        if types[i] == CONTROL or (types[i] == USER_DEFINED and (i in normalized or SPACE not in token))
    }  # fmt: skip
    return {
        "ggml.model": "llama", "ggml.pre": "default", "ggml.token_type": types,
        # what is looked for in a normalized text there is looked for in the plain one here
        "ggml.tokens": [t.replace(SPACE, " ") if i in normalized else t for i, t in enumerate(tokens)],
        "ggml.scores": _scores(folder, tokens, found_first, _merges(model)), "ggml.add_space_prefix": spaces,
    }  # fmt: skip


def _scores(
    folder: Path, tokens: Sequence[str], found_first: Set[str], merges: Sequence[tuple[str, str]]
) -> list[float]:
    """A score for each token, so that llama.cpp joins what the merges join, in their order.

    A merge makes one token. llama.cpp joins any two neighbours that make a token, the one with the best score first. Both are
    the same where the merges of one token stand together, and are all ways to make it of two tokens: as in every tokenizer.json
    that was converted from a SentencePiece model. Raises ModelError otherwise. Tokens that are `found_first` are never joined.
    """
    order, ways = dict[str, int](), Counter[str]()
    last = ""
    for left, right in merges:
        joined = left + right
        if joined in found_first:
            continue
        if joined != last and joined in order:
            raise _no_scores(folder, f"it makes {joined!r} at two places of its order")
        order.setdefault(joined, len(order))
        ways[joined] += 1
        last = joined
    known = set(tokens)
    for token in (token for token in tokens if token not in found_first):
        pairs = sum(token[:cut] in known and token[cut:] in known for cut in range(1, len(token)))
        if ways[token] != pairs:
            raise _no_scores(folder, f"it makes {token!r} of {ways[token]} of the {pairs} pairs of tokens that give it")
    return [-1000.0 if token in found_first else float(-order.get(token, 0)) for token in tokens]


def _no_scores(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"{folder}: the merges of its SentencePiece tokenizer follow from no scores, which are what GGUF holds: {why}; "
        f"{_WAY_OUT}"
    )


# ---- checks ----------------------------------------------------------------------------------------------------------


def _padded(folder: Path, values: dict[str, Any], size: int) -> dict[str, Any]:
    """The values with as many tokens as the embedding has rows, each text once, which llama.cpp asks for."""
    tokens, types = list(values["ggml.tokens"]), list(values.get("ggml.token_type", ()))
    if len(tokens) > size:
        raise ModelError(f"{folder}: its tokenizer has token {len(tokens) - 1}, and its embedding {size} rows")
    known = set(tokens)
    for i in range(size):
        if i < len(tokens) and tokens[i]:
            continue
        name = f"[PAD{i}]"
        while name in known:
            name = f"[{name}]"
        known.add(name)
        tokens[i : i + 1] = [name]
    if types:
        types += [UNUSED] * (size - len(types))
    found = {**values, "ggml.tokens": tokens, **({"ggml.token_type": types} if types else {})}
    if "ggml.scores" in values:
        found["ggml.scores"] = [*values["ggml.scores"], *[0.0] * (size - len(values["ggml.scores"]))]
    return found


def _check_loads(folder: Path, values: Mapping[str, Any]) -> None:
    """Raise ModelError for values that llama.cpp refuses, or that end it later."""
    tokens: list[str] = values["ggml.tokens"]
    twice = next((token for token, count in Counter(tokens).items() if count > 1), None)
    if twice is not None:
        raise ModelError(f"{folder}: its tokenizer has token '{twice}' twice, which llama.cpp refuses; {_WAY_OUT}")
    if values["ggml.model"] == "gpt2" and not values.get("ggml.merges"):
        raise ModelError(
            f"{folder}: its tokenizer has no merges, and llama.cpp refuses byte-level BPE without; take a base whose tokenizer "
            "has some"
        )
    if values["ggml.model"] == "llama":
        missing = sorted({f"<0x{byte:02X}>" for byte in range(256)} - set(tokens))
        if missing:
            raise ModelError(
                f"{folder}: its SentencePiece tokenizer has no token {missing[0]}, and llama.cpp ends at a text that needs it; "
                f"{_WAY_OUT}"
            )
    for name in ("bos", "eos"):
        if values.get(f"ggml.add_{name}_token") and f"ggml.{name}_token_id" not in values:
            raise ModelError(f"{folder}: its tokenizer adds a {name} token that it does not name; repair its files")


def _check_tokens(folder: Path, tokenizer: Any, values: Mapping[str, Any]) -> None:
    """Raise ModelError where the values, read back as a GGUF file's, give other tokens than the folder's tokenizer."""
    metadata = {"general.architecture": "llama", **{f"tokenizer.{key}": value for key, value in values.items()}}
    again = Tokenizer.from_str(json.dumps(tokenizer_of(GgufFile(folder, metadata, {}))[0]))
    types = values["ggml.token_type"]
    beside = [values["ggml.eos_token_id"], *(i for i, kind in enumerate(types) if kind == USER_DEFINED)][:_MOST_BESIDE]
    around = [f"a {values['ggml.tokens'][i]}b" for i in beside]
    for text in (*_TEXTS, "\n".join(_TEXTS), *around):
        ours, theirs = tokenizer(text)["input_ids"], again.encode(text).ids
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            raise ModelError(
                f"{folder}: as GGUF its tokenizer would split {text[:40]!r} otherwise: token {at} is {theirs[at : at + 3]}, "
                f"and here {ours[at : at + 3]}; {_WAY_OUT}"
            )
