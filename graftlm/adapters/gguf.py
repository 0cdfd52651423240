"""A plain model folder as one GGUF file, for llama.cpp and Ollama: weights, tokenizer, chat template, stop tokens.

The names, keys and layouts are those that llama.cpp's own converter writes, by the `gguf` package's tables:

    llama, mistral     rows of q and k reordered, head by head: its rotation pairs neighbours, transformers' pairs halves
    gemma              norms hold w + 1, which is what they multiply with
    1-D tensors        float32; matrices in the asked type, in f16 where a row does not fill blocks of 32 in q8_0

llama.cpp knows pre-tokenizers by name and splits text by its own code for each, so a tokenizer is written only where its
pattern is one of those; any other would be split in another way and nobody would be told. What is written is read back
and compared tensor by tensor before the file gets its name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from graftlm.base.chat import Encoder
from graftlm.base.checkpoint_layout import Checkpoint
from graftlm.base.loading import load_config, load_tokenizer
from graftlm.errors import ModelError
from graftlm.jsonfile import MOST_TOKENIZER_BYTES, read_json
from graftlm.progress import working

Array = NDArray[Any]

# transformers' model type -> the architecture's name in the gguf package
_ARCHITECTURES = {
    "llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma": "GEMMA", "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
}  # fmt: skip
_INTERLEAVED = ("llama", "mistral")
_TYPES = {"f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7)}  # kind, general.file_type

# Patterns by which byte-level BPE tokenizers split, as they stand in tokenizer.json -> llama.cpp's name
_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+":
        "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+":
        "qwen2",
}  # fmt: skip
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5


def check_gguf(folder: Path) -> None:
    """Raise ModelError where a model's architecture or tokenizer cannot be written, or nothing can; reads no weight."""
    _package()
    config = load_config(folder, False)
    _architecture(config)
    _check_numbers(config)
    _read_vocab(folder, int(config.vocab_size))


def write_gguf(folder: Path, file: Path, kind: str) -> dict[str, Any]:
    """Write a model folder as `file`, its matrices as `kind` (f32, f16, bf16, q8_0); returns what was written.

    Raises ModelError for an architecture, a tokenizer or a tensor that the format has no place for, and OSError.
    """
    gguf = _package()
    config = load_config(folder, False)
    architecture = _architecture(config)
    _check_numbers(config)
    vocab = _read_vocab(folder, int(config.vocab_size))
    checkpoint = Checkpoint(folder)
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture), int(config.num_hidden_layers))
    name = gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, architecture)]
    places: dict[str, str] = {}
    for tensor in checkpoint.tensors:
        if tensor == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding
        place = table.get_name(tensor, (".weight", ".bias"))
        if place is None:
            raise ModelError(f"{folder}: GGUF has no place for tensor '{tensor}' of a {config.model_type} model")
        places[tensor] = place

    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer = gguf.GGUFWriter(str(temporary), name)
        _describe(writer, gguf, config, folder.name, kind)
        _write_vocab(writer, vocab)
        extra = _rope_factors(config)
        if extra is not None:
            writer.add_tensor_info("rope_freqs.weight", extra.shape, extra.dtype, extra.nbytes)
        for tensor, place in places.items():
            shape = checkpoint.tensors[tensor].shape
            quant = _type_of(gguf, kind, shape)
            data_shape = gguf.quants.quant_shape_to_byte_shape(shape, quant) if quant.name == "Q8_0" else shape
            if quant.name == "BF16":
                data_shape = (*shape[:-1], shape[-1] * 2)
            dtype = {"F32": np.float32, "F16": np.float16}.get(quant.name, np.uint8)
            nbytes = math.prod(data_shape) * np.dtype(dtype).itemsize
            writer.add_tensor_info(place, data_shape, np.dtype(dtype), nbytes, raw_dtype=quant)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if extra is not None:
            writer.write_tensor_data(extra)
        with working(f"writing {file.name}", len(places), "tensors") as task:
            for tensor in places:
                writer.write_tensor_data(_encoded(gguf, _value(checkpoint, config, tensor), kind))
                task.to(task.done + 1)
        writer.close()
        with working(f"checking {file.name}"):
            count = _read_back(gguf, temporary, checkpoint, config, places, kind, vocab)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    modelfile = file.with_suffix(".Modelfile")
    stops = "".join(f"PARAMETER stop {json.dumps(vocab.tokens[i])}\n" for i in vocab.stop)
    modelfile.write_text(f"FROM ./{file.name}\n{stops}", encoding="utf-8")
    return {
        "file": str(file), "modelfile": str(modelfile), "bytes": file.stat().st_size, "architecture": name, "type": kind,
        "tensors": count, "vocabulary": len(vocab.tokens), "pre_tokenizer": vocab.pre,
    }  # fmt: skip


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ModelError("writing GGUF needs the package gguf: pip install 'graftlm[gguf]'") from None
    return gguf


