"""Keep a running vLLM in step with a store: what the store has, compared with what the server has, and brought over.

Every comparison begins with the server's own list, so a server that was restarted, or changed by somebody else, is brought
into step again. Only names whose folder is in `--out` are the follower's; other adapters of the server are left alone.

A name that moves to another version is unloaded and loaded again, a moment in which vLLM answers 404 for it. vLLM's
`load_inplace` has no such moment, but what is loaded with it is read from disk again in every later step (vLLM #33791, so
still in the sources of September 2026), and a request in flight would change its version. A version is loaded under its label
first, so that one that vLLM refuses never replaces one that works.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path, PurePath

from graftlm.adapters.store import LiveNames, Store, Version, parse
from graftlm.config import ServeConfig
from graftlm.errors import GraftError, StoreError
from graftlm.serving.vllm.client import VllmRefused, VllmServer, VllmUnreachable
from graftlm.serving.vllm.export import base_fingerprint, every_name, export_version, folder_of

Note = Callable[[str], None]
STORE_SECONDS = 1.0
"""How often the store is looked at."""
SERVER_SECONDS = 10.0
"""How often the server is, where the store has not changed."""
LONGEST_WAIT = 15.0
IN_STEP = ".in-step"
"""A file in `--out` while the server has what the store has and it takes; a readiness probe can look for it.

