"""A server stays responsive while it loads an adapter that was written to hold it up."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiny_server

from graftlm.adapters.manifest import CONFIG, MANIFEST, digest_of, file_entries
from graftlm.adapters.store import Store

ENDLESS = "(.*)*(.*)*(.*)*(.*)*(.*)*x"
"""Years on one name of a layer in an engine that backtracks, as Python's `re` does."""


def hostile(place: Path) -> Path:
    """A good adapter with other patterns in its config, whose manifest is forged to fit."""
    folder = Path(shutil.copytree(tiny_server.trained("BETA"), place))
    patterns = {f"{ENDLESS}{i}": 4 for i in range(500)}
    config = json.loads((folder / CONFIG).read_text())
    config |= {"target_modules": ENDLESS, "rank_pattern": patterns, "alpha_pattern": patterns}
    (folder / CONFIG).write_text(json.dumps(config))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["formula"] |= {key: config[key] for key in manifest["formula"] if key in config}
    manifest["files"] = file_entries([folder / file for file in manifest["files"]])
    (folder / MANIFEST).write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))
    return folder


def test_healthz_answers_within_a_second_while_an_adapter_with_endless_patterns_is_loaded(tmp_path: Path) -> None:
    place = tiny_server.new_store(tmp_path)
    Store(place).publish(hostile(tmp_path / "hostile"), "hostile")
    seconds: list[float] = []
    with (
        tiny_server.serving(store=str(place)) as server,
        server.client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        loading = pool.submit(server.answer, "hostile")
        while not loading.done():
            began = time.monotonic()
            assert client.get("/healthz").status_code == 200
            seconds.append(time.monotonic() - began)
        assert loading.result().status_code == 500
        message = loading.result().json()["error"]["message"]
        assert "'hostile@1' cannot answer" in message, message
        assert "target_modules" in message, "it was the patterns that were read"
        assert server.says("alpha") == "ALPHA"
    assert max(seconds) < 1
