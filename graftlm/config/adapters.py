"""Options of `graft adapters ...`: one class a subcommand."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from graftlm.config.fields import Config, Names, Precision, option


class _InStore(Config):
    store: Path = option(Path("adapters"), "folder of the store")


class _OfBase(_InStore):
    base: str | None = option(
        None, "base of the name, where several have it: the first digits of its fingerprint, or what it is called"
    )


class PublishConfig(_InStore):
    """Options of `graft adapters publish`."""

    source: Path = option(..., "folder of a run, or of an adapter")
    name: str = option(..., "name to publish under; versions are counted for each name")
    note: str = option("", "a line about this version")
    parents: Names = option((), "versions that it was made from, beside those its manifest names")


class ListConfig(_OfBase):
    """Options of `graft adapters list`."""

    name: str | None = option(None, "one name, with each of its versions; default one line for each name")


class ShowConfig(_OfBase):
    """Options of `graft adapters show`."""

    version: str = option(..., "version, such as formal@1, formal@prod, or formal for the newest")


class DiffConfig(_OfBase):
    """Options of `graft adapters diff`."""

    first: str = option(..., "version to compare from")
    second: str = option(..., "version to compare with")


class VerifyConfig(_OfBase):
    """Options of `graft adapters verify`."""

    clean: bool = option(False, "also remove contents that no name has, and what dead writers left")


class AliasConfig(_OfBase):
    """Options of `graft adapters alias`."""

    name: str = option(..., "name of the adapter")
    alias: str = option(..., "alias, such as prod")
    version: int | None = option(None, "number of the version to point it at", ge=1)
    delete: bool = option(False, "take the alias away")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.delete and self.version is not None:
            raise ValueError(
                f"--delete takes {self.name}@{self.alias} away, so it takes no number; leave {self.version} out"
            )
        return self


class RollbackConfig(_OfBase):
    """Options of `graft adapters rollback`."""

    name: str = option(..., "name of the adapter")
    alias: str = option(..., "alias to point at what it pointed at before")


class RemoveConfig(_OfBase):
    """Options of `graft adapters remove`."""

    version: str = option(..., "version by its number, such as formal@1")


class ImportConfig(_InStore):
    """Options of `graft adapters import`."""

    source: str = option(..., "adapter of PEFT's: a folder, or a hub id")
    name: str = option(..., "name to publish under")
    model: str | None = option(None, "base it was trained on; default the one that its adapter_config.json names")
    base_precision: Precision | None = option(
        None, "how the base was stored in training, such as nf4 for QLoRA; default the checkpoint's own type"
    )
    note: str = option("", "a line about this version")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
    device: str | None = option(None, "cpu, cuda, ...; default the first GPU, else the CPU")


class ExportConfig(_OfBase):
    """Options of `graft adapters export`."""

    version: str = option(..., "version in the store, or the folder of an adapter")
    out: Path = option(..., "folder to write; it must not be there yet, or be empty")
    for_: Literal["peft", "vllm"] = option("peft", "who will read it; what cannot be served there is refused")
    model: str | None = option(None, "base whose config.json names the layers, for vllm; default what the adapter says")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")


class PushConfig(_OfBase):
    """Options of `graft adapters push`."""

    place: str = option(..., "s3://bucket/path (or another fsspec address), a hub id, or a folder")
    versions: Names = option((), "versions to push; default all, and for a hub id exactly one")
    private: bool = option(False, "make a new repository of the hub private")


class PullConfig(_InStore):
    """Options of `graft adapters pull`."""

    place: str = option(..., "s3://bucket/path (or another fsspec address), a hub id, or a folder")
    versions: Names = option((), "versions to pull; default all")
    name: str | None = option(None, "name to take it under here, for one version; default the name it has there")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
