"""`graft serve --engine vllm`: the same adapters on vLLM. They are checked and made fit for it; the command is printed.

vLLM serves plain folders under fixed names: `formal` and `formal@prod` become two names of one folder. An adapter that vLLM
cannot serve is refused with its reason before any command is printed, and then nothing is left half exported.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftlm import demo
from graftlm.adapters.export import export_adapter
from graftlm.adapters.store import Store, Version
from graftlm.base.fingerprint import fingerprint
from graftlm.base.load import resolve
from graftlm.config import ExportConfig, ServeConfig
from graftlm.errors import ConfigError, StoreError


def export_for_vllm(config: ServeConfig, note: Callable[[str], None]) -> dict[str, Any]:
    """Export what would be served; returns the command and what was written. Raises GraftError."""
    assert config.store is not None
    base = fingerprint(resolve(config.model, config.trust_remote_code))
    wanted = _wanted(Store(config.store), base, config.adapter)
    if not wanted:
        raise StoreError(f"{config.store} has no adapters for {config.model} ({base[:12]}); publish one first")
    folders: dict[str, Path] = {}
    rank = 0
    for name, version in wanted.items():
        if version.digest in folders:
            continue
        place = folders[version.digest] = config.out / version.label
        said = export_adapter(
            ExportConfig(
                version=str(version.folder), out=place, for_="vllm", model=config.model,
                trust_remote_code=config.trust_remote_code,
            )
        )  # fmt: skip
        rank = max(rank, int(said["rank"]))
        note(f"exported   {name}: rank {said['rank']}, {said['tensors']} tensors, {place}")
    if config.keys is not None:
        note("keys       vLLM has one --api-key for all adapters; who may use which is not told to it")
    command = ["vllm", "serve", demo.resolve_model(config.model), "--host", config.host, "--port", str(config.port)]
    command += [
        "--enable-lora",
        "--max-lora-rank",
        str(rank),
        "--max-loras",
        str(min(config.adapter_slots, len(folders))),
    ]
    command += ["--max-num-seqs", str(config.running)]
    command += ["--quantization", "bitsandbytes"] if config.precision == "nf4" else []
    command += ["--trust-remote-code"] if config.trust_remote_code else []
    command += ["--lora-modules", *(f"{name}={folders[version.digest]}" for name, version in wanted.items())]
    adapters = {
        name: {"version": v.label, "digest": v.digest, "folder": str(folders[v.digest])} for name, v in wanted.items()
    }
    return {"command": shlex.join(command), "max_lora_rank": rank, "adapters": adapters}


def _wanted(store: Store, base: str, asked: tuple[str, ...]) -> dict[str, Version]:
    """Names with their versions: those asked for, else every name's newest and every alias."""
    if asked:
        return {name: store.find(name, base) for name in asked}
    if base not in {shelf.fingerprint for shelf in store.bases()}:
        return {}
    found: dict[str, Version] = {}
    for _, name in store.names(base):
        found[name.name] = store.find(name.name, base)
        for alias in sorted(name.aliases):
            found[f"{name.name}@{alias}"] = store.find(f"{name.name}@{alias}", base)
    if any("=" in name for name in found):
        raise ConfigError("vLLM takes no '=' in a name")
    return found
