"""Options of `graft board`."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import field_validator, model_validator

from graftlm.config.fields import Config, Sources, flag_name, option, server_address


class BoardConfig(Config):
    """Options of `graft board`."""

    folder: Sources = option(
        ("runs",),
        "folders with runs, sweeps and comparisons, up to 8 levels deep; nothing outside them is read",
        argument=True,
    )
    store: Path | None = option(
        None, "folder of the adapter store; default `adapters` where that is one", group="contents"
    )
    server: str | None = option(
        None, "address of a running `graft serve`, or of any server with OpenAI's interface, for the playground",
        group="contents",
    )  # fmt: skip
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all", group="server")
    port: int = option(8010, "port to listen on; 0 for any free one", group="server", ge=0, le=65535)
    out: Path | None = option(
        None, "write the page with its present contents to this file instead of serving it", group="one file"
    )

    @field_validator("server")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return None if value is None else server_address(value, "give its key on the page")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        useless = sorted(self.model_fields_set & {"server", "host", "port"})
        if self.out is not None and useless:
            raise ValueError(
                f"out: a file is not served, so --{flag_name(useless[0])} does nothing; leave one of them out"
            )
        return self
