"""What happened to the names of a base, one line an event: the store's only file that ever changes, and only at its end.

    5f1c0e0b9d0a7c44 {"do":"publish","name":"formal","version":1,"digest":"9f2c...","at":"2026-01-31T12:00:00+00:00",...}
    c0b1a2f3e4d59687 {"do":"alias","name":"formal","alias":"prod","version":1,"at":...}

A line begins with a checksum over itself and the line before, so a flipped byte, a lost line and a changed order are all
found. Writers take turns by a lock that the system gives back with a dying process, and a line is on the disk before the
lock is free. A line that a crash cut short has no end: readers leave it out, and the next writer takes it away. Other bytes
than the beginning of a line are damage.
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
from graftlm.jsonfile import parse_json

_START = "0" * 16
_SUM = 16  # hexadecimal digits of the checksum in front of a line
_CUT_SHORT = re.compile(rb"[0-9a-f]{0,16}|[0-9a-f]{16} (\{.*)?", re.DOTALL)
"""The beginning of a line, as far as it came."""

Event = dict[str, Any]


def _sum(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}{text}".encode()).hexdigest()[:_SUM]


class Journal:
    """One base's events, in a file of their own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = path.with_name(".lock")

    def read(self) -> list[Event]:
        """Every whole line's event, oldest first. Raises StoreError for a line that is not as it was written."""
        return self.parse(self._bytes())[0]

    def follow(self) -> JournalFollower:
        """For somebody who reads it again and again, however long it grows."""
        return JournalFollower(self)

    @contextmanager
    def writing(self) -> Iterator[JournalWriter]:
        """Hold the journal alone, with all of its events; other writers wait. Raises StoreError as `read` does."""
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
        """The events, the last checksum, and how many bytes the whole lines take; `last` is that of the line before."""
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
        if not _CUT_SHORT.fullmatch(data[whole:].rstrip(b"\0")):  # some file systems fill up with zeros after a crash
            raise StoreError(
                f"{self.path} is damaged after line {len(events)}: what stands there is no line that was cut short"
            )
        return events, last, whole


class JournalFollower:
    """Reads a journal on: what it has read once, and found to be as it was written, it reads no more."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._begin()

    def _begin(self) -> None:
        self._file: int | None = None
        self._whole, self._last = 0, _START

    def news(self) -> tuple[bool, list[Event]]:
        """Whether the events begin anew, as at first or in another file, and those that came since. Raises StoreError."""
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
            self._begin()  # another journal was written over it; if this one is damaged, its lines are named from the first
            return self.news()
        self._file, self._whole = stat.st_ino, self._whole + whole
        return anew, events


class JournalWriter:
    """The journal while it is held."""

    def __init__(self, path: Path, events: list[Event], last: str, whole: int) -> None:
        self.path, self.events, self._last, self._whole = path, events, last, whole

    def append(self, event: Mapping[str, Any]) -> None:
        """Add an event; it is on the disk when this returns. Raises StoreError when it cannot be written."""
        text = json.dumps(event, ensure_ascii=True, separators=(",", ":"))
        last = _sum(self._last, text)
        line = f"{last} {text}\n".encode()
        fresh = not self.path.exists()
        try:
            with self.path.open("r+b" if not fresh else "xb") as stream:
                stream.truncate(self._whole)  # what a crash cut short
                stream.seek(self._whole)
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            if fresh:
                flush_folder(self.path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._whole)
            raise StoreError(f"{self.path} cannot be written: {error.strerror}; nothing was recorded") from None
        self.events.append(dict(event))
        self._last, self._whole = last, self._whole + len(line)


def flush_folder(folder: Path) -> None:
    """Bring a folder's entries onto the disk: without it a crash may forget a file that was just made."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["Event", "Journal", "JournalFollower", "JournalWriter", "flush_folder"]
