"""A small HTTP client for `soak.py`: many requests a second from one process, over connections that may be cut at any event.

Run as a program it is the other end: a server that refuses everything with 429, and says on its first line at which port.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"  # nothing here talks to another machine


@dataclass
class Answer:
    """What came back, and when."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    seconds: float = 0.0
    first: float = 0.0
    """Seconds to the first byte of the body."""
    cut: bool = False
    """Whether the caller hung up before the end."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        """The text of a completion or a chat, whole or from its events."""
        if self.events:
            choices = [e["choices"][0] for e in self.events if e.get("choices")]
            return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)
        choice = self.json["choices"][0]
        return choice["text"] if "text" in choice else choice["message"]["content"]

    @property
    def error(self) -> str:
        """The code and message of an error, in an event or as the body."""
        said = next((e["error"] for e in self.events if "error" in e), None)
        if said is None and self.status != 200:
            said = self.json["error"]
        return "" if said is None else f"{said['code']}: {said['message']}"


class Connection:
    """One connection that is kept, and opened anew after it was cut."""

    def __init__(self, port: int, key: str = "") -> None:
        self._port, self._key = port, key
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: Any = None, *, leave_after: int | None = None) -> Answer:
        """Ask and read the answer; `leave_after` hangs up after so many events of a stream, 0 before the first.

        Raises OSError or EOFError where the server breaks the connection off.
        """
        if self._streams is None:
            self._streams = await asyncio.open_connection(HOST, self._port)
        reader, writer = self._streams
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(content)}\r\n"
        head += "Content-Type: application/json\r\n" if content else ""
        head += f"Authorization: Bearer {self._key}\r\n" if self._key else ""
        begun = time.monotonic()
        try:
            writer.write(f"{head}\r\n".encode() + content)
            await writer.drain()
            if leave_after == 0:
                await asyncio.sleep(0.01)
                self.cut()
                return Answer(0, {}, cut=True, seconds=time.monotonic() - begun)
            answer = await self._read(reader, begun, leave_after)
        except (OSError, EOFError):
            self.cut()
            raise
        answer.seconds = time.monotonic() - begun
        if answer.cut or answer.headers.get("connection") == "close":
            self.cut()
        return answer

    async def _read(self, reader: asyncio.StreamReader, begun: float, leave_after: int | None) -> Answer:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        answer = Answer(int(head[0].split()[1]), headers)
        streamed = headers.get("content-type", "").startswith("text/event-stream")
        async for part in _parts(reader, headers):
            answer.first = answer.first or time.monotonic() - begun
            if not streamed:
                answer.body += part
                continue
            for line in part.decode().split("\n"):
                if line.startswith("data: {"):
                    answer.events.append(json.loads(line[6:]))
            if leave_after is not None and len(answer.events) >= leave_after:
                answer.cut = True
                return answer
        return answer

    def cut(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


async def _parts(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """A body, in the pieces in which it was sent."""
    if "chunked" not in headers.get("transfer-encoding", ""):
        yield await reader.readexactly(int(headers.get("content-length", "0")))
        return
    while size := int(await reader.readline(), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)


class _Refusing(asyncio.Protocol):
    """Answers 429 to every request that comes in one piece or several."""

    _ANSWER = b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"

    def __init__(self) -> None:
        self._read = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._read += data
        while b"\r\n\r\n" in self._read:
            head, _, rest = self._read.partition(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
            if len(rest) < length:
                return
            self._read = rest[length:]
            self._transport.write(self._ANSWER)


async def _refuse() -> None:
    server = await asyncio.get_running_loop().create_server(_Refusing, HOST, 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_refuse())
