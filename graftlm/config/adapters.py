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
        None,
        "base of the adapter, where adapters of several bases share a name: its name, or the first digits of its fingerprint",
    )


class PublishConfig(_InStore):
    """Options of `graft adapters publish`."""

    source: Path = option(..., "folder of a run, or of an adapter", argument=True)
    name: str = option(..., "name to publish under; each name counts its own versions")
    note: str = option("", "a line about this version")
    parents: Names = option((), "versions it was made from, besides those in its manifest")


class ListConfig(_OfBase):
    """Options of `graft adapters list`."""

    name: str | None = option(None, "list the versions of this name; default one line for each name", argument=True)


class ShowConfig(_OfBase):
    """Options of `graft adapters show`."""

    version: str = option(..., "version, such as formal@1, formal@prod, or formal for the newest", argument=True)


class DiffConfig(_OfBase):
    """Options of `graft adapters diff`."""

    first: str = option(..., "version to compare from", argument=True)
    second: str = option(..., "version to compare with", argument=True)


class VerifyConfig(_OfBase):
    """Options of `graft adapters verify`."""

    clean: bool = option(
        False, "also remove contents that no version refers to, and temporary files of interrupted commands"
    )


class AliasConfig(_OfBase):
    """Options of `graft adapters alias`."""

    name: str = option(..., "name of the adapter", argument=True)
    alias: str = option(..., "alias, such as prod", argument=True)
    version: int | None = option(None, "number of the version to point it at", ge=1, argument=True)
    delete: bool = option(False, "delete the alias")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.delete and self.version is not None:
            raise ValueError(
                f"--delete removes the alias {self.name}@{self.alias}, so it takes no number; leave {self.version} out"
            )
        return self


class RollbackConfig(_OfBase):
    """Options of `graft adapters rollback`."""

    name: str = option(..., "name of the adapter", argument=True)
    alias: str = option(..., "alias to point back at its previous version", argument=True)


class RemoveConfig(_OfBase):
    """Options of `graft adapters remove`."""

    version: str = option(..., "version by its number, such as formal@1", argument=True)


class ImportConfig(_InStore):
    """Options of `graft adapters import`."""

    source: str = option(..., "PEFT adapter: a folder, or a hub id", argument=True)
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

    version: str = option(..., "version in the store, or the folder of an adapter", argument=True)
    out: Path = option(
        ..., "folder to write, new or empty; for gguf a file that is not there yet, such as formal.gguf", argument=True
    )
    for_: Literal["peft", "vllm", "gguf"] = option(
        "peft",
        "format to write; `gguf` is one file for llama.cpp's --lora; an adapter that vLLM or llama.cpp cannot serve is refused",
    )
    gguf_type: Literal["f32", "f16"] = option("f32", "type of the tensors in the GGUF file")
    model: str | None = option(
        None, "base whose config.json names the layers, for vllm and gguf; default the one in the adapter's manifest"
    )
    trust_remote_code: bool = option(False, "run Python code that comes with the model")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        file = self.out.name.lower().endswith(".gguf")
        if self.for_ == "gguf" and not file:
            raise ValueError(f"--for gguf writes one file, whose name ends in .gguf, found '{self.out}'")
        if self.for_ != "gguf" and file:
            raise ValueError(f"--for {self.for_} writes a folder, and '{self.out}' names a GGUF file; add --for gguf")
        if self.for_ != "gguf" and "gguf_type" in self.model_fields_set:
            raise ValueError("--gguf-type is for --for gguf; leave it out")
        return self


class PushConfig(_OfBase):
    """Options of `graft adapters push`."""

    place: str = option(..., "s3://bucket/path (or another fsspec address), a hub id, or a folder", argument=True)
    versions: Names = option((), "versions to push; default all, and for a hub id exactly one", argument=True)
    private: bool = option(False, "create the hub repository as private")


class PullConfig(_InStore):
    """Options of `graft adapters pull`."""

    place: str = option(..., "s3://bucket/path (or another fsspec address), a hub id, or a folder", argument=True)
    versions: Names = option((), "versions to pull; default all", argument=True)
    name: str | None = option(None, "name to store it under, for one version; default its name at the source")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
