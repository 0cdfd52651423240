"""A GGUF file as a Hugging Face model folder: config and tokenizer are written out once, the weights stay where they are.

    <cache>/gguf/<digest of the file's path, size and times>/
        config.json  generation_config.json  tokenizer.json  tokenizer_config.json
        model.gguf.json      {"file": the GGUF file}

Whatever reads a model folder reads this one. `gguf_of(folder)` finds the weights.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from graftlm.errors import ModelError
from graftlm.files import atomic_folder, cache_folder, write_json
from graftlm.gguf.config import config_of
from graftlm.gguf.header import GgufFile, read_gguf
from graftlm.gguf.layout import GgufLayout, checkpoint_names
from graftlm.gguf.tokenizer import tokenizer_of
from graftlm.jsonfile import read_json
from graftlm.progress import LONG, sign_of_life

POINTER = "model.gguf.json"
BLOCKS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k")
"""The quantized types that are read."""
FLOATS = ("f32", "f16", "bf16")
_FORMAT = 2
"""Of the folder's content; with another number it is written anew."""


def folder_of(name: str) -> Path:
    """The folder that stands for the model in a GGUF file: one here, or `owner/name/FILE.gguf` of the hub.

    Raises ModelError as `model_folder` does, and where there is no such file.
    """
    file = Path(name).expanduser()
    try:
        if not file.is_file():
            file = _downloaded(name)
        return model_folder(file)
    except OSError as error:
        raise ModelError(f"{name}: its config and tokenizer cannot be written to the cache: {error}") from None


def _downloaded(name: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") != 2:
        raise ModelError(f"there is no file '{name}'; a GGUF file of the hub is owner/name/FILE.gguf")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, wanted = name.rpartition("/")
    sign_of_life(LONG)
    try:
        return Path(hf_hub_download(repository, wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"'{name}' is no file here and the hub did not give it: {str(error).splitlines()[0]}"
        ) from None


def model_folder(file: Path) -> Path:
    """The folder that stands for the model in a GGUF file, written where it is not there yet.

    Raises ModelError for a file that cannot be read, an architecture, a tensor type or a tokenizer that is not supported, and
    a tensor that is missing, before anything is allocated; OSError where the cache cannot be written.
    """
    stat = file.stat()
    key = f"{_FORMAT}|{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
    folder = cache_folder() / "gguf" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if (folder / POINTER).is_file():
        return folder
    gguf = read_gguf(file)
    config = config_of(gguf)
    _check_tensors(gguf, config)
    tokenizer, settings = tokenizer_of(gguf)
    with atomic_folder(folder) as place:
        write_json(place / "config.json", config)
        write_json(place / "generation_config.json", _generation(gguf, config))
        write_json(place / "tokenizer.json", tokenizer)
        write_json(place / "tokenizer_config.json", settings)
        write_json(place / POINTER, {"file": str(file.resolve())})
    return folder


def gguf_of(folder: Path) -> GgufFile | None:
    """The GGUF file that a model folder stands for; None for a folder with weights of its own. Raises ModelError."""
    if not (folder / POINTER).is_file():
        return None
    found = read_json(folder / POINTER, ModelError).get("file")
    if not isinstance(found, str) or not Path(found).is_file():
        raise ModelError(f"the GGUF file {found} is gone; put it back, or name another model")
    file = Path(found)
    stat = file.stat()
    return _read(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2)
def _read(file: Path, size: int, changed: int) -> GgufFile:
    return read_gguf(file)


def layout_of(file: GgufFile) -> GgufLayout:
    """The names and orders of a file's tensors. Raises ModelError."""
    config = config_of(file)
    return GgufLayout(file.architecture, config["num_attention_heads"], config["num_key_value_heads"])


def _check_tensors(file: GgufFile, config: dict[str, Any]) -> None:
    """Raise ModelError for layers that are not those of the metadata, a tensor without a place in the architecture, or of a
    type that is not read."""
    places = checkpoint_names(file.path, layout_of(file), file.tensors).values()
    found = {int(place.split(".")[1]) for place in places if place.startswith("blk.")}
    claimed, prefix = config["num_hidden_layers"], file.architecture
    if found != set(range(claimed)):  # before a model of so many layers is built
        raise ModelError(
            f"{file.path}: {prefix}.block_count is {claimed:,}, and its tensors are of {len(found):,} layers, "
            "which are not those counted from 0; download it again"
        )
    width = file.tensors["token_embd.weight"].shape[1]
    if width != config["hidden_size"]:
        raise ModelError(
            f"{file.path}: {prefix}.embedding_length is {config['hidden_size']:,}, and its embedding has rows of {width:,}"
        )
    for place in places:
        kind = file.tensors[place].type.name
        if kind not in (*BLOCKS, *FLOATS):
            raise ModelError(
                f"{file.path} has tensor '{place}' of type {kind}, and {', '.join((*FLOATS, *BLOCKS))} are read; take another "
                "quantization of this model, such as Q4_K_M or Q8_0"
            )


def _generation(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json: which tokens end an answer."""
    ends = [config.get("eos_token_id")]
    ends += [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    stop = sorted({i for i in ends if type(i) is int and 0 <= i < config["vocab_size"]})
    return {
        **{key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config},
        **({"eos_token_id": stop} if stop else {}),
    }
