"""Write a plain model folder as one GGUF file for llama.cpp and Ollama: weights, tokenizer, chat template, stop tokens.

Names, keys and layouts are those of llama.cpp's own converter, from the `gguf` package's tables:

    llama, mistral     rows of q and k reordered in each head: llama.cpp rotates neighbours, transformers rotates halves
    gemma              norms store w + 1, the factor that they multiply with
    1-D tensors        float32; matrices in the requested type, or f16 if q8_0 and a row is not a multiple of 32

Tokenizer, chat template and stop tokens are in `gguf_tokenizer.py`. What llama.cpp has in its code for an architecture, and a
file cannot say, is in `_FIXED`: a model that differs there is refused. The file is read back and compared tensor by tensor
before it gets its name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftlm.adapters.gguf_tokenizer import GgufTokenizer, read_vocab, write_vocab
from graftlm.base.checkpoint_layout import Checkpoint
from graftlm.base.loading import load_config
from graftlm.errors import ModelError
from graftlm.files import flush
from graftlm.gguf.config import LOCAL_ROPE_THETA, llama3_divisors
from graftlm.gguf.header import read_gguf
from graftlm.gguf.layout import ROPE_FREQS, WRITTEN_AS, GgufLayout, layout_for
from graftlm.progress import working

Array = NDArray[Any]

_CONVERTER = "write the plain folder and convert it with llama.cpp's own converter"
_SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_TYPES = {"f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7)}  # kind, general.file_type


@dataclass(frozen=True)
class _Fixed:
    """What llama.cpp has in its code for an architecture (`src/models/` there)."""

    activations: tuple[str, ...] = ("silu", "swish")
    rope: tuple[str, ...] = ("default", "linear")
    attention_bias: bool = True
    """Whether it reads the biases that `attention_bias` gives a model."""
    untied_head: bool = True
    """Whether it reads a head of its own; otherwise it takes the embedding, whatever the file holds."""
    full_every: int = 0
    """Which layers have full attention; the others have a window. 0: all."""
    soft_caps: bool = False
    """Whether it caps the scores of attention and the logits; otherwise it caps neither."""


_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_FIXED = {
    "llama": _Fixed(rope=("default", "linear", "llama3")),
    "qwen2": _Fixed(),
    "qwen3": _Fixed(attention_bias=False),
    "gemma": _Fixed(_GELU, attention_bias=False, untied_head=False),
    "gemma2": _Fixed(_GELU, attention_bias=False, untied_head=False, full_every=2, soft_caps=True),
    "gemma3": _Fixed(_GELU, attention_bias=False, full_every=6),
}


def check_gguf(folder: Path, tokenizer: Path | None = None, *, unties: bool = False) -> None:
    """Raise ModelError if GGUF cannot be written for a model's architecture or tokenizer; reads no weights.

    `tokenizer`: the folder of the tokenizer, if it is not the model's own. `unties`: the head becomes a tensor of its own.
    """
    gguf_package()
    config = load_config(folder, False)
    layout_for(config, ModelError, _CONVERTER)
    _check_numbers(config, unties)
    read_vocab(tokenizer or folder, int(config.vocab_size), folder)


def write_gguf(folder: Path, file: Path, kind: str, base: Path | None = None) -> dict[str, Any]:
    """Write a model folder as `file`, its matrices as `kind` (f32, f16, bf16, q8_0); returns what was written.

    `base`: the folder of the model that it was made of, whose tokenizer is taken as it is if that is a GGUF file.
    Raises ModelError for an architecture, a tokenizer or a tensor that GGUF does not support, and OSError.
    """
    gguf = gguf_package()
    config = load_config(folder, False)
    layout = layout_for(config, ModelError, _CONVERTER)
    _check_numbers(config, False)
    vocab = read_vocab(folder, int(config.vocab_size), base)
    checkpoint = Checkpoint(folder)
    gguf_names: dict[str, str] = {}
    for tensor in checkpoint.tensors:
        if tensor == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp uses the embedding
        gguf_name = layout.place_of(tensor)
        if gguf_name is None:
            raise ModelError(f"{folder}: GGUF has no name for tensor '{tensor}' of a {config.model_type} model")
        gguf_names[tensor] = gguf_name

    file.parent.mkdir(parents=True, exist_ok=True)
    with partial_file(file) as temporary:
        writer = gguf.GGUFWriter(str(temporary), layout.architecture)
        _describe(writer, gguf, config, folder.name, kind)
        write_vocab(writer, gguf.GGUFValueType, vocab)
        extra = _rope_factors(config)
        if extra is not None:
            writer.add_tensor_info(ROPE_FREQS, extra.shape, extra.dtype, extra.nbytes)
        for tensor, gguf_name in gguf_names.items():
            shape = checkpoint.tensors[tensor].shape
            quant = _type_of(gguf, kind, shape)
            data_shape = gguf.quants.quant_shape_to_byte_shape(shape, quant) if quant.name == "Q8_0" else shape
            if quant.name == "BF16":
                data_shape = (*shape[:-1], shape[-1] * 2)
            dtype = {"F32": np.float32, "F16": np.float16}.get(quant.name, np.uint8)
            nbytes = math.prod(data_shape) * np.dtype(dtype).itemsize
            writer.add_tensor_info(gguf_name, data_shape, np.dtype(dtype), nbytes, raw_dtype=quant)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if extra is not None:
            writer.write_tensor_data(extra)
        with working(f"writing {file.name}", len(gguf_names), "tensors") as task:
            for tensor in gguf_names:
                writer.write_tensor_data(_encoded(gguf, _value(checkpoint, layout, tensor), kind))
                task.to(task.done + 1)
        writer.close()
        with working(f"checking {file.name}"):
            count = _read_back(gguf, temporary, checkpoint, layout, gguf_names, kind, vocab)
    modelfile = file.with_suffix(".Modelfile")
    stops = "".join(f"PARAMETER stop {json.dumps(vocab.tokens[i])}\n" for i in vocab.stop)
    modelfile.write_text(f"FROM ./{file.name}\n{stops}", encoding="utf-8")
    return {
        "file": str(file), "modelfile": str(modelfile), "bytes": file.stat().st_size,
        "architecture": layout.architecture, "type": kind, "tensors": count, "vocabulary": len(vocab.tokens),
        "pre_tokenizer": vocab.values.get("ggml.pre", "default"), "notes": vocab.notes,
    }  # fmt: skip


@contextmanager
def partial_file(file: Path) -> Iterator[Path]:
    """A temporary file beside `file` to write; flushed and renamed to it on success, else removed."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def gguf_package() -> Any:
    """The package gguf, which writes the files. Raises ModelError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ModelError("writing GGUF needs the package gguf: pip install 'graftlm[gguf]'") from None
    return gguf


# ---- header -----------------------------------------------------------------------------------------------------------


def _rope(config: Any) -> dict[str, Any]:
    """The RoPE parameters; for a model with several kinds of layers, those of full attention."""
    given: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return given.get("full_attention", given)


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_numbers(config: Any, unties: bool) -> None:
    """Raise ModelError for a config value that differs from the one in llama.cpp's code."""
    fixed, kind = _FIXED[WRITTEN_AS[config.model_type]], config.model_type
    scaling = _rope(config).get("rope_type", "default")
    if scaling not in fixed.rope:
        raise ModelError(
            f"its RoPE type is '{scaling}', and llama.cpp has {', '.join(fixed.rope)} for a {kind}; {_CONVERTER}"
        )
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in fixed.activations:
        raise ModelError(f"its activation is '{activation}', and llama.cpp has {fixed.activations[0]} for a {kind}")
    if getattr(config, "attention_bias", False) and not fixed.attention_bias:
        raise ModelError(f"GGUF does not support a {kind} with biases in attention")
    if not fixed.untied_head and (unties or not config.tie_word_embeddings):
        raise ModelError(
            f"its head is not tied to its embedding, and llama.cpp takes a {kind}'s embedding as its head; write the plain "
            "folder, without --gguf"
        )
    caps = [getattr(config, name, None) for name in _SOFT_CAPS]
    if all(caps) != fixed.soft_caps or any(caps) != fixed.soft_caps:
        raise ModelError(
            f"its {_SOFT_CAPS[0]} and {_SOFT_CAPS[1]} are {caps[0]} and {caps[1]}, and llama.cpp caps "
            f"{'both' if fixed.soft_caps else 'neither'} for a {kind}"
        )
    if fixed.full_every:
        _check_windows(config, fixed.full_every)
    if getattr(config, "use_sliding_window", False):
        raise ModelError(
            "it uses a sliding window (use_sliding_window), which llama.cpp does not support for this architecture"
        )


