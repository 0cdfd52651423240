"""The socket of a server: `graft serve` and `graft board` open theirs here."""

from __future__ import annotations

import socket

from graftlm.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """A socket on an address; port 0 is any free one. Raises ConfigError where it is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except OSError as error:
        place.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}; take another --port") from None
    place.listen(2048)
    place.setblocking(False)
    return place


def url_host(host: str) -> str:
    """A host as a URL has it, one that can be reached."""
    return f"[{host}]" if ":" in host else "127.0.0.1" if host == "0.0.0.0" else host
