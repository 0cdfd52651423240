"""One version as a repository of the Hugging Face hub: the adapter's files at its root, where PEFT finds them.

A push is one commit whose parent is the commit that was inspected, so it is atomic and never overwrites a concurrent push.
`graft-version.json` has name, number and digest. A pull downloads all files at one commit and compares them with it before the
version is published here.
"""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from graftlm.adapters.store.advice import command
from graftlm.adapters.store.base_versions import Version
from graftlm.adapters.store.content import RUN, run_of
from graftlm.adapters.store.names import check_name
from graftlm.adapters.store.remote import RemoteVersion, check_fetched, reason
from graftlm.adapters.store.store import Store
from graftlm.errors import AdapterError, GraftError, StoreError
from graftlm.jsonfile import read_json

RECORD = "graft-version.json"


def push(version: Version, repository: str, private: bool) -> bool:
    """Upload a version in one commit, creating the repository if needed; returns False if the version is there already.

    The same commit deletes files of the previous version that this one does not have. Raises StoreError, also for a repository
    that has a version of another name or other content under this number, or is public although `private` is set.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    from graftlm.adapters.fetching import WANTED

    found = version.opened()
    names = [*found.files, *([RUN] if (version.folder / RUN).is_file() else [])]
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        head = api.model_info(repository)
        if private and not head.private:
            raise StoreError(
                f"{repository} is there already and is public; make it private on the hub, or leave --private out"
            )
        there = [str(file.rfilename) for file in head.siblings or ()]
        if RECORD in there and _holds(repository, str(head.sha), version):
            return False
        stale = [n for n in there if n not in names and any(fnmatch(n, w) for w in (*WANTED, RUN))]
        operations: list[Any] = [CommitOperationAdd(name, str(version.folder / name)) for name in names]
        operations.append(CommitOperationAdd(RECORD, json.dumps(version.event, indent=2).encode()))
        operations += [CommitOperationDelete(name) for name in stale]
        api.create_commit(
            repository, operations=operations, commit_message=f"{version.label} {version.digest[:12]}",
            parent_commit=head.sha,
        )  # fmt: skip
    except GraftError:
        raise
    except Exception as error:  # the client raises errors of its HTTP library and its storage
        raise StoreError(f"{repository} was not written on the hub: {reason(error)}") from None
    return True


def _holds(repository: str, commit: str, version: Version) -> bool:
    """Whether a repository has this version. Raises StoreError if it has another one that a push would overwrite."""
    from huggingface_hub import hf_hub_download

    there = _record(repository, Path(hf_hub_download(repository, RECORD, revision=commit)), version.base)
    if there.name != version.name:
        raise StoreError(
            f"{repository} holds {there.label}, and a repository has versions of one name; push to another one"
        )
    if there.number == version.number and there.digest != version.digest:
        raise StoreError(
            f"{repository} has another {version.label} ({there.digest[:12]}, yours is {version.digest[:12]}); "
            "publish yours as the next version, or push to another repository"
        )
    return there.digest == version.digest


def pull(store: Store, repository: str, name: str | None, revision: str | None) -> tuple[Version, bool]:
    """Download a repository's version, check it, and publish it here. Raises StoreError, AdapterError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    from graftlm.adapters.fetching import fetch
    from graftlm.adapters.manifest import read_manifest
    from graftlm.adapters.peft_folder import inspect_folder

    try:  # a separate request, since downloads fall back on the cache when the hub cannot be reached
        commit = HfApi().model_info(repository, revision=revision).sha
    except RepositoryNotFoundError:
        raise StoreError(
            f"no repository '{repository}' on the hub; check its spelling, or log in if it is private"
        ) from None
    except RevisionNotFoundError:
        raise StoreError(f"{repository} has no revision '{revision}'; give a branch, a tag or a commit") from None
    except Exception as error:
        raise StoreError(f"{repository} cannot be read on the hub: {reason(error)}") from None
    folder = fetch(repository, commit, beside=(RECORD, RUN))
    if not (folder / RECORD).is_file():
        raise StoreError(
            f"{repository} has no {RECORD}, so it was not pushed by graft; bring it in with: "
            f"{command('import', repository, '--name', name or repository.rpartition('/')[2], store=store.root)}"
        )
    try:
        manifest = read_manifest(folder)
    except AdapterError as error:
        raise StoreError(f"{repository} is damaged and was not published: {error}") from None
    if manifest is None:
        raise StoreError(f"{repository} has a {RECORD} and no graft.json; it is damaged and was not published")
    known = _record(repository, folder / RECORD, str(manifest["base"]["fingerprint"]))
    check_fetched(folder, known, repository, inspect_folder)
    number = known.number if name is None else None
    return store.publish(folder, name or known.name, number=number, event=known.event, run=run_of(folder))


def _record(repository: str, file: Path, base: str) -> RemoteVersion:
    """The version that a repository records. Raises StoreError."""
    try:
        event = read_json(file, StoreError)
        number = event["version"]
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"version is {number!r}")
        return RemoteVersion(base, check_name(str(event["name"])), number, str(event["digest"]), event)
    except (StoreError, ValueError, KeyError) as error:
        raise StoreError(f"{repository}: its {RECORD} is damaged ({reason(error)})") from None


__all__ = ["RECORD", "pull", "push"]
