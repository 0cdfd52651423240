"""A tokenizer from a GGUF file, as a Hugging Face `tokenizer.json` has it; and llama.cpp's names of pre-tokenizers.

    tokenizer.ggml.model "gpt2"     byte-level BPE: merges are in the file, the pre-tokenizer is named (`tokenizer.ggml.pre`)
    tokenizer.ggml.model "llama"    SentencePiece BPE: merges follow from the tokens' scores

llama.cpp has the pattern of each pre-tokenizer in its code, and the file only its name. `PRE_TOKENIZERS` has those that are
known here; with any other a text would become other tokens without a warning, so it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.errors import ModelError
from graftlm.gguf.config import special_tokens
from graftlm.gguf.header import GgufFile

MAX_TOKEN_LENGTH = 1024
"""Characters of one token: runs of spaces and dashes reach 256."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""`tokenizer.ggml.token_type`."""
SPACE = "▁"


@dataclass(frozen=True)
class PreTokenizer:
    """How byte-level BPE splits a text before it merges, in tokenizer.json's words."""

    steps: tuple[dict[str, Any], ...]
    normalizer: str | None = None
    ignore_merges: bool = False
    adds_bos: bool = False
    """Whether a text begins with the first token where the file does not say (`tokenizer.ggml.add_bos_token`)."""


def _byte_level(*, pattern: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern}


def _split(pattern: str) -> tuple[dict[str, Any], ...]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return step, _byte_level(pattern=False)


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_THREE_DIGITS = _split(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}")
_ONE_DIGIT = _split(rf"{_WORDS}|\p{{N}}|{_REST}")


def _known(names: str, pre: PreTokenizer) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), pre)