def _check_windows(config: Any, period: int) -> None:
    """The part of `_check_numbers` for models with a window in most layers."""
    wide = {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    heads = config.hidden_size / config.num_attention_heads
    expected = heads if config.num_hidden_layers == wide else _head_width(config)
    if config.query_pre_attn_scalar != expected:
        raise ModelError(
            f"its query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp uses {expected:g} for this "
            "architecture"
        )
    layers = range(config.num_hidden_layers)
    pattern = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in layers]
    if list(config.layer_types) != pattern:
        raise ModelError(
            f"its layers do not use full attention in every {period}th layer, as llama.cpp does for this architecture"
        )
    if not config.sliding_window:
        raise ModelError("it has no sliding_window, which llama.cpp needs for this architecture")
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention", {})
    theta, scaling = local.get("rope_theta", LOCAL_ROPE_THETA), local.get("rope_type", "default")
    if theta != LOCAL_ROPE_THETA or scaling != "default":
        raise ModelError(
            f"its local layers have rope_theta {theta:g} and RoPE type '{scaling}', and llama.cpp uses {LOCAL_ROPE_THETA:g} "
            "and default"
        )


def _describe(writer: Any, gguf: Any, config: Any, name: str, kind: str) -> None:
    writer.add_name(name)
    writer.add_file_type(_TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    window = getattr(config, "sliding_window", None)
    length = int(config.max_position_embeddings)
    if (
        config.model_type == "mistral" and window
    ):  # llama.cpp has no window here; within this length there is no difference
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
    if config.model_type in ("llama", "mistral"):
        writer.add_rope_dimension_count(_head_width(config))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if config.model_type in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(int(window or 0))
        if config.model_type == "gemma2":
            writer.add_attn_logit_softcapping(float(config.attn_logit_softcapping))
            writer.add_final_logit_softcapping(float(config.final_logit_softcapping))


def _rope_factors(config: Any) -> Array | None:
    """Llama 3's RoPE scaling for llama.cpp: the divisor of each frequency, (head width / 2,)."""
    rope = _rope(config)
    return llama3_divisors(rope, _head_width(config)) if rope.get("rope_type") == "llama3" else None


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _value(checkpoint: Checkpoint, layout: GgufLayout, name: str) -> Array:
    """A tensor in float32 and in GGUF's layout."""
    tensor = layout.rows_for_gguf(name, checkpoint.read(name).float()) + layout.norm_offset(name)
    return tensor.contiguous().numpy()


def _type_of(gguf: Any, kind: str, shape: tuple[int, ...]) -> Any:
    """The GGUF type of a tensor of this shape."""
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
    layout: GgufLayout,
    gguf_names: Mapping[str, str],
    kind: str,
    vocab: GgufTokenizer,
) -> int:
    """Read the file with the package's reader and compare every tensor and the tokenizer with the model's."""
    reader = gguf.GGUFReader(str(file))
    found = {t.name: t for t in reader.tensors}
    for name, gguf_name in gguf_names.items():
        tensor = found.get(gguf_name)
        wanted = _value(checkpoint, layout, name)
        encoded = _encoded(gguf, wanted, kind)
        if tensor is None or np.asarray(tensor.data).tobytes() != np.ascontiguousarray(encoded).tobytes():
            raise ModelError(f"{gguf_name} in {file.name} differs from what was written; the file was removed")
    metadata = read_gguf(file).metadata
    odd = next((key for key, value in vocab.metadata().items() if metadata.get(key) != value), None)
    if odd is not None:
        raise ModelError(f"{odd} in {file.name} differs from what was written; the file was removed")
    return len(found)


__all__ = ["check_gguf", "gguf_package", "partial_file", "write_gguf"]
