"""Names are names: no path, link or encoding of one gets at a file, whatever it looks like."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import tiny_server

import graftlm
from graftlm.adapters.store import Store

CORPUS = [
    "../alpha", "../../etc/passwd", "..", ".", "./alpha", "/etc/passwd", "//etc/passwd", "alpha/../beta",
    "alpha/", "alpha\\..\\beta", "C:\\windows\\win.ini", "file:///etc/passwd", "~/.ssh/id_rsa",
    "%2e%2e%2fetc%2fpasswd", "..%2f..%2fetc", "%252e%252e%252f", "..%c0%af..", "alpha\x00", "alpha\x00.json",
    "\x00", "alpha\n", "alpha\r\nX-Injected: 1", "alpha@../1", "alpha@/etc", "alpha@0", "alpha@-1",
    "alpha@99999999999999999999", "alpha@1@1", "alpha@", "@1", "@", "", " ", "alpha ", " alpha", "ALPHA",
    "alphа", "a" * 10_000, "alpha@" + "9" * 9_000, "ａｌｐｈａ", "alpha\u202e", "\ud83d\ude00", "${HOME}", "$(id)",
    "`id`", "'; DROP TABLE", "{{7*7}}", "*", "alph?", "[a]lpha", "alpha,beta", "alpha|beta", "<script>",
    "outside", "outside@1", "linked", "linked@1", "con", "nul", "-h", "--",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiny_server.Loopback]:
    """A store in which `outside` is a link to a folder elsewhere, and `linked` has a file that is one."""
    place = tmp_path_factory.mktemp("names")
    store = Store(tiny_server.new_store(place))
    for name, rank in (("outside", 2), ("linked", 3)):
        version, _ = store.publish(tiny_server.trained("ALPHA", rank), name)
        away = place / f"away-{name}"
        if name == "outside":
            version.folder.rename(away)
            version.folder.symlink_to(away)
        else:
            file = version.folder / "adapter_model.safetensors"
            version.folder.chmod(0o755)
            file.rename(away)
            file.symlink_to(away)
    with tiny_server.serving(store=str(store.root)) as one:
        one.says("alpha")
        yield one


_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], (str, bytes, os.PathLike)):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_audit)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every path that is opened meanwhile, by any thread of this process."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


def test_every_odd_name_is_a_404_and_opens_no_file_outside_the_store(
    server: tiny_server.Loopback, opened: list[str]
) -> None:
    root = str(server.built.state.model_registry.store.root)
    server.built.state.model_registry.store.alias("alpha", "heard", 1)  # so that there is something to read again
    with server.client() as client:
        for name in CORPUS:
            try:
                name.encode()
            except UnicodeEncodeError:
                continue
            for path, body in (
                ("/v1/completions", tiny_server.asked(name)),
                ("/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "x"}]}),
                ("/v1/embeddings", {"model": name, "input": "x"}),
            ):
                found = client.post(path, json=body)
                assert found.status_code == 404, (name[:50], path, found.text[:200])
                assert "x-injected" not in found.headers
            found = client.get(f"/v1/models/{quote(name, safe='')}")
            assert found.status_code in (404, 200 if name in ("", ".") else 404), repr(name[:50])
    ours = (root, sys.prefix, sys.base_prefix, str(Path(graftlm.__file__).parent), "/proc/")
    assert [p for p in opened if not p.startswith(ours)] == []
    assert not any(".." in Path(p).parts for p in opened)
    assert any(p.startswith(root) for p in opened), "the ear hears: the journal was read"


def test_half_a_surrogate_is_refused_politely(server: tiny_server.Loopback) -> None:
    with server.client() as client:
        headers = {"content-type": "application/json"}
        for field in ("model", "prompt"):
            body = f'{{"model": "base", "prompt": "x", "{field}": "\\ud800"}}'
            found = client.post("/v1/completions", content=body, headers=headers)
            assert found.status_code in (400, 404), found.text


def test_odd_bodies_are_refused_politely(server: tiny_server.Loopback) -> None:
    with server.client() as client:
        for body in (
            b"",
            b"{",
            b"null",
            b"[]",
            b"\xff\xfe",
            b'{"model": NaN}',
            b"[" * 50_000,
            b'{"model": "base", "prompt": ' + b"9" * 5000 + b"}",
        ):
            found = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
            assert found.status_code == 400, (body[:30], found.status_code, found.text[:200])
            assert "error" in found.json()
        plain = client.post("/v1/completions", content=b'{"model": "base", "prompt": "x"}')
        assert (plain.status_code, "send 'Content-Type: application/json'" in plain.text) == (400, True)
