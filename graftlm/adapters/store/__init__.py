"""Named, numbered, immutable versions of adapters: `resolve("formal@prod")` gives a folder and its digest.

store.py          the store on disk: publish, find, alias, roll back, remove, verify
base_versions.py  the part of it that belongs to one base
publishing.py     the adapter, base and run that a publish records
content.py        a version's files, and the check before they are read
journal.py        the one file that changes: an append-only log of events
replay.py         from the journal's events to names, versions and aliases
live_names.py     the names as they are now, for a process that stays
names.py          names, version numbers and aliases
advice.py         `graft adapters` commands in messages
lineage.py        what a version was made from, and how two versions differ
tables.py         tables for the terminal
remote.py         push and pull: object stores and folders, through fsspec
hub.py            push and pull: the Hugging Face hub
"""

from graftlm.adapters.store.advice import DEFAULT
from graftlm.adapters.store.base_versions import BaseVersions, VerifyFault, VerifyReport, Version
from graftlm.adapters.store.live_names import LiveNames
from graftlm.adapters.store.names import Reference, looks_like_a_name, parse
from graftlm.adapters.store.replay import NamedAdapter, apply_events
from graftlm.adapters.store.store import Store, open_adapter, resolve

__all__ = [
    "DEFAULT",
    "BaseVersions",
    "LiveNames",
    "NamedAdapter",
    "Reference",
    "Store",
    "VerifyFault",
    "VerifyReport",
    "Version",
    "apply_events",
    "looks_like_a_name",
    "open_adapter",
    "parse",
    "resolve",
]  # fmt: skip
