"""`graft serve --engine vllm`: the same adapters on vLLM. They are checked and made fit for it; the command is printed.

vLLM serves plain folders under fixed names: `formal` and `formal@prod` become two names of one folder. An adapter that vLLM
cannot serve is refused with its reason before any command is printed. An exported folder is named by its version and digest
and appears whole or not at all, so the next run takes what is there and adds what was published since.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from graftlm import demo
from graftlm.adapters import peft_format as adapter_format
from graftlm.adapters.export import export_adapter
from graftlm.adapters.store import BaseVersions, NamedAdapter, Store, Version
from graftlm.base.chat import Encoder
from graftlm.base.fingerprint import fingerprint
from graftlm.base.loading import load_tokenizer, resolve
from graftlm.config import ExportConfig, ServeConfig
from graftlm.errors import AdapterError, StoreError

Note = Callable[[str], None]


def export_for_vllm(config: ServeConfig, note: Note) -> dict[str, Any]:
    """Export what would be served; returns the command and what was written. Raises GraftError.

    With `--follow` an adapter that vLLM cannot serve is left out and named, since the others are to go on being served.
    """
    assert config.store is not None
    base = base_fingerprint(config)
    wanted = _wanted(Store(config.store), base, config.adapter)
    if not wanted:
        raise StoreError(f"{config.store} has no adapters for {config.model} ({base[:12]}); publish one first")
    out = config.out if config.follow is None else config.out.absolute()  # as the server is to name it
    folders: dict[str, Path] = {}
    modules: dict[str, Path] = {}
    rank = 0
    for name, version in wanted.items():
        if version.digest not in folders:
            place = folder_of(out, version)
            try:
                rank = max(rank, export_version(config, name, version, place, note))
            except (AdapterError, StoreError) as error:
                if config.follow is None:
                    raise
                note(f"refused    {error}")
                continue
            folders[version.digest] = place
        modules[name] = folders[version.digest]
    if not modules:
        raise AdapterError(f"none of the {len(wanted)} names in {config.store} can be served by vLLM")
    model = resolve(config.model, config.trust_remote_code)
    if not Encoder(load_tokenizer(model)).has_own_template and _any_chats(wanted[name] for name in modules):
        note(
            "template   the base has no chat template, and vLLM has no plain one: ask /v1/completions, or give --chat-template"
        )
    adapters = {
        name: {"version": wanted[name].label, "digest": wanted[name].digest, "folder": str(folder)}
        for name, folder in modules.items()
    }
    return {"command": shlex.join(_command(config, rank, modules)), "max_lora_rank": rank, "adapters": adapters}


def base_fingerprint(config: ServeConfig) -> str:
    """The fingerprint of the base that is served. Raises ModelError."""
    return fingerprint(resolve(config.model, config.trust_remote_code))


def folder_of(out: Path, version: Version) -> Path:
    """The folder of a version's export, named by its label and the first digits of its digest."""
    return out / f"{version.label}-{version.digest[:12]}"


def export_version(config: ServeConfig, name: str, version: Version, place: Path, note: Note) -> int:
    """Have a version in `place` as vLLM reads it; returns its rank there. Raises AdapterError and StoreError with the name."""
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


def every_name(names: Mapping[str, NamedAdapter], base_versions: BaseVersions) -> dict[str, Version]:
    """Every name's newest version and every alias's: what is served where no names are asked for."""
    found: dict[str, Version] = {}
    for key in sorted(names):
        name = names[key]
        numbers = {key: max(name.versions), **{f"{key}@{alias}": n for alias, n in sorted(name.aliases.items())}}
        for text, number in numbers.items():
            if number in name.versions:
                found[text] = base_versions.version(name.versions[number], name.pointing_at(number))
    return found


def _command(config: ServeConfig, rank: int, modules: Mapping[str, Path]) -> list[str]:
    """What serves these folders; precisions that vLLM has under another name are called by it.

    vLLM loads each name as an adapter of its own, also where two names have one folder.
    """
    follow = config.follow is not None
    port = config.port
    if config.follow is not None and "port" not in config.model_fields_set:
        port = urlsplit(config.follow).port or port
    # Runtime updating is vLLM's to allow. Its prefix cache knows adapters by name, and would answer from the version before.
    command = ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"] if follow else []
    command += ["vllm", "serve", demo.resolve_model(config.model), "--host", config.host, "--port", str(port)]
    if config.base_precision == "nf4":
        command += ["--quantization", "bitsandbytes"]
    elif config.base_precision is not None:
        command += ["--dtype", config.base_precision]
    slots = min(config.max_loras, len(modules))
    command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(slots)]
    command += ["--max-cpu-loras", str(len(modules)), "--max-num-seqs", str(config.on("cuda").max_num_seqs)]
    command += ["--no-enable-prefix-caching"] if follow else []
    command += ["--trust-remote-code"] if config.trust_remote_code else []
    if config.tool_call_parser != "auto":  # vLLM finds none by itself
        command += ["--enable-auto-tool-choice", "--tool-call-parser", config.tool_call_parser]
    if config.reasoning_parser not in ("auto", "none"):
        command += ["--reasoning-parser", config.reasoning_parser]
    return [*command, "--lora-modules", *(f"{name}={folder}" for name, folder in modules.items())]


def _wanted(store: Store, base: str, asked: tuple[str, ...]) -> dict[str, Version]:
    """Names with their versions: those asked for, else every name's newest and every alias."""
    if asked:
        return {name: store.find(name, base) for name in asked}
    if base not in {base_versions.fingerprint for base_versions in store.bases()}:
        return {}
    names = {name.name: name for _, name in store.names(base)}
    return every_name(names, store.base_versions(base))


def _any_chats(versions: Iterable[Version]) -> bool:
    """Whether any of these was trained on chats."""
    manifests = [version.manifest() for version in versions]
    return any("chat" in (((m or {}).get("data") or {}).get("train") or {}).get("formats", {}) for m in manifests)
