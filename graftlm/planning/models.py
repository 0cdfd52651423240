"""From the name that a user gives to a model's shape: a built-in name, a directory, `demo`, or a hub id.

    shape = find("llama-2-70b").shape

Built-in shapes are read from a file, in milliseconds. Any other config is built once by transformers without storage
(`instantiate.py`, about three seconds, nearly all of it importing), and its shape is then kept in the user's cache by the
config's content. Of a hub model config.json alone is fetched.

    python -m graftlm.planning.models        write shapes.json anew from models.toml
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from graftlm import demo
from graftlm.config.fields import is_gguf
from graftlm.errors import ModelError, nearest
from graftlm.files import cache_folder, write_json
from graftlm.gguf.folder import folder_of, gguf_of
from graftlm.jsonfile import read_json
from graftlm.planning.shapes import ModelShape
from graftlm.progress import working

_HERE = Path(__file__).parent
_FORMAT = 1  # of a kept shape; raised when Shape changes
# What a config.json says that decides neither a size nor a module.
_WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "bos_token_id", "dtype", "embd_pdrop",
    "eos_token_id", "initializer_range", "pad_token_id", "pretraining_tp", "quantization_config", "resid_pdrop",
    "rms_norm_eps", "rope_theta", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model to plan for: what the user called it, and its shape."""

    name: str
    shape: ModelShape
    folder: Path | None = None
    """Where its files are, if they are here."""


@cache
def built_in() -> dict[str, dict[str, Any]]:
    """The built-in models' configs by name, `hub` and `like` resolved."""
    entries = tomllib.loads((_HERE / "models.toml").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():  # an entry stands below the one that it is like
        inherited = {k: v for k, v in found[entry["like"]].items() if k != "hub"} if "like" in entry else {}
        found[name] = {**inherited, **{k: v for k, v in entry.items() if k != "like"}}
    return found


def find(name: str, *, trust_remote_code: bool = False) -> NamedModel:
    """The model of a name; ModelError with the nearest known names when there is none, or its config does not do."""
    short = _built_in_name(name)
    if short is not None:
        shapes = read_json(_HERE / "shapes.json", ModelError)
        return NamedModel(name=short, shape=ModelShape.from_json(shapes[short]))
    place = folder_of(name) if is_gguf(name) else Path(demo.resolve_model(name)).expanduser()
    if place.is_dir():
        values = _read(place / "config.json")
        shape, gguf = _shape(values, name, trust_remote_code, place), gguf_of(place)
        if gguf is not None:
            shape = replace(shape, gguf_bytes=sum(tensor.last - tensor.first for tensor in gguf.tensors.values()))
        return NamedModel(name=name, shape=shape, folder=place)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"unknown model '{name}'{nearest(name.lower(), [*built_in(), 'demo'])} Give a directory, a hub id (owner/name), or "
            f"one of: {', '.join(built_in())}"
        )
    return NamedModel(name=name, shape=_shape(_read(_fetched(name)), name, trust_remote_code))


def _built_in_name(name: str) -> str | None:
    """The built-in model that a name or a hub id means, whatever its case."""
    if Path(name).is_dir():
        return None
    wanted = name.lower()
    return next((n for n, c in built_in().items() if wanted in (n, c["hub"].lower())), None)


def _fetched(name: str) -> Path:
    """config.json of a model on the hub, from the cache where it is there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    near = nearest(name.lower().rpartition("/")[2], built_in())
    try:
        return Path(hf_hub_download(name, "config.json"))
    except RepositoryNotFoundError:
        raise ModelError(f"no model '{name}' on the hub{near} Check its spelling, or log in if it is private") from None
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            raise ModelError(f"'{name}' on the hub has no config.json, so transformers does not load it") from None
        raise _not_given(name, error, near) from None
    except (HfHubHTTPError, OSError) as error:
        raise _not_given(name, error, near) from None


def _not_given(name: str, error: Exception, near: str) -> ModelError:
    said = str(error).splitlines()[0]
    return ModelError(f"the hub did not give config.json of '{name}' ({said}){near} Built-in names need no hub")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path.parent} has no config.json, so it is not a Hugging Face model folder")
    values = read_json(path, ModelError)
    if not isinstance(values.get("model_type"), str):
        raise ModelError(f"{path} has no 'model_type', which names the architecture; it is no model's config")
    return values


def digest(config: dict[str, Any]) -> str:
    """Digest of the parts of a config that decide its shape."""
    kept = {k: v for k, v in config.items() if k not in _WITHOUT_EFFECT}
    text = json.dumps([_FORMAT, version("transformers"), kept], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _shape(values: dict[str, Any], name: str, trust_remote_code: bool, folder: Path | None = None) -> ModelShape:
    """The shape of a config, kept in the user's cache folder."""
    _refuse_incomplete(values, name)
    entry = cache_folder() / "shapes" / f"{digest(values)}.json"
    if entry.is_file():
        try:
            return ModelShape.from_json(read_json(entry, ModelError))
        except (ModelError, ValueError, KeyError, TypeError):
            pass  # damaged: made anew below
    with working(f"reading the shape of {name}"):
        shape = build(values, name, trust_remote_code, folder)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_json(entry, shape.to_json())
    except OSError:
        pass  # a cache that cannot be written costs time, nothing else
    return shape


# Every name that transformers has for a size; one of each row is in every config of a language model.
_NEEDED = {
    "a width": ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "text_config"),
    "a number of layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "text_config"),
    "a vocabulary size": ("vocab_size", "text_config"),
}


def _refuse_incomplete(values: dict[str, Any], name: str) -> None:
    """transformers fills in what a config does not say, so the plan would be for another model."""
    for what, names in _NEEDED.items():
        if not any(n in values for n in names):
            raise ModelError(
                f"{name}: its config.json (model_type '{values['model_type']}') gives {what} under none of the names "
                f"{', '.join(n for n in names if n != 'text_config')}; take the complete file of the model"
            )


def build(values: dict[str, Any], name: str, trust_remote_code: bool = False, folder: Path | None = None) -> ModelShape:
    """Have transformers build the model of a config without storage. Raises ModelError.

    `folder` is where the config stands among the model's own files, whose code may be wanted.
    """
    from graftlm.base.loading import load_config
    from graftlm.planning.instantiate import instantiate

    if folder is not None:
        return instantiate(load_config(folder, trust_remote_code), trust_remote_code)
    with tempfile.TemporaryDirectory() as place:
        plain = {k: None if v == "none" else v for k, v in values.items() if k != "hub"}
        (Path(place) / "config.json").write_text(json.dumps(plain), encoding="utf-8")
        try:
            return instantiate(load_config(Path(place), trust_remote_code), trust_remote_code)
        except ModelError as error:
            raise ModelError(f"{name}: {str(error).replace(f'{place}/', '')}") from None


def main() -> None:
    """Write shapes.json."""
    shapes = {name: build(config, name).to_json() for name, config in built_in().items()}
    lines = [f"{json.dumps(name)}: {json.dumps(shape, separators=(',', ':'))}" for name, shape in shapes.items()]
    (_HERE / "shapes.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    sys.stdout.write(f"{len(shapes)} shapes\n")


if __name__ == "__main__":
    main()
