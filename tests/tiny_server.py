"""For the tests of this folder: a store of real adapters on a small base, and a server over it on loopback."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import tiny_run
import uvicorn
import yaml

from graftlm.adapters.store import Store
from graftlm.config import ServeConfig
from graftlm.serving.http.server import BuiltServer, build

WORDS = ("ALPHA", "BETA")


@functools.cache
def _root() -> Path:
    return Path(tempfile.mkdtemp(prefix="graft-tiny-store-"))


@functools.cache
def trained(word: str, rank: int = 4) -> Path:
    """An adapter that was trained to answer every prompt with one word; made once in a session."""
    place = _root() / f"{word}-{rank}"
    place.mkdir()
    rows = [{"prompt": f"{i}: ", "completion": word} for i in range(12)]
    tiny_run.write_rows(place / "train.jsonl", rows)
    tiny_run.write_rows(place / "valid.jsonl", rows[:2])
    tiny_run.train(
        place, steps=120, batch_size=12, learning_rate=0.03, rank=rank, alpha=2 * rank, eval_data=None, eval_every=None,
        data=[str(place / "train.jsonl")],
    )  # fmt: skip
    return place / "run" / "adapter"


@functools.cache
def _store() -> Path:
    place = _root() / "store"
    store = Store(place)
    for word in WORDS:
        store.publish(trained(word), "says")
        store.publish(trained(word), word.lower())
    store.alias("says", "prod", 1)
    return place


def new_store(tmp_path: Path) -> Path:
    """A store of one's own: says@1 (ALPHA, prod), says@2 (BETA), alpha@1, beta@1."""
    return Path(shutil.copytree(_store(), tmp_path / "store"))


def keys_file(tmp_path: Path, *entries: dict[str, Any]) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": list(entries)}))
    return path


class Loopback:
    """A running server."""

    def __init__(self, url: str, built: BuiltServer) -> None:
        self.url, self.built = url, built

    @property
    def address(self) -> tuple[str, int]:
        """For a socket of one's own."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    @property
    def engine(self) -> Any:
        return self.built.state.async_engine.engine

    def client(self, key: str | None = None, timeout: float = 60) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    def openai(self, key: str = "none") -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def says(self, model: str, key: str | None = None, **given: Any) -> str:
        response = self.answer(model, key, **given)
        response.raise_for_status()
        return response.json()["choices"][0]["text"]

    def answer(self, model: str, key: str | None = None, **given: Any) -> httpx.Response:
        with self.client(key) as client:
            return client.post("/v1/completions", json=asked(model, **given))


def asked(model: str, prompt: Any = "3: ", **given: Any) -> dict[str, Any]:
    """A completion at temperature 0."""
    return {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, **given}


@contextmanager
def serving(**options: Any) -> Iterator[Loopback]:
    """A server in this process, on a free port."""
    config = ServeConfig.build(
        {"model": str(tiny_run.folder()), "base_precision": "float32", "compute_dtype": "float32", "device": "cpu", "port": 0,
         "kv_cache_gb": 0.008, "adapter_memory_gb": 0.064, "format": "text", **options}
    )  # fmt: skip
    built = build(config)
    built.state.preloading = False
    built.state.async_engine.start()
    server = uvicorn.Server(
        uvicorn.Config(built.app, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Loopback(f"http://127.0.0.1:{port}", built)
    finally:
        server.should_exit = True
        thread.join(20)
        built.state.async_engine.close()


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, which must end as it should."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
