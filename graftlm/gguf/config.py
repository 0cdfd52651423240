"""A model's config from a GGUF file's metadata, as a Hugging Face `config.json` has it.

Only what the file says, or what llama.cpp has in its code for an architecture, goes in. A number that must be there and is
not, or has an odd value, is refused by name.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftlm.errors import ModelError
from graftlm.gguf.header import GgufFile
from graftlm.gguf.layout import ARCHITECTURES, ROPE_FREQS

_CLASSES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM",
}  # fmt: skip
_WIDE_HEADS = {"gemma2": 46, "gemma3": 62}
"""Layers of the one size of an architecture whose attention is scaled by hidden size / heads, not by the head's width."""
_LLAMA3 = ((1.0, 4.0, 8192), (1.0, 4.0, 4096), (1.0, 4.0, 16384))
"""(low_freq_factor, high_freq_factor, original_max_position_embeddings) of models with Llama 3's scaling."""
_FULL_EVERY = {"gemma2": 2, "gemma3": 6}
LOCAL_ROPE_THETA = 10_000.0


class _Metadata:
    """A file's metadata, read with the kind of value that is expected."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.prefix = file, file.architecture

    def whole(self, key: str, default: int | None = None, *, most: int = 1 << 31) -> int:
        found = self._find(key, default)
        if isinstance(found, list):  # one value a layer, as some converters write heads
            kinds = set(found)
            if len(kinds) != 1:
                raise ModelError(f"{self.file.path}: {self._key(key)} differs between layers, which is not read")
            found = found[0]
        if type(found) is not int or not 0 < found < most:
            raise ModelError(
                f"{self.file.path}: {self._key(key)} is {str(found)[:60]}, expected a whole number above 0"
            )
        return found

    def real(self, key: str, default: float | None = None) -> float:
        found = self._find(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found) or found <= 0:
            raise ModelError(f"{self.file.path}: {self._key(key)} is {str(found)[:60]}, expected a number above 0")
        return float(np.format_float_positional(np.float32(found)))  # 1e-05, not the float32's 9.99999974e-06

    def has(self, key: str) -> bool:
        return self._key(key) in self.file.metadata

    def text(self, key: str, default: str) -> str:
        return str(self.file.metadata.get(self._key(key), default))

    def _key(self, key: str) -> str:
        return f"{self.prefix}.{key}"

    def _find(self, key: str, default: Any) -> Any:
        found = self.file.metadata.get(self._key(key), default)
        if found is None:
            raise ModelError(
                f"{self.file.path} does not say {self._key(key)}, without which the model cannot be built; convert it again"
            )
        return found


def config_of(file: GgufFile) -> dict[str, Any]:
    """The values of a `config.json` for the model in a GGUF file.

    Raises ModelError for an architecture that is not read, for metadata that is missing or odd, and for rotary scalings
    other than none, linear, and Llama 3's.
    """
    architecture = file.architecture
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{file.path} is a model of architecture '{architecture}', and GGUF files are read for "
            f"{', '.join(ARCHITECTURES)}; take the model's Hugging Face folder"
        )
    said = _Metadata(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(
            f"{file.path} has no token_embd.weight of two axes, so it is no language model that can be read"
        )
    width, heads = said.whole("embedding_length"), said.whole("attention.head_count")
    head_width = said.whole("attention.key_length", said.whole("rope.dimension_count", max(1, width // heads)))
    config: dict[str, Any] = {
        "model_type": ARCHITECTURES[architecture],
        "architectures": [_CLASSES[architecture]],
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": said.whole("feed_forward_length"),
        "num_hidden_layers": said.whole("block_count", most=10_000),
        "num_attention_heads": heads,
        "num_key_value_heads": said.whole("attention.head_count_kv", heads),
        "head_dim": head_width,
        "max_position_embeddings": said.whole("context_length"),
        "rms_norm_eps": said.real("attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{f"{name}_token_id": token for name, token in special_tokens(file).items()},
    }
    rope = _rope(said, file, head_width)
    if architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": LOCAL_ROPE_THETA}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    else:
        config["rope_parameters"] = rope
    if architecture in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    if architecture in ("qwen2", "qwen3"):
        config["use_sliding_window"] = False
    if architecture.startswith("gemma"):
        config |= _gemma(said, architecture, width, heads, head_width, config["num_hidden_layers"])
    return config


def _gemma(said: _Metadata, architecture: str, width: int, heads: int, head_width: int, layers: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if architecture == "gemma":
        return {"hidden_act": "gelu_pytorch_tanh"}
    period = _FULL_EVERY[architecture]
    found["hidden_activation"] = "gelu_pytorch_tanh"
    found["sliding_window"] = said.whole("attention.sliding_window", 4096 if architecture == "gemma2" else 1024)
    found["layer_types"] = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    found["query_pre_attn_scalar"] = width // heads if layers == _WIDE_HEADS[architecture] else head_width
    for key, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        if said.has(key) or architecture == "gemma2":
            found[key] = said.real(key, default)
        else:
            found[key] = None
    return found


def special_tokens(file: GgufFile) -> dict[str, int]:
    """The tokens that begin and end a text, fill a row, or stand for what is unknown, by transformers' names."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found: dict[str, int] = {}
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else 0
    if not count:
        raise ModelError(
            f"{file.path} has no tokenizer (tokenizer.ggml.tokens); take the model's Hugging Face folder, or a GGUF file that "
            "was converted with its vocabulary"
        )
    for name, key in keys.items():
        token = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is None or token == 0xFFFFFFFF:
            continue
        if type(token) is not int or not 0 <= token < count:
            raise ModelError(
                f"{file.path}: tokenizer.ggml.{key}_token_id is {token}, and its tokenizer has tokens 0 to {count - 1}"
            )
        found[name] = token
    return found


