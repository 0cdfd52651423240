"""The folders of a board: what may be read, and which runs, sweeps and comparisons lie there.

An item is asked for by its id, a digest of its place, and found in the last scan: no path ever comes from a request. A scan
follows no links, and `checked` and `opened` refuse a file that is a link, lies behind one, or is no plain file (reading a pipe
would never end). So nothing outside the folders can be read, whatever they hold.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

from graftlm.errors import ConfigError, RunError
from graftlm.experiments.sweep.storage import MARK as SWEEP_MARK
from graftlm.jsonfile import read_json
from graftlm.training.run_files import CONFIG, METRICS, PLAN

Kind = Literal["run", "sweep", "comparison"]
COMPARISON_MARK = "compare.json"
MOST_DEPTH, MOST_FOLDERS, MOST_ITEMS = 8, 20_000, 5_000
"""Of a scan: levels, folders that are looked into, and items that are kept."""


@dataclass(frozen=True)
class Item:
    """A run, a sweep or a comparison, by its folder."""

    kind: Kind
    folder: Path
    name: str
    """Its place below the board's folder, as the page shows it."""
    parent: str | None = None
    """The id of the sweep or comparison that it is part of."""
    role: str = ""
    """What it is there: `trials/0003`, `runs/lora/seed-0`."""

    @cached_property
    def id(self) -> str:
        return hashlib.sha256(str(self.folder).encode(errors="surrogateescape")).hexdigest()[:16]


@dataclass
class Scan:
    """What was found."""

    items: dict[str, Item] = field(default_factory=dict[str, Item])
    cut: bool = False
    """Whether there is more than is looked at."""

    def of(self, kind: Kind) -> list[Item]:
        return [item for item in self.items.values() if item.kind == kind]

    def parts(self, item: Item) -> list[Item]:
        """The runs of a sweep or comparison."""
        return [one for one in self.items.values() if one.parent == item.id]


class Folders:
    """The folders that the board shows."""

    def __init__(self, given: Sequence[Path]) -> None:
        """Raises ConfigError for one that is not there."""
        self.roots: list[Path] = []
        for path in given:
            if not path.is_dir():
                what = "is a file" if path.exists() else "is not there"
                raise ConfigError(f"folder: {path} {what}; name a folder that holds runs, such as the --out of one")
            found = path.resolve()
            if found not in self.roots:
                self.roots.append(found)

    def scan(self) -> Scan:
        """Every run, sweep and comparison, in the order of their names. Folders that cannot be listed are left out."""
        scan, left = Scan(), [MOST_FOLDERS]
        for root in self.roots:
            shown = root.name or str(root)
            for item in _walk(root, shown if len(self.roots) > 1 else "", shown, None, 0, left, scan):
                scan.items[item.id] = item
                if len(scan.items) >= MOST_ITEMS:
                    scan.cut = True
                    return scan
        scan.cut = scan.cut or left[0] <= 0
        return scan

    def checked(self, path: Path) -> Path:
        """The path of a file that may be read. Raises RunError for any other."""
        root = next((root for root in self.roots if path.is_relative_to(root)), None)
        return checked_below(path, root)

    def opened(self, path: Path) -> BinaryIO:
        """A file that may be read, open: of what is open it is sure that it is a plain file. Raises RunError for any other."""
        try:
            descriptor = os.open(self.checked(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:  # it has gone, or became a link since it was looked at
            raise RunError(f"{path.name} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise RunError(f"{path.name} is no plain file and is not read")
        return os.fdopen(descriptor, "rb")


def checked_below(path: Path, root: Path | None) -> Path:
    """The path of a plain file below a folder, not behind a link. Raises RunError for any other."""
    if root is None or ".." in path.parts:
        raise RunError(f"{path.name} lies outside the board's folders and is not read")
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise RunError(f"{path.name} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        what = "a link" if stat.S_ISLNK(mode) else "no plain file"
        raise RunError(f"{path.name} is {what} and is not read")
    for above in path.parents:
        if above == root:
            break
        if above.is_symlink():
            raise RunError(f"{path.name} lies behind the link {above.name} and is not read")
    return path


def object_in(path: Path, folders: Folders) -> tuple[dict[str, Any], str | None]:
    """The object in a JSON file, and what is wrong with it; a file that is not there is an empty object."""
    if not os.path.lexists(path):
        return {}, None
    try:
        with folders.opened(path) as stream:
            return read_json(path, RunError, stream=stream), None
    except RunError as error:
        return {}, str(error).replace(str(path), path.name)


def _walk(
    folder: Path, name: str, shown: str, group: tuple[Item, Path] | None, depth: int, left: list[int], scan: Scan
) -> Iterator[Item]:
    left[0] -= 1
    if left[0] <= 0:
        return
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
            files = {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
            below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    label = name or shown
    if CONFIG in files and (METRICS in files or PLAN in files):
        role = "" if group is None else str(folder.relative_to(group[1]))
        yield Item("run", folder, label, None if group is None else group[0].id, role)
        return
    for mark, kind in ((SWEEP_MARK, "sweep"), (COMPARISON_MARK, "comparison")):
        if mark in files:
            item = Item("sweep" if kind == "sweep" else "comparison", folder, label)
            yield item
            group = (item, folder)
    below = [entry for entry in below if not entry.startswith(".")]
    if depth >= MOST_DEPTH:
        scan.cut = scan.cut or bool(below)
        return
    for entry in below:
        yield from _walk(folder / entry, f"{name}/{entry}" if name else entry, shown, group, depth + 1, left, scan)
