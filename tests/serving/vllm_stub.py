"""A server with vLLM's endpoints for adapters, as its documentation and sources of 2025 and 2026 have them; no model.

What differs between releases is a field: whether `load_inplace` is known, the status of an adapter that cannot be loaded, the
form of errors, and whether an unload asks the engine, which refuses for an adapter that its cache has dropped.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BASE = "served-base"


class VllmStub:
    """What the server has and was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.key: str | None = None
        self.runtime_updating = True
        self.knows_load_inplace = True
        self.flat_errors = False
        self.load_failed_status = 500
        self.max_lora_rank = 16
        self.prefix_caching = False
        self.dropped: set[str] = set()
        """Names that the engine's cache has dropped, and that a release which asks it cannot unload."""
        self.broken: set[str] = set()
        """Folders, by the beginning of their name, that fail to load."""
        self.adapters: dict[str, str] = {}
        self.in_place: set[str] = set()
        self.calls: list[str] = []

    def restart(self, **adapters: Path | str) -> None:
        """Everything that was loaded at run time is gone; `adapters` are those of its command."""
        self.adapters = {name.replace("__", "@"): str(folder) for name, folder in adapters.items()}
        self.in_place.clear()

    def versions(self) -> dict[str, str]:
        """The label of each name's version, from its folder's name."""
        return {name: Path(folder).name.rpartition("-")[0] for name, folder in sorted(self.adapters.items())}

    def answer(self, method: str, path: str, key: str | None, body: dict[str, Any]) -> tuple[int, Any]:
        if path.startswith("/v1") and self.key is not None and key != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        if path == "/metrics":
            labels = f'block_size="16",enable_prefix_caching="{self.prefix_caching}"'
            return 200, f"# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{{{labels}}} 1\n"
        if path == "/v1/models":
            base = {"id": BASE, "object": "model", "root": "some/base", "parent": None}
            cards = [
                {"id": name, "object": "model", "owned_by": "vllm", "root": folder, "parent": BASE}
                for name, folder in self.adapters.items()
            ]
            return 200, {"object": "list", "data": [base, *cards]}
        self.calls.append(f"{path.removeprefix('/v1/').removesuffix('_lora_adapter')} {body.get('lora_name')}")
        if not self.runtime_updating:
            return 404, {"detail": "Not Found"}
        if path == "/v1/unload_lora_adapter":
            return self._unload(body["lora_name"])
        return self._load(body["lora_name"], Path(body["lora_path"]), bool(body.get("load_inplace")))

    def _unload(self, name: str) -> tuple[int, Any]:
        if name not in self.adapters:
            return self._error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        if name in self.dropped:
            return self._error(500, f"Failed to remove lora adapter '{name}' from the engine.", "InternalServerError")
        del self.adapters[name]
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def _load(self, name: str, folder: Path, in_place: bool) -> tuple[int, Any]:
        if name in self.adapters and not (in_place and self.knows_load_inplace):
            return self._error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        if not (folder / "adapter_config.json").is_file():
            text = f"Loading lora {name} failed: No adapter found for {folder}"
            return self._error(404, text, "NotFoundError")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            text = (
                f"Call to add_lora method failed: LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."
            )
            return self._error(self.load_failed_status, text, "InternalServerError")
        if any(folder.name.startswith(one) for one in self.broken):
            return self._error(
                self.load_failed_status, "Call to add_lora method failed: out of memory", "InternalServerError"
            )
        self.adapters[name] = str(folder)
        if in_place:
            self.in_place.add(name)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _error(self, status: int, message: str, kind: str) -> tuple[int, Any]:
        inner = {"message": message, "type": kind, "param": None, "code": status}
        return status, {"object": "error", **inner} if self.flat_errors else {"error": inner}


@contextmanager
def serving() -> Iterator[VllmStub]:
    """A stub on a free port of loopback."""
    stub = VllmStub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._respond({})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            assert self.headers["Content-Type"] == "application/json"
            self._respond(json.loads(body))

        def _respond(self, body: dict[str, Any]) -> None:
            status, said = stub.answer(self.command, self.path, self.headers.get("Authorization"), body)
            data = said.encode() if isinstance(said, str) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
