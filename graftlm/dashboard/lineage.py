"""The store of adapters as plain values: versions, aliases, parents, children, and the run that made each.

Read are the journals alone, as `graft adapters list` does. A run made a version if the digest in its summary is the version's,
wherever the folder has been moved since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.adapters.store import Store, Version
from graftlm.dashboard.folders import checked_below
from graftlm.errors import GraftError, RunError


def adapters(root: Path, runs: Mapping[str, str]) -> dict[str, Any]:
    """Every name of a store with its versions; `runs` are ids of runs by their adapter's digest."""
    store, faults = Store(root), list[str]()
    names: list[dict[str, Any]] = []
    try:
        bases = store.bases()
    except (GraftError, OSError) as error:
        return {"store": root.name, "faults": [str(error).replace(str(root), root.name)], "names": []}
    versions: list[tuple[Version, str]] = []
    histories: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for base in bases:
        try:
            if base.journal.path.exists():
                checked_below(base.journal.path, root)
            for name in base.names.values():
                for number, entry in sorted(name.versions.items()):
                    versions.append((base.version(entry, name.pointing_at(number)), base.fingerprint))
                histories[base.fingerprint, name.name] = name.history
        except RunError as error:
            faults.append(str(error).replace(str(root), root.name))
        except (GraftError, KeyError, TypeError, ValueError, AttributeError) as error:
            said = (
                str(error).replace(str(root), root.name)
                if isinstance(error, GraftError)
                else "its journal is not what Graft writes"
            )
            faults.append(f"base {base.fingerprint[:12]}: {said}")
    labels = {version.digest: version.label for version, _ in reversed(versions)}
    for fingerprint, name in dict.fromkeys((fingerprint, version.name) for version, fingerprint in versions):
        own = [v for v, base in versions if (base, v.name) == (fingerprint, name)]
        names.append({
            "name": name, "fingerprint": fingerprint, "base": own[-1].event.get("base"),
            "aliases": {alias: v.number for v in own for alias in v.aliases},
            "versions": [_version(v, labels, [one for one, _ in versions], runs) for v in reversed(own)],
            "history": list(reversed(histories.get((fingerprint, name), [])[-20:])),
        })  # fmt: skip
    return {"store": root.name, "faults": faults, "names": sorted(names, key=lambda n: (n["name"], n["fingerprint"]))}


def _version(
    version: Version, labels: Mapping[str, str], known: Sequence[Version], runs: Mapping[str, str]
) -> dict[str, Any]:
    event = version.event
    parents = event.get("parents")
    return {
        "label": version.label, "number": version.number, "digest": version.digest, "aliases": list(version.aliases),
        **{key: event.get(key) for key in ("method", "rank", "precision", "before", "after", "steps", "bytes", "note", "at",
                                           "by", "source", "data")},
        "parents": [
            {"digest": str(p), "label": labels.get(str(p))} for p in (parents if isinstance(parents, list) else ())
        ],
        "children": list(dict.fromkeys(v.label for v in known if version.digest in (v.event.get("parents") or ()))),
        "run": runs.get(version.digest),
    }  # fmt: skip
