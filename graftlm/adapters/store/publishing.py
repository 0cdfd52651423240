"""What is published as a version: the adapter's folder, its base, and what the journal records beside name and number."""

from __future__ import annotations

import contextlib
import getpass
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.adapters.store.advice import command
from graftlm.adapters.store.content import DIGEST
from graftlm.errors import AdapterError, StoreError
from graftlm.jsonfile import read_json

if TYPE_CHECKING:
    from graftlm.adapters.peft_folder import AdapterFolder


def describe(found: AdapterFolder, source: Path | str, note: str = "", parents: Sequence[str] = ()) -> dict[str, Any]:
    """What a publish event records besides name, number and digest, so that listing needs no other file."""
    manifest = found.manifest or {}
    evaluation = manifest.get("evaluation") or {}
    return {
        "base": manifest["base"]["name"],
        "precision": manifest["base"]["precision"],
        "method": manifest.get("method"),
        "rank": found.config.get("r"),
        "data": (((manifest.get("data") or {}).get("train")) or {}).get("digest"),
        "before": evaluation.get("before"),
        "after": evaluation.get("after"),
        "steps": manifest.get("steps"),
        "bytes": found.bytes,
        "parents": list(dict.fromkeys([*found.parents, *parents])),
        "source": str(source),
        "note": note,
        **signed(),
    }


def signed() -> dict[str, str]:
    """The time and the user, for an event."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = "unknown"
    return {"at": datetime.now(UTC).isoformat(timespec="seconds"), "by": f"{user}@{socket.gethostname()}"}


def base_of(found: AdapterFolder, name: str, store: Path) -> str:
    """The fingerprint of an adapter's base. Raises AdapterError if it has none."""
    if found.manifest is None:
        model = [] if found.config.get("base_model_name_or_path") else ["--model", "BASE"]
        raise AdapterError(
            f"{found.path} has no graft.json, so it does not say on which base it was trained; import it with: "
            f"{command('import', found.path, '--name', name, *model, store=store)}"
        )
    fingerprint = str(found.manifest["base"]["fingerprint"])
    if not DIGEST.fullmatch(fingerprint):
        raise AdapterError(
            f"{found.path} was trained on a base without a fingerprint ('{fingerprint[:20]}'), which cannot be loaded again"
        )
    return fingerprint


def adapter_and_run(source: Path) -> tuple[Path, dict[str, Any] | None]:
    """The adapter's folder, and the config and environment of its run if they are beside it."""
    if not source.is_dir():
        raise StoreError(f"there is no folder {source}; give a run's folder, or an adapter's")
    adapter = source if (source / "adapter_config.json").is_file() else source / "adapter"
    if not adapter.is_dir() and (source / "model").is_dir():
        raise StoreError(f"{source} is a full run; its model is a plain folder, and a store holds adapters")
    if not adapter.is_dir():
        started = (source / "config.json").is_file()
        what = "has not ended: it has no adapter yet" if started else "holds neither a run nor an adapter"
        raise StoreError(f"{source} {what}")
    home = adapter.parent
    if adapter.name != "adapter" or not (home / "config.json").is_file():
        return adapter, None
    run: dict[str, Any] = {}
    for part in ("config", "environment"):
        with contextlib.suppress(StoreError):
            run[part] = read_json(home / f"{part}.json", StoreError)
    return adapter, run
