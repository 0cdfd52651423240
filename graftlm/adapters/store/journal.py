"""The journal of a base: an append-only log of publishes, aliases, rollbacks and removals, one line for each event.

    5f1c0e0b9d0a7c44 {"do":"publish","name":"formal","version":1,"digest":"9f2c...","at":"2026-01-31T12:00:00+00:00",...}
    c0b1a2f3e4d59687 {"do":"alias","name":"formal","alias":"prod","version":1,"at":...}

A line begins with a checksum over itself and the line before, which detects a flipped byte, a lost line and a changed order.
Writers hold a lock that the operating system releases when a process ends, and a line is flushed to disk before the lock is
released. A line that a crash cut short has no newline: readers skip it, and the next writer removes it. Any other incomplete
end is damage.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftlm.errors import StoreError
from graftlm.files import flush
from graftlm.jsonfile import parse_json

_START = "0" * 16
_SUM = 16  # hexadecimal digits of the checksum in front of a line
_CUT_SHORT = re.compile(rb"[0-9a-f]{0,16}|[0-9a-f]{16} (\{.*)?", re.DOTALL)
"""The beginning of a line that was cut short."""

Event = dict[str, Any]


def _sum(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}{text}".encode()).hexdigest()[:_SUM]


class Journal:
    """The events of one base, in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = path.with_name(".lock")

    def read(self) -> list[Event]:
        """The event of every complete line, oldest first. Raises StoreError for a damaged line."""
        return self.parse(self._bytes())[0]

    def follow(self) -> JournalFollower:
        """A reader for repeated reads, which reads only new lines."""
        return JournalFollower(self)

    @contextmanager
    def writing(self) -> Iterator[JournalWriter]:
        """Lock the journal and read its events; other writers wait. Raises StoreError as `read` does."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self._lock, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise StoreError(f"{self.path.parent} cannot be written to: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            events, last, whole = self.parse(self._bytes())
            yield JournalWriter(self.path, events, last, whole)
        finally:
            os.close(descriptor)

    def _bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read: {error.strerror}") from None

    def parse(self, data: bytes, last: str = _START) -> tuple[list[Event], str, int]:
        """The events, the last checksum, and the number of bytes in complete lines; `last` is the previous checksum."""
        whole = data.rfind(b"\n") + 1
        events: list[Event] = []
        for number, line in enumerate(data[:whole].splitlines(keepends=True), 1):
            try:
                text = line.decode()
                found, body = text[:_SUM], text[_SUM + 1 : -1]
                if text[_SUM] != " " or found != _sum(last, body):
                    raise ValueError
                events.append(parse_json(body))
            except (ValueError, IndexError):
                raise StoreError(
                    f"{self.path} is damaged at line {number}: it is not as it was written. Put the file back from a "
                    "backup, or pull its versions again into another store; the versions beside it are not touched"
                ) from None
            last = found
        if not _CUT_SHORT.fullmatch(data[whole:].rstrip(b"\0")):  # some file systems append zeros after a crash
            raise StoreError(
                f"{self.path} is damaged after line {len(events)}: these bytes are not a line that was cut short"
            )
        return events, last, whole


class JournalFollower:
    """Reads a journal incrementally: lines that were read and verified are not read again."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._begin()

    def _begin(self) -> None:
        self._file: int | None = None
        self._whole, self._last = 0, _START

    def news(self) -> tuple[bool, list[Event]]:
        """Whether the events start again (the first read, or another file), and the new events. Raises StoreError."""
        try:
            with self._journal.path.open("rb") as stream:
                stat = os.fstat(stream.fileno())
                if stat.st_ino != self._file or stat.st_size < self._whole:
                    self._begin()
                stream.seek(self._whole)
                data = stream.read()
        except FileNotFoundError:
            self._begin()
            return True, []
        except OSError as error:
            raise StoreError(f"{self._journal.path} cannot be read: {error.strerror}") from None
        anew = self._whole == 0
        try:
            events, self._last, whole = self._journal.parse(data, self._last)
        except StoreError:
            if anew:
                raise
            self._begin()  # the journal was replaced; read it from its first line
            return self.news()
        self._file, self._whole = stat.st_ino, self._whole + whole
        return anew, events


class JournalWriter:
    """The journal while it is locked."""

    def __init__(self, path: Path, events: list[Event], last: str, whole: int) -> None:
        self.path, self.events, self._last, self._whole = path, events, last, whole

    def append(self, event: Mapping[str, Any]) -> None:
        """Append an event and flush it to disk. Raises StoreError if it cannot be written."""
        text = json.dumps(event, ensure_ascii=True, separators=(",", ":"))
        last = _sum(self._last, text)
        line = f"{last} {text}\n".encode()
        fresh = not self.path.exists()
        try:
            with self.path.open("r+b" if not fresh else "xb") as stream:
                stream.truncate(self._whole)  # remove what a crash cut short
                stream.seek(self._whole)
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            if fresh:
                flush(self.path.parent)  # or a new file may be lost in a crash
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._whole)
            raise StoreError(f"{self.path} cannot be written: {error.strerror}; nothing was recorded") from None
        self.events.append(dict(event))
        self._last, self._whole = last, self._whole + len(line)


__all__ = ["Event", "Journal", "JournalFollower", "JournalWriter"]
