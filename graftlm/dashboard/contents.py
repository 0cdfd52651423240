"""All that a board shows, as plain values; what was read is kept, so that a request reads only what has changed.

    overview()       every run, sweep and comparison in a line each
    run(id)          one run; curve(id, ...) its curve
    sweep(id)  comparison(id)  adapters()

Unknown ids are None. Requests come from several threads, and one reads at a time.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graftlm.dashboard import lineage
from graftlm.dashboard.experiments import REPORT, SweepReader, comparison
from graftlm.dashboard.folders import Folders, Item, Scan
from graftlm.dashboard.runs import OUTCOME, RunReader
from graftlm.errors import GraftError
from graftlm.experiments.sweep.results import Points

SCAN_SECONDS = 1.5
"""Requests within so many seconds share one look at the folders."""
MOST_PARSED = 128
"""Runs whose steps are kept in memory, about 0.6 MB for 10,000 steps."""


class Contents:
    """What lies in the folders, and in a store."""

    def __init__(self, folders: Folders, store: Path | None = None, server: str | None = None) -> None:
        self.folders, self.store, self.server = folders, store, server
        self._scan, self._at = Scan(), -math.inf
        self._runs: dict[str, RunReader] = {}
        self._sweeps: dict[str, SweepReader] = {}
        self._parsed: list[str] = []
        self._lock = threading.RLock()

    def overview(self) -> dict[str, Any]:
        """Every run, sweep and comparison in a line each."""
        with self._lock:
            scan = self._look()
            lines = {item.id: self._line(item) for item in scan.of("run")}
            return {
                "cut": scan.cut, "runs": list(lines.values()), "server": self.server is not None,
                "store": self.store is not None,
                "sweeps": [self._group(item, scan, lines) for item in scan.of("sweep")],
                "comparisons": [self._group(item, scan, lines) for item in scan.of("comparison")],
            }  # fmt: skip

    def run(self, id: str) -> dict[str, Any] | None:
        """Everything about a run."""
        with self._lock:
            reader = self._reader(id)
            if reader is None:
                return None
            reader.refresh()
            return reader.everything()

    def curve(self, id: str, generation: int = -1, width: int = 0, known: int = 0) -> dict[str, Any] | None:
        """A run's steps and evaluations, without the first `known` points where they are the same (`MetricsLog.curve`)."""
        with self._lock:
            reader = self._reader(id)
            if reader is None:
                return None
            self._keep_parsed(id)
            reader.refresh(parse=True)
            log = reader.log
            found = log.curve(generation, width, known)
            evals = [[e["step"], e["eval_loss"], e.get("num_tokens"), e.get("eval_score")] for e in log.evals]
            return {"id": id, "generation": log.generation, **asdict(found), "evals": evals}

    def sweep(self, id: str) -> dict[str, Any] | None:
        """A sweep with its trials."""
        with self._lock:
            scan = self._look()
            item = scan.items.get(id)
            if item is None or item.kind != "sweep":
                return None
            reader = self._sweeps.setdefault(id, SweepReader(item, self.folders))
            lines = [self._trial(run) for run in scan.parts(item)]
            return reader.value(lines, self._losses)

    def _trial(self, run: Item) -> dict[str, Any]:
        line, reader = self._line(run), self._open(run)
        more = {"config": reader.config, "outcome": reader.file(OUTCOME), "folder": str(run.folder)}
        return {**line, **more}

    def comparison(self, id: str) -> dict[str, Any] | None:
        """A comparison with its methods."""
        with self._lock:
            scan = self._look()
            item = scan.items.get(id)
            if item is None or item.kind != "comparison":
                return None
            return comparison(item, self.folders, [self._line(run) for run in scan.parts(item)])

    def adapters(self) -> dict[str, Any] | None:
        """The store; None without one."""
        if self.store is None:
            return None
        with self._lock:
            lines = [self._line(item) for item in self._look().of("run")]
            return lineage.adapters(self.store, {line["adapter"]: line["id"] for line in lines if line["adapter"]})

    def report(self, id: str) -> bytes | None:
        """The report.html that a sweep or comparison has written; None where there is none."""
        with self._lock:
            item = self._look().items.get(id)
        if item is None or item.kind == "run":
            return None
        try:
            with self.folders.opened(item.folder / REPORT) as stream:
                return stream.read()
        except (GraftError, OSError):
            return None

    def _look(self) -> Scan:
        if time.monotonic() - self._at > SCAN_SECONDS:
            self._scan = self.folders.scan()
            self._at = time.monotonic()
            self._runs = {id: reader for id, reader in self._runs.items() if id in self._scan.items}
        return self._scan

    def _reader(self, id: str) -> RunReader | None:
        item = self._look().items.get(id)
        return self._open(item) if item is not None and item.kind == "run" else None

    def _open(self, item: Item) -> RunReader:
        if item.id not in self._runs:
            self._runs[item.id] = RunReader(item, self.folders)
        return self._runs[item.id]

    def _line(self, item: Item) -> dict[str, Any]:
        reader = self._open(item)
        reader.refresh()
        return reader.line()

    def _keep_parsed(self, id: str) -> None:
        """Of the runs whose steps are in memory, the one that was asked for longest ago makes room."""
        self._parsed = [*(one for one in self._parsed if one != id), id]
        while len(self._parsed) > MOST_PARSED:
            self._runs.pop(self._parsed.pop(0), None)

    def _losses(self, folder: Path) -> Points:
        found = self._reader(Item("run", folder, "").id)
        if found is None:
            return ()
        return tuple((e["step"], e["eval_loss"]) for e in found.log.evals if e["eval_loss"] is not None)

    def _group(self, item: Item, scan: Scan, lines: dict[str, dict[str, Any]]) -> dict[str, Any]:
        own: Sequence[dict[str, Any]] = [lines[part.id] for part in scan.parts(item)]
        losses = [line["eval_best"] for line in own if line["eval_best"] is not None]
        models = Counter(line["model"] for line in own if line["model"])
        return {
            "id": item.id, "name": item.name, "runs": len(own), "states": dict(Counter(line["state"] for line in own)),
            "best": min(losses, default=None), "model": models.most_common(1)[0][0] if models else None,
            "modified": max((line["modified"] for line in own if line["modified"] is not None), default=None),
        }  # fmt: skip
