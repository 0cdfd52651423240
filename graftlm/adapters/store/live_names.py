"""The names of one base as they are now, for a process that stays: a server, or the follower of one.

Every look-up asks whether the journal has changed, and reads only its new lines. On a network file system the answer of `stat`
may come from a cache of this machine (NFS keeps one for 3 to 60 seconds), while opening a file asks the server (close-to-open
consistency, nfs(5)). So the journal is also opened once a second: another machine's change is seen within that second.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from graftlm.adapters.store.base_versions import BaseVersions
from graftlm.adapters.store.replay import NamedAdapter, apply_events
from graftlm.errors import StoreError

OPEN_SECONDS = 1.0
"""How old the answer of a network file system's cache may be."""
_log = logging.getLogger("graft.store")


class LiveNames:
    """Names that have versions, with their versions and aliases. May be used from several threads."""

    def __init__(self, base_versions: BaseVersions) -> None:
        self._journal = base_versions.journal
        self._follower = self._journal.follow()
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._opened = -OPEN_SECONDS
        self._all: dict[str, NamedAdapter] = {}
        self._names: dict[str, NamedAdapter] = {}
        self.fault = ""
        """Why the journal could not be read the last time; the names are then those that it had before."""

    def names(self) -> dict[str, NamedAdapter]:
        """The names that have versions, as they are now; none where there is no journal yet.

        A journal that is gone, cannot be read or is damaged now leaves the names as they were: Graft never removes one, but a
        volume may be lost for a while. Raises StoreError if it never was read.
        """
        with self._lock:
            try:
                seen, asked = self._state()
                if seen is None and self._seen is not None:
                    raise StoreError(f"{self._journal.path} is gone")
                again = asked or not self.fault  # what could not be read is tried again once a second
                if seen is not None and seen != self._seen and again:
                    anew, events = self._follower.news()
                    self._all = apply_events({} if anew else self._all, events)
                    self._names = {key: name for key, name in self._all.items() if name.versions}
                    self._seen = seen
                if seen == self._seen:
                    self.fault = ""
            except StoreError as error:
                self._follower = self._journal.follow()  # or the lines that were not understood would be passed over
                if self._seen is None:
                    raise
                if str(error) != self.fault:
                    _log.warning("the names stay as they were: %s", error)
                self.fault = str(error)
            return self._names

    def _state(self) -> tuple[tuple[int, int, int] | None, bool]:
        """What tells one state of the journal from the next, None where there is none; and whether the file was opened.

        Raises StoreError.
        """
        now = time.monotonic()
        ask = now - self._opened >= OPEN_SECONDS
        try:
            if ask:
                self._opened = now
                with self._journal.path.open("rb") as stream:
                    stat = os.fstat(stream.fileno())
            else:
                stat = self._journal.path.stat()
        except FileNotFoundError:
            return None, ask
        except OSError as error:
            raise StoreError(f"{self._journal.path} cannot be read: {error.strerror}") from None
        return (stat.st_ino, stat.st_size, stat.st_mtime_ns), ask
