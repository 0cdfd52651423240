"""Named, numbered, immutable versions of adapters: `resolve("formal@prod")` gives a folder and its digest.

folder.py    the store on disk: publish, find, alias, roll back, remove, verify
base_versions.py     the part of it that belongs to one base
content.py   a version's files, and the check that everybody reads them by
journal.py   the one file that changes, at its end
state.py     what the journal's events come to
names.py     what a version may be called
advice.py    commands as messages advise them
lineage.py   what made a version, and how two differ
remote.py    push and pull: object stores and folders, by fsspec
hub.py       push and pull: the Hugging Face hub
"""

from graftlm.adapters.store.advice import DEFAULT
from graftlm.adapters.store.base_versions import BaseVersions, VerifyFault, VerifyReport, Version
from graftlm.adapters.store.names import Reference, looks_like_a_name, parse
from graftlm.adapters.store.replay import NamedAdapter, apply_events
from graftlm.adapters.store.store import Store, open_adapter, resolve

__all__ = [
    "DEFAULT",
    "BaseVersions",
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
