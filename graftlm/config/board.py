"""Options of `graft board`."""

from __future__ import annotations

from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import model_validator

from graftlm.config.fields import Config, Sources, flag_name, option


class BoardConfig(Config):
    """Options of `graft board`."""

    folder: Sources = option(
        ("runs",),
        "folders with runs, sweeps and comparisons, at any depth; nothing outside them is read",
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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.server is not None:
            try:
                place = urlsplit(self.server)
                good = place.scheme in ("http", "https") and bool(place.hostname) and (place.port or 1) > 0
            except ValueError:
                good = False
            if not good:
                raise ValueError(f"server: '{self.server}' is no address; write it as http://127.0.0.1:8000")
        useless = sorted(self.model_fields_set & {"server", "host", "port"})
        if self.out is not None and useless:
            raise ValueError(
                f"out: a file is not served, so --{flag_name(useless[0])} does nothing; leave one of them out"
            )
        return self
