"""Tiny models of every architecture that is written to GGUF, with tokenizers that llama.cpp takes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import tiny_run
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = tiny_run.VOCABULARY + 1
SIX = ["sliding_attention"] * 5 + ["full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"vocab_size": WORDS + 1},  # transformers adds a token of its own to this tokenizer
    "qwen3": {"head_dim": 128},  # transformers' reader does not read another
    "gemma2": {"num_hidden_layers": 2, "query_pre_attn_scalar": 10},
    "gemma3": {"num_hidden_layers": 6, "query_pre_attn_scalar": 10, "layer_types": SIX},
}
PIECES = ["he", "th", "lo", "▁w", "the", "hel", "▁the", "hello", "or", "▁wor", "▁world", "▁▁", "12", "23", "34"]


def merging_tokenizer(special: tuple[str, ...] = tiny_run.SPECIAL) -> PreTrainedTokenizerFast:
    """One token a byte, and one of two: llama.cpp refuses a BPE vocabulary without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet, "th"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special[0], bos_token="<s>", eos_token="</s>")


def sentencepiece_tokenizer(*, prefix: bool) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE as Llama 2 (`prefix`: a space before a text) and Gemma have it, and one token of a user."""
    characters = sorted({character for piece in PIECES for character in piece})
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokens += [*(f"<0x{byte:02X}>" for byte in range(256)), *characters, *PIECES, "<tag>"]
    known = set(tokens)
    merges = [
        (piece[:cut], piece[cut:])
        for piece in PIECES
        for cut in range(1, len(piece))
        if {piece[:cut], piece[cut:]} <= known
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", "\u2581")
    prepended = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
    backend.normalizer = prepended if prefix else replace  # pyright: ignore
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)  # pyright: ignore
    backend.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", 2)])  # pyright: ignore
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )  # fmt: skip
    found.add_tokens([AddedToken("<tag>", normalized=False)])  # pyright: ignore[reportArgumentType]
    return found


def folder(place: Path, architecture: str, tokenizer: PreTrainedTokenizerFast | None = None, **changes: Any) -> Path:
    """A tiny model with a tokenizer, which is one of bytes unless another is given."""
    tokenizer = tokenizer or merging_tokenizer()
    model = tiny.random_model(architecture, **{"vocab_size": len(tokenizer), **changes})
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def changed(file: Path, out: Path, values: Mapping[str, Any]) -> Path:
    """A GGUF file with other metadata: None takes a key away."""
    import gguf

    reader = gguf.GGUFReader(str(file))
    kinds = gguf.GGUFValueType
    writer = gguf.GGUFWriter(str(out), reader.fields["general.architecture"].contents())
    fields = {n: f for n, f in reader.fields.items() if not n.startswith(("GGUF.", "general.architecture"))}
    for name, field in fields.items():
        if name not in values:
            inner = field.types[-1] if field.types[0] == kinds.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for name, value in values.items():
        if value is None:
            continue
        before = fields[name].types if name in fields else []
        kind = kinds.get_type(value)
        if before and before[0] == kinds.ARRAY and kind == kinds.ARRAY:
            writer.add_key_value(name, value, kinds.ARRAY, before[-1])
        elif before and kind == kinds.INT32 and value >= 0 and before[0] in (kinds.UINT32, kinds.UINT64):
            writer.add_key_value(name, value, before[0])
        else:
            writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


TEXTS = (
    "hello the world", "  the  hello", "the\n\n 12 3 worlds", "中é🙂", "a <tag>b<start_of_turn>the<end_of_turn>", "", " ",
    *map("".join, itertools.islice(itertools.permutations(["he", "l", "lo", " w", "or"]), 0, 120, 13)),
)  # fmt: skip
