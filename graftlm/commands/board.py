"""`graft board`: one page over folders of runs and a store, served until a signal, or written as one file."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from graftlm.adapters.store import DEFAULT, Store
from graftlm.config import BoardConfig
from graftlm.dashboard.contents import Contents
from graftlm.dashboard.folders import Folders
from graftlm.dashboard.page import page_in_one_file
from graftlm.errors import ConfigError
from graftlm.files import write_text
from graftlm.progress import working
from graftlm.serving.http.listening import listen, url_host

if TYPE_CHECKING:
    import uvicorn


def board(config: BoardConfig, ready: Callable[[str], None] = lambda url: None) -> Path | None:
    """Serve until a signal; `ready` gets the address. With `out`, write the page and return the file instead.

    Raises ConfigError for folders that are not there, and where the extra `serve` is not installed; StoreError for a store that
    is none.
    """
    contents = open_contents(config)
    if config.out is not None:
        with working("reading the folders"):
            page = page_in_one_file(contents)
        try:
            config.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(config.out, page)
        except OSError as error:
            raise ConfigError(f"--out {config.out} cannot be written: {error.strerror or error}") from None
        return config.out
    try:
        import uvicorn

        from graftlm.dashboard.app import create_app
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "anyio"):
            raise
        raise ConfigError(f"graft board needs {error.name}; install it with: pip install 'graftlm[serve]'") from None

    class BoardServer(uvicorn.Server):
        """uvicorn, which a signal ends without an error."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.force_exit = self.should_exit
            self.should_exit = True

    sock = listen(config.host, config.port)
    try:
        settings = uvicorn.Config(
            create_app(contents, config.host), log_level="warning", access_log=False, lifespan="off", server_header=False,
            proxy_headers=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        ready(f"http://{url_host(config.host)}:{sock.getsockname()[1]}")
        _run(BoardServer(settings), sock)
    finally:
        sock.close()
    return None


def _run(server: uvicorn.Server, sock: socket.socket) -> None:
    """Serve until a signal; in a notebook, whose thread has a loop of its own already, until Ctrl-C or an interrupt."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        server.run(sockets=[sock])
        return
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        server.should_exit = True
        thread.join()


def open_contents(config: BoardConfig) -> Contents:
    """What the options name. Raises ConfigError and StoreError."""
    store = config.store
    if store is None and Store(DEFAULT).exists:
        store = DEFAULT
    if store is not None:
        Store(store).bases()  # a folder that is no store is refused at once
    return Contents(
        Folders([Path(folder) for folder in config.folder]), None if store is None else store.resolve(), config.server
    )