def _architecture(config: Any) -> str:
    found = _ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"GGUF is written for {', '.join(_ARCHITECTURES)}, and this is a {config.model_type}; write the plain folder and "
            "convert it with llama.cpp's own converter"
        )
    return found


# ---- what the header says --------------------------------------------------------------------------------------------


def _rope(config: Any) -> dict[str, Any]:
    """The rotation's parameters; of several kinds of layers those of full attention."""
    given: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return given.get("full_attention", given)


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_numbers(config: Any) -> None:
    """Raise ModelError for a number of the config that llama.cpp would compute otherwise, since it has it in its code."""
    kind = _rope(config).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(
            f"its rotary frequencies are of type '{kind}', which is not written to GGUF; take llama.cpp's converter"
        )
    if getattr(config, "attention_bias", False) and config.model_type in ("gemma", "gemma2", "gemma3_text"):
        raise ModelError(f"a {config.model_type} with biases in attention has no place in GGUF")
    if config.model_type in ("gemma2", "gemma3_text"):
        wide = {"gemma2": 46, "gemma3_text": 62}[config.model_type]
        heads = config.hidden_size / config.num_attention_heads
        expected = heads if config.num_hidden_layers == wide else _head_width(config)
        if config.query_pre_attn_scalar != expected:
            raise ModelError(
                f"its attention is scaled by {config.query_pre_attn_scalar}, and llama.cpp scales this architecture by "
                f"{expected:g}"
            )
        period = 2 if config.model_type == "gemma2" else 6
        pattern = [
            "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != pattern:
            raise ModelError(
                f"its layers do not take full attention every {period}th time, as llama.cpp has it for this architecture"
            )
    if config.model_type == "gemma3_text":
        local = (
            (getattr(config, "rope_parameters", None) or {}).get("sliding_attention", {}).get("rope_theta", 10_000.0)
        )
        if local != 10_000.0:
            raise ModelError(f"its local layers rotate with base {local:g}, and llama.cpp does with 10000")
    if getattr(config, "use_sliding_window", False):
        raise ModelError(
            "it uses a sliding window (use_sliding_window), which llama.cpp does not for this architecture"
        )


def _describe(writer: Any, gguf: Any, config: Any, name: str, kind: str) -> None:
    writer.add_name(name)
    writer.add_file_type(_TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    window = getattr(config, "sliding_window", None)
    length = int(config.max_position_embeddings)
    if config.model_type == "mistral" and window:  # it has no window there: within this length there is no difference
        length = min(length, int(window))
    writer.add_context_length(length)
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(int(config.num_attention_heads))
    writer.add_head_count_kv(int(config.num_key_value_heads))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_key_length(_head_width(config))
    writer.add_value_length(_head_width(config))
    writer.add_vocab_size(int(config.vocab_size))
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    if config.model_type in _INTERLEAVED:
        writer.add_rope_dimension_count(_head_width(config))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if config.model_type in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(int(window or 0))
        for attribute, add in (
            ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
            ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ):
            if getattr(config, attribute, None):
                add(float(getattr(config, attribute)))


def _rope_factors(config: Any) -> Array | None:
    """Llama 3's scaling as llama.cpp wants it: by how much each frequency is divided, (head width / 2,)."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    width, base = _head_width(config), float(rope["rope_theta"])
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    old = float(rope["original_max_position_embeddings"])
    frequencies = 1.0 / base ** (np.arange(0, width, 2, dtype=np.float64) / width)
    wavelengths = 2 * math.pi / frequencies
    smooth = (old / wavelengths - low) / (high - low)
    found = np.where(wavelengths > old / low, factor, 1 / ((1 - smooth) / factor + smooth))
    return np.where(wavelengths < old / high, 1.0, found).astype(np.float32)


# ---- tokenizer -------------------------------------------------------------------------------------------------------


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


def _read_vocab(folder: Path, size: int) -> GgufTokenizer:
    """The folder's tokenizer. Raises ModelError for one that llama.cpp would not split text with in the same way."""
    tokenizer: Any = load_tokenizer(folder)
    told = (
        read_json(folder / "tokenizer.json", ModelError, most=MOST_TOKENIZER_BYTES)
        if (folder / "tokenizer.json").is_file()
        else {}
    )
    model: dict[str, Any] = told.get("model") or {}
    pre = _pre_tokenizer(told, model)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = {int(t["id"]): t for t in told.get("added_tokens") or ()}
    last = max(vocabulary.values())
    if last >= size:
        raise ModelError(f"{folder}: its tokenizer has token {last}, and its embedding {size} rows")
    by_id = {i: token for token, i in vocabulary.items()}
    tokens, types = list[str](), list[int]()
    for i in range(size):
        tokens.append(by_id.get(i, f"[PAD{i}]"))
        if i not in by_id:
            types.append(_UNUSED)
        elif i in added:
            types.append(_CONTROL if added[i].get("special") else _USER)
        else:
            types.append(_NORMAL)
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


def _pre_tokenizer(told: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits text. Raises ModelError for one that it has no name for."""
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece-like BPE" if model.get("byte_fallback") else model.get("type") or "unknown"
        raise ModelError(
            f"its tokenizer is {kind}, and only byte-level BPE is written to GGUF; convert the plain folder with llama.cpp's "
            "own converter"
        )
    steps = told.get("pre_tokenizer") or {}
    parts: list[dict[str, Any]] = steps.get("pretokenizers") or [steps]
    kinds = [str(p.get("type")) for p in parts]
    whole = parts[-1]
    ready = kinds[-1] == "ByteLevel" and not whole.get("add_prefix_space")
    normal = (told.get("normalizer") or {}).get("type")
    merging = bool(model.get("ignore_merges"))
    name = None
    if ready and kinds == ["ByteLevel"] and whole.get("use_regex", True):
        name = "gpt-2"
    elif (
        ready
        and kinds == ["Digits", "ByteLevel"]
        and parts[0].get("individual_digits")
        and whole.get("use_regex", True)
    ):
        name = "smollm"
    elif ready and kinds == ["Split", "ByteLevel"] and parts[0].get("behavior") == "Isolated":
        name = _PATTERNS.get((parts[0].get("pattern") or {}).get("Regex", ""))
    fits = normal is None or (normal == "NFC" and name == "qwen2")
    if name is None or not fits or merging != (name == "llama-bpe"):
        raise ModelError(
            "its tokenizer splits text in a way that llama.cpp has no name for, so it would read other tokens there; "
            "GPT-2's, Llama 3's, Qwen 2's and SmolLM's are known"
        )
    return name


def _write_vocab(writer: Any, vocab: GgufTokenizer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    writer.add_token_merges(vocab.merges)
    for name, token in vocab.special.items():
        getattr(writer, f"add_{name}_token_id")(token)
    turn = [i for i in vocab.stop if i != vocab.special.get("eos")]
    if turn:  # an answer ends with another token than a text
        writer.add_eot_token_id(turn[0])
    writer.add_add_bos_token(vocab.adds_bos)
    if vocab.template is not None:
        writer.add_chat_template(vocab.template)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _value(checkpoint: Checkpoint, config: Any, name: str) -> Array:
    """A tensor in float32 and in GGUF's layout."""
    tensor = checkpoint.read(name).float()
    if config.model_type in _INTERLEAVED and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        tensor = interleaved(tensor, int(heads))
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        tensor = tensor + 1
    return tensor.contiguous().numpy()


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head reordered from (first half, second half) to neighbours: row j and row j + D/2 become 2j and 2j + 1."""
    halves = tensor.view(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _type_of(gguf: Any, kind: str, shape: tuple[int, ...]) -> Any:
    """The type that a tensor of this shape is written in."""
    types = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    if kind == "q8_0" and shape[-1] % 32:
        return types.F16
    return getattr(types, _TYPES[kind][0])


def _encoded(gguf: Any, values: Array, kind: str) -> Array:
    return gguf.quants.quantize(values, _type_of(gguf, kind, values.shape))


def _read_back(
    gguf: Any,
    file: Path,
    checkpoint: Checkpoint,
    config: Any,
    places: Mapping[str, str],
    kind: str,
    vocab: GgufTokenizer,
) -> int:
    """Read the file with the package's reader and hold every tensor and the tokenizer against what was meant."""
    reader = gguf.GGUFReader(str(file))
    found = {t.name: t for t in reader.tensors}
    for name, place in places.items():
        tensor = found.get(place)
        wanted = _value(checkpoint, config, name)
        encoded = _encoded(gguf, wanted, kind)
        if tensor is None or np.asarray(tensor.data).tobytes() != np.ascontiguousarray(encoded).tobytes():
            raise ModelError(f"{place} is not in {file.name} as it was written; the file was removed")
    tokens = [
        bytes(reader.fields["tokenizer.ggml.tokens"].parts[i]).decode()
        for i in reader.fields["tokenizer.ggml.tokens"].data
    ]
    if tokens != vocab.tokens:
        raise ModelError(f"the tokens are not in {file.name} as they were written; the file was removed")
    return len(found)


__all__ = ["check_gguf", "interleaved", "write_gguf"]