def _rope(said: _Metadata, file: GgufFile, head_width: int) -> dict[str, Any]:
    """The rotation's parameters, as `rope_parameters` has them."""
    theta = said.real("rope.freq_base", LOCAL_ROPE_THETA)
    if ROPE_FREQS in file.tensors:
        return _llama3(file, theta, head_width)
    kind = said.text("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": said.real("rope.scaling.factor")}
    raise ModelError(
        f"{file.path} scales its rotary frequencies by '{kind}', and none, linear and Llama 3's are read; take the model's "
        "Hugging Face folder"
    )


def _llama3(file: GgufFile, theta: float, head_width: int) -> dict[str, Any]:
    """Llama 3's parameters from the divisors that it led to: those of the known sets that give just these."""
    tensor = file.tensors[ROPE_FREQS]
    if tensor.type.name != "f32" or tensor.shape != (head_width // 2,):
        raise ModelError(
            f"{file.path}: {ROPE_FREQS} is {tensor.type.name} of shape {list(tensor.shape)}, expected f32 of "
            f"[{head_width // 2}]"
        )
    found = file.bytes_of(ROPE_FREQS).view("<f4")
    factor = float(found.max())
    for low, high, length in _LLAMA3:
        rope = {
            "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low,
            "high_freq_factor": high, "original_max_position_embeddings": length,
        }  # fmt: skip
        if np.allclose(llama3_divisors(rope, head_width), found, rtol=1e-4):
            return rope
    raise ModelError(
        f"{file.path} scales its rotary frequencies ({ROPE_FREQS}) in a way that is not Llama 3's; take the model's Hugging "
        "Face folder"
    )


def llama3_divisors(rope: dict[str, Any], head_width: int) -> NDArray[np.float32]:
    """By how much Llama 3's scaling divides each rotary frequency, (head width / 2,): what `rope_freqs.weight` holds.

    The formula is that of transformers' `_compute_llama3_parameters`.
    """
    base, factor = float(rope["rope_theta"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    old = float(rope["original_max_position_embeddings"])
    frequencies = 1.0 / base ** (np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    wavelengths = 2 * math.pi / frequencies
    smooth = (old / wavelengths - low) / (high - low)
    found = np.where(wavelengths > old / low, factor, 1 / ((1 - smooth) / factor + smooth))
    return np.where(wavelengths < old / high, 1.0, found).astype(np.float32)
