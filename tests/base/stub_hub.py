"""A stub of the Hugging Face hub on 127.0.0.1: as much of its protocol as fetching a model and pushing an adapter take.

A repository is a list of commits, each the bytes of its files by name. Large files come by git-lfs: the client asks where to
put them, puts them, and then commits their checksums; a commit that names one which never came is refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

COMMIT = "5" * 40
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    sha: str
    files: dict[str, bytes]
    message: str = ""


class Hub:
    """Serves folders as models, and what is pushed; `asked` holds the paths of all requests.

    `breaks(method, path)` says whether the connection is cut off instead of an answer.
    """

    def __init__(self, models: dict[str, Path] | None = None) -> None:
        self.asked: list[str] = []
        self.repositories: dict[str, list[Commit]] = {}
        for name, folder in (models or {}).items():
            self.add(name, folder)
        self.objects: dict[str, bytes] = {}
        self.breaks: Callable[[str, str], bool] = lambda method, path: False
        self.private: dict[str, bool] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer()

            def do_HEAD(self) -> None:
                self.answer()

            def do_POST(self) -> None:
                self.answer()

            def do_PUT(self) -> None:
                self.answer()

            def log_message(self, format: str, *args: Any) -> None: ...

            def answer(self) -> None:
                path = unquote(self.path.partition("?")[0].strip("/"))
                hub.asked.append(path)
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if hub.breaks(self.command, path):
                    self.close_connection = True
                    return
                status, content, headers = hub.answer(self.command, path, sent)
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def add(self, name: str, folder: Path) -> None:
        """Put a repository there, with what lies in a folder now."""
        self.repositories[name] = [Commit(COMMIT, {f.name: f.read_bytes() for f in sorted(folder.iterdir())})]

    # ---- what it says ------------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, sent: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers for a request."""
        if path == "api/repos/create":
            return self._create(json.loads(sent))
        if path.startswith("lfs/"):
            self.objects[path.removeprefix("lfs/")] = sent
            return 200, b"", {}
        rest = path.removeprefix("api/models/")
        name = "/".join(rest.split("/")[:2])
        if rest == path and method == "POST":
            name = name.removesuffix(".git")
        if name not in self.repositories:
            return 404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}
        what = rest.removeprefix(name).removeprefix(".git").strip("/")
        if method == "POST":
            return self._written(name, what, json.loads(sent) if not what.startswith("commit/") else sent)
        if rest == path:  # NAME/resolve/REVISION/FILE
            _, revision, file = what.split("/", 2)
            return self._file(self._at(name, revision), file)
        revision = what.split("/")[1] if "/" in what else "main"
        commit = self._at(name, revision)
        if commit is None:
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        if what.startswith("tree/"):
            found = [{"type": "file", "oid": "0" * 40, "size": len(b), "path": n} for n, b in commit.files.items()]
            return 200, json.dumps(found).encode(), JSON
        info = {
            "_id": "1", "id": name, "modelId": name, "sha": commit.sha, "private": self.private.get(name, False),
            "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": n} for n in commit.files],
        }  # fmt: skip
        return 200, json.dumps(info).encode(), JSON

    def _at(self, name: str, revision: str) -> Commit | None:
        commits = self.repositories[name]
        return commits[-1] if revision == "main" else next((c for c in commits if c.sha == revision), None)

    def _file(self, commit: Commit | None, file: str) -> tuple[int, bytes, dict[str, str]]:
        content = commit.files.get(file) if commit is not None else None
        if commit is None or content is None:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        return 200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit.sha}

    def _create(self, asked: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.repositories else 200
        if status == 200:
            self.repositories[name] = [Commit("0" * 40, {".gitattributes": b""})]
            self.private[name] = asked.get("visibility") == "private"
        return status, json.dumps({"url": f"{self.endpoint}/{name}"}).encode(), JSON

    def _written(self, name: str, what: str, sent: Any) -> tuple[int, bytes, dict[str, str]]:
        if what.startswith("preupload/"):
            large = {f["path"]: f["path"].endswith(".safetensors") for f in sent["files"]}
            files = [
                {"path": p, "shouldIgnore": False, "uploadMode": "lfs" if big else "regular"}
                for p, big in large.items()
            ]
            return 200, json.dumps({"files": files}).encode(), JSON
        if what == "info/lfs/objects/batch":
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.endpoint}/lfs/{o['oid']}"}}} if o["oid"] not in self.objects else o
                for o in sent["objects"]
            ]  # fmt: skip
            return 200, json.dumps({"transfer": "basic", "objects": objects}).encode(), JSON
        lines = [json.loads(line) for line in sent.splitlines()]
        return self._commit(name, lines[0]["value"], lines[1:])

    def _commit(
        self, name: str, header: dict[str, Any], lines: list[dict[str, Any]]
    ) -> tuple[int, bytes, dict[str, str]]:
        """All of it or nothing, and only on top of the commit that the client looked at."""
        head = self.repositories[name][-1]
        if header.get("parentCommit") not in (None, head.sha):
            return 412, b'{"error": "A commit has happened since. Please refresh and try again."}', JSON
        files = dict(head.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.objects.get(value["oid"])
                if content is None or hashlib.sha256(content).hexdigest() != value["oid"]:
                    return 400, b'{"error": "an LFS object of this commit was never uploaded"}', JSON
                files[value["path"]] = content
            else:
                del files[value["path"]]
        sha = hashlib.sha1(json.dumps([head.sha, sorted(files)]).encode()).hexdigest()
        self.repositories[name].append(Commit(sha, files, header["summary"]))
        done = {"success": True, "commitOid": sha, "commitUrl": f"{self.endpoint}/{name}/commit/{sha}"}
        return 200, json.dumps(done).encode(), JSON

    # ---- running it --------------------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
