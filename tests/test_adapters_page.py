"""Every command of docs/adapters.md runs, in its order, on the bundled base, a real S3 server and a stub of the hub."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import folder
from typer.testing import CliRunner

from graftlm.cli import app

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / room) for room in ("adapters", "base")]

from hubs import Hub, talking_to  # noqa: E402

PAGE = HERE.parent / "docs" / "adapters.md"
BUCKET = "my-bucket"


def commands() -> list[tuple[str, bool]]:
    """The lines of the page's blocks that begin with `graft`, and whether the page says that they are refused."""
    found: list[tuple[str, bool]] = []
    for block in re.findall(r"^```\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("graft "):
                command, _, comment = line.partition("  #")
                found.append((command.strip(), "refused" in comment))
    return found


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub to talk to from an empty working folder, and beside it a bucket on a server of moto's."""
    s3fs = pytest.importorskip("s3fs")
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem(client_kwargs={"region_name": "eu-central-1"}).mkdir(BUCKET)
    monkeypatch.chdir(tmp_path)
    with Hub({"someone/llama": folder(tmp_path / "llama", "llama")}) as hub:
        talking_to(hub, tmp_path / ".hub", monkeypatch)
        yield hub
    server.stop()


def without_manifest(adapter: Path, place: Path) -> Path:
    """An adapter as PEFT writes it."""
    place.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (place / name).write_bytes((adapter / name).read_bytes())
    return place


@pytest.mark.prove
def test_every_command_of_the_page_runs_in_its_order(hub: Hub, tmp_path: Path, record_property: Any) -> None:
    ran: list[str] = []
    for line, refused in commands():
        if "someone/their-lora" in line:
            hub.add(
                "someone/their-lora", without_manifest(tmp_path / "runs" / "first" / "adapter", tmp_path / "theirs")
            )
        found = CliRunner().invoke(app, shlex.split(line)[1:], env={**os.environ, "COLUMNS": "120"})
        record_property(line, found.stdout[-3000:] if "merge" in line else found.exit_code)
        assert found.exit_code == (2 if refused else 0), f"{line}\n{found.stderr}\n{found.exception!r}"
        ran.append(line)
    assert len(ran) > 20
    assert {line.split()[2] for line in ran if line.startswith("graft adapters")} == {
        "publish", "list", "show", "diff", "verify", "alias", "rollback", "remove", "import", "export", "push", "pull",
    }  # fmt: skip