PRE_TOKENIZERS = {
    **_known(
        "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert exaone4 mpt olmo jais trillion "
        "granite-docling",
        PreTokenizer((_byte_level(pattern=True),)),
    ),
    **_known(
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        PreTokenizer(({"type": "Digits", "individual_digits": True}, _byte_level(pattern=True))),
    ),
    **_known(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizer(_THREE_DIGITS, ignore_merges=True, adds_bos=True),
    ),
    **_known("smaug-bpe dbrx chatglm-bpe glm4", PreTokenizer(_THREE_DIGITS)),
    "qwen2": PreTokenizer(_ONE_DIGIT, normalizer="NFC"),
    **_known("deepseek-r1-qwen megrez kormo f2llmv2 stablelm2 hunyuan solar-open", PreTokenizer(_ONE_DIGIT)),
    "tekken": PreTokenizer(
        _split(rf"{_CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
        ignore_merges=True,
        adds_bos=True,
    ),
}
"""llama.cpp's name -> what it stands for; of several names for one the first is written.

Names that llama.cpp maps to one pattern stand together (`llama_vocab::impl::load` in `src/llama-vocab.cpp`). It has more, for
patterns that no model of the architectures in `layout.py` needs or that are no single one: `default`, `deepseek-llm`,
`deepseek-coder`, `falcon`, `gpt-4o` and others are refused.
"""


def name_of(steps: Sequence[Mapping[str, Any]], normalizer: str | None, *, ignore_merges: bool) -> str | None:
    """llama.cpp's name of how a byte-level BPE tokenizer splits text, from its `tokenizer.json`; None where it has none.

    A byte-level tokenizer may come without the normalizer of the named one: llama.cpp has none.
    """
    for name, known in PRE_TOKENIZERS.items():
        same = len(steps) == len(known.steps) and all(_same(a, b) for a, b in zip(steps, known.steps))
        if same and normalizer in (None, known.normalizer) and ignore_merges == known.ignore_merges:
            return name
    return None


def _same(found: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether a step splits as a known one; what it leaves out has its default. Offsets do not change tokens."""
    defaults = {"add_prefix_space": False, "use_regex": True, "invert": False}
    return all({**defaults, **found}.get(key) == value for key, value in known.items() if key != "trim_offsets")


def tokenizer_of(file: GgufFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json) of the tokenizer in a GGUF file, as values.

    Raises ModelError for a file without one, a kind or a pre-tokenizer that is not read, and lists that do not fit together.
    """
    found = _Vocabulary(file)
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        values = _byte_level_bpe(found)
    elif kind == "llama":
        values = _sentencepiece_bpe(found)
    else:
        raise ModelError(
            f"{file.path} has a tokenizer of kind '{kind}', and gpt2 (byte-level BPE) and llama (SentencePiece) are read; take "
            "the model's Hugging Face folder"
        )
    values["version"] = "1.0"
    values["truncation"] = values["padding"] = None
    values["added_tokens"] = found.added()
    pre = PRE_TOKENIZERS.get(found.pre)
    adds_bos = kind == "llama" or (pre is not None and pre.adds_bos)
    values["post_processor"] = found.post_processor(adds_bos=adds_bos)
    return values, found.settings()


class _Vocabulary:
    """The lists of a file's tokenizer, checked against each other."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.tokens: list[str] = self._list("tokens", str)
        self.special = special_tokens(file)
        rows = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else len(self.tokens)
        if len(self.tokens) > rows:
            raise ModelError(f"{file.path} has {len(self.tokens):,} tokens, and its embedding {rows:,} rows")
        self.types: list[int] = self._list("token_type", int) or [NORMAL] * len(self.tokens)
        self.scores: list[float] = self._list("scores", float)
        for name, values in (("token_type", self.types), ("scores", self.scores)):
            if values and len(values) != len(self.tokens):
                raise ModelError(
                    f"{file.path}: tokenizer.ggml.{name} has {len(values):,} values for {len(self.tokens):,} tokens"
                )
        longest = max(map(len, self.tokens))
        if longest > MAX_TOKEN_LENGTH:
            raise ModelError(
                f"{file.path} has a token of {longest:,} characters, and at most {MAX_TOKEN_LENGTH:,} are read"
            )
        self.ids: dict[str, int] = {}
        for i, token in enumerate(self.tokens):
            self.ids.setdefault(token, i)
        self.pre = str(file.metadata.get("tokenizer.ggml.pre", "default"))

    def _list(self, name: str, kind: type) -> list[Any]:
        found = self.file.metadata.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(found, list) or not all(isinstance(value, kind) for value in found):
            raise ModelError(f"{self.file.path}: tokenizer.ggml.{name} is no list of {kind.__name__} values")
        return found

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.file.metadata.get(f"tokenizer.ggml.{name}", default))

    def added(self) -> list[dict[str, Any]]:
        """The tokens that are found in a text before it is normalized and split, as llama.cpp finds them. A user's own are no
        special tokens: they are shown."""
        return [
            {
                "id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": self.types[i] != USER_DEFINED,
            }
            for i, token in enumerate(self.tokens)
            if token and self.types[i] in (CONTROL, USER_DEFINED, UNKNOWN) and self.ids[token] == i
        ]  # fmt: skip

    def post_processor(self, *, adds_bos: bool) -> dict[str, Any] | None:
        """Puts the first and the last token to a text, where the file says so; `adds_bos` where it says nothing."""
        first = self.special.get("bos") if self.flag("add_bos_token", adds_bos) else None
        last = self.special.get("eos") if self.flag("add_eos_token", False) else None
        if first is None and last is None:
            return None

        def pieces(number: int) -> list[dict[str, Any]]:
            own = [{"Sequence": {"id": "AB"[number], "type_id": number}}]
            before = [] if first is None else [{"SpecialToken": {"id": self.tokens[first], "type_id": number}}]
            behind = [] if last is None else [{"SpecialToken": {"id": self.tokens[last], "type_id": number}}]
            return [*before, *own, *behind]

        used = [token for token in (first, last) if token is not None]
        return {
            "type": "TemplateProcessing",
            "single": pieces(0),
            "pair": [*pieces(0), *pieces(1)],
            "special_tokens": {
                self.tokens[i]: {"id": self.tokens[i], "ids": [i], "tokens": [self.tokens[i]]} for i in used
            },
        }

    def settings(self) -> dict[str, Any]:
        """tokenizer_config.json: the named tokens, the chat template, the longest text."""
        template = self.file.metadata.get("tokenizer.chat_template")
        length = self.file.metadata.get(f"{self.file.architecture}.context_length")
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": self.tokens[i] for name, i in self.special.items()},
            **({"model_max_length": length} if isinstance(length, int) else {}),
            **({"chat_template": template} if isinstance(template, str) else {}),
        }


def _byte_level_bpe(found: _Vocabulary) -> dict[str, Any]:
    pre = PRE_TOKENIZERS.get(found.pre)
    if pre is None:
        raise ModelError(
            f"{found.file.path} splits text as '{found.pre}' (tokenizer.ggml.pre), and {', '.join(PRE_TOKENIZERS)} are known; "
            "with another pattern a text would be other tokens. Take the model's Hugging Face folder"
        )
    merges: list[list[str]] = []
    for merge in found._list("merges", str):  # pyright: ignore[reportPrivateUsage]
        left, space, right = merge.partition(" ")
        if not space or left not in found.ids or right not in found.ids or left + right not in found.ids:
            raise ModelError(
                f"{found.file.path}: merge '{merge[:60]}' of its tokenizer does not give one of its tokens"
            )
        merges.append([left, right])
    return {
        "normalizer": None if pre.normalizer is None else {"type": pre.normalizer},
        "pre_tokenizer": pre.steps[0]
        if len(pre.steps) == 1
        else {"type": "Sequence", "pretokenizers": list(pre.steps)},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(found, merges, ignore_merges=pre.ignore_merges),
    }


def _sentencepiece_bpe(found: _Vocabulary) -> dict[str, Any]:
    if not found.scores:
        raise ModelError(f"{found.file.path}: its SentencePiece tokenizer has no scores (tokenizer.ggml.scores)")
    prefix = found.flag("add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = _bpe(found, _merges_by_score(found), byte_fallback=True, fuse_unk=True)
    if "unk" in found.special:
        model["unk_token"] = found.tokens[found.special["unk"]]
    return {
        "normalizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _merges_by_score(found: _Vocabulary) -> list[list[str]]:
    """The merges that SentencePiece makes: every way to join two tokens into a third, that of the best score first.

    Of two with one score the one whose parts have lower ids comes first, as in transformers' conversion.
    """
    ids, ranked = found.ids, list[tuple[float, int, int, str, str]]()
    for token, i in ids.items():
        if found.types[i] not in (NORMAL, USER_DEFINED):
            continue
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-found.scores[i], left, right, token[:cut], token[cut:]))
    ranked.sort(key=lambda merge: merge[:3])
    return [[left, right] for *_, left, right in ranked]


def _bpe(found: _Vocabulary, merges: list[list[str]], **options: bool) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **options, "vocab": found.ids, "merges": merges,
    }  # fmt: skip
