"""A stub of the Hugging Face hub on 127.0.0.1: as much of its protocol as fetching a model takes."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

COMMIT = "5" * 40


class Hub:
    """Serves folders as models; `asked` holds the paths of all requests."""

    def __init__(self, models: dict[str, Path]) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(body=True)

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def log_message(self, format: str, *args: Any) -> None: ...

            def answer(self, *, body: bool) -> None:
                path = self.path.partition("?")[0].strip("/")
                hub.asked.append(path)
                api = path.removeprefix("api/models/")
                name = next((m for m in models if (api if api != path else path).startswith(m)), None)
                if name is None:
                    self.send(404, b'{"error": "Repository not found"}', body, {"X-Error-Code": "RepoNotFound"})
                elif api != path and "/tree/" in path:
                    files = [
                        {"type": "file", "oid": "0" * 40, "size": f.stat().st_size, "path": f.name}
                        for f in sorted(models[name].iterdir())
                    ]
                    self.send(200, json.dumps(files).encode(), body, {"Content-Type": "application/json"})
                elif api != path:
                    siblings = [{"rfilename": f.name} for f in sorted(models[name].iterdir())]
                    info = {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "siblings": siblings,
                            "private": False, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
                    self.send(200, json.dumps(info).encode(), body, {"Content-Type": "application/json"})
                else:
                    file = models[name] / path.rpartition("/")[2]
                    if not file.is_file():
                        self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
                        return
                    content = file.read_bytes()
                    tag = hashlib.sha256(content).hexdigest()
                    self.send(200, content, body, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

            def send(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

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
