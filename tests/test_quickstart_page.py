"""The commands of docs/quickstart.md run in their order, and the adapter that they make answers through the server."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import real_models

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "quickstart.md"


def blocks() -> list[str]:
    """The page's blocks of shell commands."""
    return re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_until_ready(server: subprocess.Popen[str], port: int) -> None:
    for _ in range(1200):
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError("the server was not ready within ten minutes")


FURTHER = """graft adapters export pirate@prod pirate.gguf --for gguf
graft merge --model MODEL --adapter pirate@prod --out merged --gguf merged.gguf
graft generate --model merged.gguf --format text --prompt - --max-tokens 40 < prompt.txt"""
"""What the page does not have: the adapter and the merged model for llama.cpp. A merged model does not say that its adapter was
trained on plain text, so the format is named."""


def with_model(block: str, model: str) -> str:
    """A block for another model, as the page says: its name, and the learning rate that the plan advises."""
    changed = block.replace("--model demo", f"--model {model}").replace("plan demo", f"plan {model}")
    return changed.replace("--learning-rate 5e-3", "--learning-rate 1e-3").replace("--steps 60", "--steps 24")


@pytest.mark.prove
@pytest.mark.parametrize("model", ["demo", "smollm2.gguf"])
def test_every_command_of_the_page_runs_in_its_order(model: str, tmp_path: Path, graft_cache: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    graft = commands / "graft"
    graft.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m graftlm.cli "$@"\n', encoding="utf-8")
    graft.chmod(0o755)
    pages = blocks()
    if model != "demo":
        (tmp_path / model).symlink_to(real_models.smollm2())
        pages = [with_model(block, model) for block in pages]
        pages.append(FURTHER.replace("MODEL", model))
    environment = {
        **os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "100"
    }  # fmt: skip
    port, ran, server = _free_port(), [], None
    try:
        for block in (text.replace("8000", str(port)) for text in pages):
            if "graft serve" in block:
                server = subprocess.Popen(["bash", "-c", f"exec {block}"], cwd=tmp_path, env=environment, text=True)
                _wait_until_ready(server, port)
                continue
            found = subprocess.run(
                ["bash", "-ec", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
            )
            assert found.returncode == 0, f"{block}\n{found.stderr}"
            ran.append(found.stdout)
    finally:
        if server is not None:
            server.terminate()
            server.wait(60)
    assert len(ran) == (7 if model == "demo" else 8)
    assert "Ahoy! Marlow be a clock" in ran[4]  # base and adapter
    assert "Ahoy! Marlow be a clock" in json.loads(ran[6])["choices"][0]["text"]
    if model != "demo":
        assert "Ahoy! Marlow be a clock" in ran[7]  # the merged model in its own GGUF file
        assert (tmp_path / "pirate.gguf").stat().st_size > 0
