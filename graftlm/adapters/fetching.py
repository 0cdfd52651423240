"""Import PEFT adapters: fetch, check on their base, and publish.

A PEFT folder identifies its base only by name. The import loads the adapter on that base once, with all checks of the loader,
and saves it in our format with the base's fingerprint and a canary, so that it can only be used on this base.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.manifest import MANIFEST
from graftlm.adapters.store import Store, Version
from graftlm.adapters.store.remote import reason
from graftlm.base.loading import load_base, load_config, resolve
from graftlm.config import ImportConfig, Precision
from graftlm.errors import AdapterError, ConfigError
from graftlm.progress import LONG, sign_of_life

HUB = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
WANTED = (
    adapter_format.CONFIG, adapter_format.TENSORS, MANIFEST, "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip
"""Files of an adapter, as patterns: the files to download from a hub repository."""


def import_adapter(config: ImportConfig) -> tuple[Version, bool, list[str]]:
    """Check an adapter on its base and publish it; returns the version, whether it is new, and notes. Raises GraftError."""
    folder = fetch(config.source)
    store = Store(config.store)
    found = adapter_format.inspect_folder(folder)
    if found.manifest is not None:
        version, new = store.publish(folder, config.name, note=config.note, origin=config.source)
        return version, new, [f"it has a {MANIFEST}, so it was published as it is"]
    model = config.model or found.config.get("base_model_name_or_path")
    if not isinstance(model, str) or not model:
        raise ConfigError(f"{config.source} does not say on which base it was trained; name it with --model")
    base = load_base(
        model, precision=config.base_precision or _own_precision(model, config.trust_remote_code), device=config.device,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    adapter = adapter_format.load(base, folder)
    assert adapter.origin is not None
    if adapter.origin.tokenizer is not None:
        base.tokenizer = adapter.origin.tokenizer
    about: dict[str, Any] = {
        "method": "qlora" if base.precision == "nf4" else "lora",
        "imported": {"source": config.source, "digest": found.digest, "peft_version": found.config.get("peft_version")},
    }
    with tempfile.TemporaryDirectory() as folder:
        adapter_format.save(base, adapter, Path(folder), about)
        version, new = store.publish(Path(folder), config.name, note=config.note, origin=config.source)
    return version, new, list(adapter.origin.notes)


def fetch(source: str, revision: str | None = None, beside: Sequence[str] = ()) -> Path:
    """The folder of an adapter: a directory, or a hub id, downloaded without pickles, and with the files in `beside`.

    Raises AdapterError.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not HUB.fullmatch(source) or source.startswith("."):
        raise AdapterError(f"no adapter at '{source}': it is neither a directory nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    sign_of_life(LONG)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=[*WANTED, *beside]))
    except RepositoryNotFoundError:
        raise AdapterError(
            f"no adapter '{source}' on the hub; check its spelling, or log in if it is private"
        ) from None
    except Exception as error:  # the client raises errors of its HTTP library and its storage
        raise AdapterError(
            f"adapter '{source}' is not a directory here and could not be downloaded from the hub: {reason(error)}"
        ) from None


def _own_precision(model: str, trust_remote_code: bool) -> Precision:
    """The 16- or 32-bit precision of a checkpoint."""
    kind = getattr(load_config(resolve(model, trust_remote_code), trust_remote_code).get_text_config(), "dtype", None)
    return "bfloat16" if kind in (torch.bfloat16, torch.float16) else "float32"
