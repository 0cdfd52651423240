"""Read a data file as lines of UTF-8, from plain text, gzip or UTF-16, in bounded memory.

Lines end with a line feed only, since JSON strings may contain the other line separators of Unicode. A line of more than 8 MB
is skipped and reported: as one example it would have about two million tokens.
"""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.errors import DataError

MOST_ROW_BYTES = 8 << 20
_STEP = 1 << 18  # bytes between two calls of `moved`
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip

Moved = Callable[[int], None]
"""Called with the number of bytes read from the file so far, before decompression."""


@dataclass(frozen=True, slots=True)
class Overlong:
    """A line that was skipped."""

    bytes: int


def lines(
    path: Path, name: str, moved: Moved | None = None, *, most: int = MOST_ROW_BYTES
) -> Iterator[bytes | Overlong]:
    """The lines of a file in UTF-8, with their line feeds. Raises DataError for invalid gzip or UTF-16."""
    with path.open("rb") as disk:
        stream = _stream(disk, path, name)
        read = reported = 0
        while True:
            try:
                line = stream.readline(most + 1)
                if not line:
                    return
                size = len(line)
                if size > most:
                    while not line.endswith(b"\n") and (line := stream.readline(_STEP)):
                        size += len(line)
                        if moved is not None:
                            moved(disk.tell())
                    yield Overlong(size)
                else:
                    yield line
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name} begins as {error.encoding} does and goes on otherwise; save it as UTF-8"
                ) from None
            except (OSError, EOFError) as error:
                raise DataError(
                    f"{name} cannot be read as gzip ({error}); write it again, or take .gz off its name"
                ) from error
            read += size
            if moved is not None and read - reported >= _STEP:
                reported = read
                moved(disk.tell())


def size_found(line: Overlong) -> str:
    return f"{line.bytes:,} bytes"


SIZE_EXPECTED = f"at most {MOST_ROW_BYTES:,} bytes a row"
SIZE_MEND = "split the text into several rows"


def not_utf8(line: bytes, error: UnicodeDecodeError, name: str) -> tuple[str, str]:
    """What is wrong in a line that is not UTF-8, and the command that converts the file."""
    around = line[max(0, error.start - 10) : error.start + 10]
    found = f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line is no UTF-8: {around!r}"
    # 0x80 to 0x9f are control characters in Latin-1, and quotes, dashes and the euro sign in Windows-1252.
    kind = "WINDOWS-1252" if any(0x80 <= byte <= 0x9F for byte in line) else "LATIN1"
    return found, f"convert the file, such as: iconv -f {kind} -t UTF-8 {name} > NEW_FILE"


def _stream(disk: io.BufferedReader, path: Path, name: str) -> Any:
    stream: Any = gzip.GzipFile(fileobj=disk) if path.suffix == ".gz" else disk
    try:
        head = bytes(stream.peek(4)[:4])
    except (OSError, EOFError) as error:
        raise DataError(f"{name} cannot be read as gzip ({error}); write it again, or take .gz off its name") from error
    coding = next((coding for mark, coding in _MARKS.items() if head.startswith(mark)), None)
    if coding is not None:
        return io.BufferedReader(_Recoded(stream, coding))
    if b"\0" in head:
        kind = "UTF-16LE" if head[1:2] == b"\0" else "UTF-16BE"
        raise DataError(
            f"{name} holds zero bytes: it seems to be {kind} without a byte order mark. Convert it: "
            f"iconv -f {kind} -t UTF-8 {name} > NEW_FILE"
        )
    return stream


class _Recoded(io.RawIOBase):
    """A stream in another Unicode encoding, read as UTF-8."""

    def __init__(self, stream: Any, coding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(coding)()
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            block = self._stream.read(1 << 16)
            self._left = self._decoder.decode(block, final=not block).encode()
            if not block:
                break
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count
