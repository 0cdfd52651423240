"""Named, numbered, immutable versions of adapters: `resolve("formal@prod")` gives a folder and its digest.

folder.py    the store on disk: publish, find, alias, roll back, remove, verify
shelf.py     the part of it that belongs to one base
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
from graftlm.adapters.store.folder import Store, open_adapter, resolve
from graftlm.adapters.store.names import Reference, looks_like_a_name, parse
from graftlm.adapters.store.shelf import Check, Fault, Shelf, Version
from graftlm.adapters.store.state import Name, carried_on

__all__ = [
    "DEFAULT", "Check", "Fault", "Name", "Reference", "Shelf", "Store", "Version", "carried_on",
    "looks_like_a_name", "open_adapter", "parse", "resolve",
]  # fmt: skip
