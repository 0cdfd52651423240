"""Authorization: API keys, each with the adapters it may use.

    keys:
      - name: team-a
        key: sk-team-a-...              # or sha256: the key's SHA-256 as 64 hexadecimal digits
        adapters: [formal, "house-*"]   # names or patterns; left out: all
        base: true                      # whether it may use the bare base
        admin: false                    # whether it may load, unload, alias and roll back

Without a file the server is open to anybody who reaches it, and nobody may change anything through it.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from graftlm.errors import ConfigError
from graftlm.yamlfile import read_yaml


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    key: Annotated[str, StringConstraints(min_length=8, max_length=512)] | None = None
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    adapters: list[str] = Field(default_factory=lambda: ["*"])
    base: bool = True
    admin: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give either key or sha256")
        return self


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    keys: Annotated[list[_Entry], Field(min_length=1)]


@dataclass(frozen=True)
class Tenant:
    """The holder of one key."""

    name: str
    adapters: tuple[str, ...] = ("*",)
    base: bool = True
    admin: bool = False

    def may_use(self, adapter: str) -> bool:
        """Whether an adapter of this name may be used; an empty name is the bare base."""
        return self.base if not adapter else any(fnmatch.fnmatchcase(adapter, pattern) for pattern in self.adapters)


ANYBODY = Tenant("")


class ApiKeys:
    """Finds the tenant of a key, by its hash."""

    def __init__(self, tenants: dict[str, Tenant] | None = None) -> None:
        self._tenants = tenants

    @property
    def required(self) -> bool:
        """Whether requests must have a key."""
        return self._tenants is not None

    @property
    def tenants(self) -> Sequence[Tenant]:
        return list((self._tenants or {"": ANYBODY}).values())

    def tenant(self, key: str | None) -> Tenant | None:
        """The tenant of a key; None for an unknown one."""
        if self._tenants is None:
            return ANYBODY
        return self._tenants.get(digest_of(key)) if key else None


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_api_keys(path: Path | None) -> ApiKeys:
    """Read a file of keys, YAML or JSON. Raises ConfigError that names the entry, never the key."""
    if path is None:
        return ApiKeys()
    try:
        found = _File.model_validate(read_yaml(path, ConfigError, secret=True))
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    tenants: dict[str, Tenant] = {}
    for entry in found.keys:
        digest = entry.sha256 or digest_of(entry.key or "")
        if digest in tenants:
            raise ConfigError(
                f"{path}: '{tenants[digest].name}' and '{entry.name}' have the same key; each needs its own"
            )
        if any(tenant.name == entry.name for tenant in tenants.values()):
            raise ConfigError(f"{path}: there are two keys named '{entry.name}'; names tell tenants apart")
        tenants[digest] = Tenant(entry.name, tuple(entry.adapters), entry.base, entry.admin)
    return ApiKeys(tenants)