It is not there while the server has none of the store's names, or lacks one that it has had. A name that was refused from the
start does not take it away, nor does a version that was refused where the earlier one keeps the name: one bad adapter would
else take every pod out of service.
"""
_GONE = ""
"""In the place of a digest: the name is not in the store."""
_RANK = re.compile(r"rank (\d+) is greater than max_lora_rank (\d+)")


class VllmFollower:
    """Brings what a store has for one base to one vLLM server."""

    def __init__(self, config: ServeConfig, server: VllmServer, note: Note = lambda text: None) -> None:
        assert config.store is not None
        self.stopping = False
        """Set by a signal: `run` ends once the change in progress is complete."""
        self._config, self._server, self._note = config, server, note
        self._out = config.out.absolute()
        self._base_versions = Store(config.store).base_versions(base_fingerprint(config))
        self._live = LiveNames(self._base_versions)
        self._knows = False
        """Whether the store was read; before that, no name is known to be gone."""
        self._wanted: dict[str, Version] = {}
        self._refused: dict[str, str] = {}
        """The digest of the version that was refused for a name."""
        self._had: set[str] = set()
        """The names of the store that the server was seen to have."""
        self._left: dict[str, str] | None = None
        """What the server had after the last comparison; None where it must be asked anew."""
        self._said = ""

    def run(self) -> None:
        """Follow until `stopping`. Nothing that the server or the store does ends it."""
        wait, due = 1.0, 0.0
        try:
            self._mark(False)
            while not self.stopping:
                changed = self._look()
                if self._knows and (changed or time.monotonic() >= due):
                    try:
                        self.compare()
                    except (VllmUnreachable, VllmRefused) as error:
                        self._lost(error)
                        self._pause(wait)
                        wait = min(2 * wait, LONGEST_WAIT)
                        continue
                    wait, due = 1.0, time.monotonic() + SERVER_SECONDS
                self._pause(STORE_SECONDS)
        finally:
            self._mark(False)

    def compare(self) -> None:
        """Bring the server what it lacks, and take from it what the store no longer has.

        Raises VllmUnreachable, and VllmRefused where even the list of models is refused.
        """
        there = self._server.adapters()
        if self._left is None:
            self._say(f"reached    {self._server.url}: {len(there)} adapters, {len(self._wanted)} names in the store")
            self._warn_of_prefixes()
        if not self._in_step(there):
            self._mark(False)
        if there != self._left:  # a restart, or somebody else's change: what was refused may be taken now
            self._refused.clear()
        self._left = None
        for name, version in sorted(self._wanted.items(), key=lambda item: (item[0] in there, item[0])):
            if self.stopping:
                return
            if self._refused.get(name) == version.digest:
                continue
            served = name in there
            try:
                self._serve(name, version, there)
            except VllmUnreachable:
                raise
            except (GraftError, OSError) as error:  # a full disk, too
                if not served or name in there:  # else neither version is served, and it is tried in every comparison
                    self._refused[name] = version.digest
                self._note(f"refused    {self._explained(name, version, error, there.get(name))}")
        for name in [n for n, folder in there.items() if n not in self._wanted and self._is_ours(folder)]:
            self._take(name)
        self._left = self._server.adapters()
        self._mark(self._in_step(self._left))

    def _in_step(self, there: dict[str, str]) -> bool:
        """Whether the server has what of the store it takes (`IN_STEP` says what that is)."""
        has = {name for name in self._wanted if self._is_ours(there.get(name, ""))}
        self._had = (self._had & self._wanted.keys()) | has
        return self._had == has and (bool(has) or not self._wanted)

    # ---- the store -----------------------------------------------------------------------------------------------------

    def _look(self) -> bool:
        """Whether the names mean something else than at the last look; a store that cannot be read changes nothing."""
        try:
            names = self._live.names()
        except StoreError as error:
            self._say(f"store      {error}")
            return False
        if self._live.fault:
            self._say(f"store      the names stay as they were: {self._live.fault}")
        if self._config.adapter:
            wanted: dict[str, Version] = {}
            for text in self._config.adapter:
                reference = parse(text)
                name = names.get(reference.name)
                number = None if name is None else name.number_of(reference)
                if name is not None and number is not None:
                    wanted[text] = self._base_versions.version(name.versions[number])
        else:
            wanted = every_name(names, self._base_versions)
        changed = {n: v.digest for n, v in wanted.items()} != {n: v.digest for n, v in self._wanted.items()}
        self._wanted, self._knows = wanted, True
        if changed:
            self._refused.clear()
        return changed

    # ---- the server ----------------------------------------------------------------------------------------------------

    def _serve(self, name: str, version: Version, there: dict[str, str]) -> None:
        """Have the server answer a name with this version. Raises GraftError."""
        before = there.get(name)
        if before is not None and not self._is_ours(before):
            raise StoreError(f"the server has another adapter of this name, from {before}, which stays")
        if before is not None and PurePath(before).name.endswith(f"-{version.digest[:12]}"):
            return
        folder = folder_of(self._out, version)
        export_version(self._config, name, version, folder, self._note)
        if before is None:
            self._server.load(name, str(folder))
            self._note(f"loaded     {name}: {version.label}")
        else:
            self._replace(name, version, folder, before, there)
            self._note(f"moved      {name}: {_label(before)} -> {version.label}")
        there[name] = str(folder)

    def _replace(self, name: str, version: Version, folder: Path, before: str, there: dict[str, str]) -> None:
        """Load `folder` in place of `before`, which keeps the name if the server refuses. Raises VllmRefused.

        If the server then refuses `before` too, the name is taken out of `there`.
        """
        trial = version.label if version.label not in there else None
        if trial is not None:
            self._server.load(trial, str(folder))
        try:
            try:
                self._server.unload(name)
            except VllmRefused as error:
                if error.status != 404:  # some releases cannot unload what their cache has dropped meanwhile
                    self._server.load(name, str(folder), in_place=True)
                    return
            try:
                self._server.load(name, str(folder))
            except VllmRefused:
                del there[name]
                with contextlib.suppress(VllmRefused):
                    self._server.load(name, before)
                    there[name] = before
                raise
        finally:
            if trial is not None:
                with contextlib.suppress(VllmRefused):
                    self._server.unload(trial)

    def _take(self, name: str) -> None:
        """Unload a name that the store no longer has."""
        if self._refused.get(name) == _GONE:
            return
        try:
            self._server.unload(name)
        except VllmRefused as error:
            if error.status != 404:
                self._refused[name] = _GONE
                self._note(f"refused    {name}: the store has it no more, and vLLM does not unload it: {error}")
                return
        self._note(f"unloaded   {name}: the store has it no more")

    def _is_ours(self, folder: str) -> bool:
        return PurePath(folder).parent == PurePath(self._out)

    def _warn_of_prefixes(self) -> None:
        moving = [name for name in self._wanted if parse(name).number is None]
        if moving and self._server.caches_prefixes():
            self._note(
                f"prefixes   vLLM's prefix cache knows adapters by name: after {moving[0]} has moved, prompts that begin as "
                "earlier ones did are answered in part from the version before (vLLM #42125); start vLLM with "
                "--no-enable-prefix-caching"
            )

    # ---- what is said --------------------------------------------------------------------------------------------------

    def _explained(self, name: str, version: Version, error: Exception, before: str | None) -> str:
        """A refusal with its way out, and what happens to the name meanwhile."""
        text = str(error)
        rank = _RANK.search(text)
        if rank is not None:
            text = (
                f"{version.label} has rank {rank[1]}, and the running server takes {rank[2]} at most; start vLLM again with "
                f"--max-lora-rank {rank[1]}"
            )
        elif isinstance(error, VllmRefused) and error.status == 404 and text == "Not Found":
            text = "vLLM was started without VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; start it again with the printed command"
        elif isinstance(error, VllmRefused) and error.status == 404:
            text += f"; {self._out} must be the same folder where vLLM runs (--out)"
        text = text.removeprefix(f"{name}: ").rstrip(".")
        rest = f"{_label(before)} keeps the name" if before is not None else "the name is not served"
        return f"{name}: {text}. Until then {rest}; tried again when the store or the server changes"

    def _lost(self, error: GraftError) -> None:
        """Say once why the server cannot be brought into step now; the next comparison asks it anew."""
        text = str(error)
        if isinstance(error, VllmRefused) and error.status in (401, 403):
            text = (
                f"{self._server.url} wants its API key ({text}); set VLLM_API_KEY to the one that vLLM was started with"
            )
        self._say(f"waiting    {text}; tried again, after {LONGEST_WAIT:g} s at most")
        self._left = None
        self._mark(False)

    def _say(self, text: str) -> None:
        if text != self._said:
            self._note(text)
        self._said = text

    def _mark(self, in_step: bool) -> None:
        with contextlib.suppress(OSError):
            if in_step:
                (self._out / IN_STEP).touch()
            else:
                (self._out / IN_STEP).unlink(missing_ok=True)

    def _pause(self, seconds: float) -> None:
        """Sleep, in short naps: a signal's handler may set `stopping`, and may not touch a lock."""
        end = time.monotonic() + seconds
        while not self.stopping and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))


def _label(folder: str) -> str:
    """`formal@3` from the folder that an export of it has."""
    return PurePath(folder).name.rpartition("-")[0] or folder
