"""`graft serve --engine vllm`: the same adapters on vLLM. They are checked and made fit for it; the command is printed.

vLLM serves plain folders under fixed names: `formal` and `formal@prod` become two names of one folder. An adapter that vLLM
cannot serve is refused with its reason before any command is printed. An exported folder is named by its version and digest
and appears whole or not at all, so the next run takes what is there and adds what was published since.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftlm import demo
from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.export import export_adapter
from graftlm.adapters.store import Store, Version
from graftlm.base.chat import Encoder
from graftlm.base.fingerprint import fingerprint
from graftlm.base.loading import load_tokenizer, resolve
from graftlm.config import ExportConfig, ServeConfig
from graftlm.errors import AdapterError, StoreError

Note = Callable[[str], None]


def export_for_vllm(config: ServeConfig, note: Note) -> dict[str, Any]:
    """Export what would be served; returns the command and what was written. Raises GraftError."""
    assert config.store is not None
    model = resolve(config.model, config.trust_remote_code)
    base = fingerprint(model)
    wanted = _wanted(Store(config.store), base, config.adapter)
    if not wanted:
        raise StoreError(f"{config.store} has no adapters for {config.model} ({base[:12]}); publish one first")
    folders: dict[str, Path] = {}
    rank = 0
    for name, version in wanted.items():
        if version.digest in folders:
            continue
        place = folders[version.digest] = config.out / f"{version.label}-{version.digest[:12]}"
        rank = max(rank, _exported(config, name, version, place, note))
    if not Encoder(load_tokenizer(model)).has_own_template and _any_chats(wanted.values()):
        note(
            "template   the base has no chat template, and vLLM has no plain one: ask /v1/completions, or give --chat-template"
        )
    command = _command(config, rank, len(folders), {name: folders[v.digest] for name, v in wanted.items()})
    adapters = {
        name: {"version": v.label, "digest": v.digest, "folder": str(folders[v.digest])} for name, v in wanted.items()
    }
    return {"command": shlex.join(command), "max_lora_rank": rank, "adapters": adapters}


def _exported(config: ServeConfig, name: str, version: Version, place: Path, note: Note) -> int:
    """Have a version in `place` as vLLM reads it; returns its rank there. Raises AdapterError with the name."""
    try:
        if place.is_dir():
            rank = int(adapter_format.inspect_folder(place).config["r"])
            note(f"there      {name}: rank {rank}, {place}")
            return rank
        export = ExportConfig(
            version=version.label, out=place, for_="vllm", model=config.model,
            trust_remote_code=config.trust_remote_code,
        )  # fmt: skip
        said = export_adapter(export, version.opened())
    except (AdapterError, StoreError) as error:
        raise type(error)(f"{name}: {error}") from None
    note(f"exported   {name}: rank {said['rank']}, {said['tensors']} tensors, {place}")
    return int(said["rank"])


def _command(config: ServeConfig, rank: int, adapters: int, modules: dict[str, Path]) -> list[str]:
    """What serves these folders; precisions that vLLM has under another name are called by it."""
    command = ["vllm", "serve", demo.resolve_model(config.model), "--host", config.host, "--port", str(config.port)]
    if config.base_precision == "nf4":
        command += ["--quantization", "bitsandbytes"]
    elif config.base_precision is not None:
        command += ["--dtype", config.base_precision]
    slots = min(config.max_loras, adapters)
    command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(slots)]
    command += ["--max-cpu-loras", str(adapters), "--max-num-seqs", str(config.on("cuda").max_num_seqs)]
    command += ["--trust-remote-code"] if config.trust_remote_code else []
    return [*command, "--lora-modules", *(f"{name}={folder}" for name, folder in modules.items())]


def _wanted(store: Store, base: str, asked: tuple[str, ...]) -> dict[str, Version]:
    """Names with their versions: those asked for, else every name's newest and every alias."""
    if asked:
        return {name: store.find(name, base) for name in asked}
    if base not in {base_versions.fingerprint for base_versions in store.bases()}:
        return {}
    found: dict[str, Version] = {}
    for _, name in store.names(base):
        found[name.name] = store.find(name.name, base)
        for alias in sorted(name.aliases):
            found[f"{name.name}@{alias}"] = store.find(f"{name.name}@{alias}", base)
    return found


def _any_chats(versions: Any) -> bool:
    """Whether any of these was trained on chats."""
    manifests = [version.manifest() for version in versions]
    return any("chat" in (((m or {}).get("data") or {}).get("train") or {}).get("formats", {}) for m in manifests)
