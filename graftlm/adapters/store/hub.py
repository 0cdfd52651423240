"""One version as a repository of the Hugging Face hub: the adapter's files at its root, where PEFT and others find them.

A push is one commit, so it is there whole or not at all. `graft-version.json` beside the files says which name, number and
digest it is; what is pulled is held against that before it is published here.
"""

from __future__ import annotations

import json
from pathlib import Path

from graftlm.adapters.store.folder import Store
from graftlm.adapters.store.names import check_name
from graftlm.adapters.store.remote import Record, check_fetched
from graftlm.adapters.store.shelf import RUN, Version
from graftlm.errors import StoreError

RECORD = "graft-version.json"


def push(version: Version, repository: str, private: bool) -> bool:
    """Upload a version in one commit, making the repository where there is none. Raises StoreError."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from graftlm.adapters.format import inspect_folder

    found = inspect_folder(version.folder)
    if found.digest != version.digest:
        raise StoreError(f"{version.label} is damaged here, so it is not pushed; see: graft adapters verify")
    names = [*found.files, *([RUN] if (version.folder / RUN).is_file() else [])]
    operations = [CommitOperationAdd(name, str(version.folder / name)) for name in names]
    operations.append(CommitOperationAdd(RECORD, json.dumps(version.event, indent=2).encode()))
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, operations=operations, commit_message=f"{version.label} {version.digest[:12]}")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise StoreError(f"{repository} was not written on the hub: {str(error).strip().splitlines()[0]}") from None
    return True


def pull(store: Store, repository: str, name: str | None, revision: str | None) -> tuple[Version, bool]:
    """Download a repository's version, check it, and publish it here. Raises StoreError, AdapterError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    from graftlm.adapters.format import inspect_folder
    from graftlm.adapters.imported import fetch

    folder = fetch(repository, revision)
    try:
        record = json.loads(Path(hf_hub_download(repository, RECORD, revision=revision)).read_text(encoding="utf-8"))
        known = Record(inspect_folder(folder).manifest["base"]["fingerprint"],  # pyright: ignore[reportOptionalSubscript]
                       check_name(record["name"]), int(record["version"]), str(record["digest"]), record)  # fmt: skip
    except EntryNotFoundError:
        raise StoreError(
            f"{repository} has no {RECORD}, so it was not pushed by graft; bring it in with: graft adapters import"
        ) from None
    except (HfHubHTTPError, OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{repository} cannot be read as a version: {str(error).strip().splitlines()[0]}") from None
    check_fetched(folder, known, repository, inspect_folder)
    number = known.number if name is None else None
    return store.publish(folder, name or known.name, number=number, event=known.event)


__all__ = ["RECORD", "pull", "push"]
