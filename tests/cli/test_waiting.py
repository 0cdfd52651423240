"""How the threads of products wait for each other depends on the command."""

from __future__ import annotations

import os
import sys

import pytest

from graftlm import cli


@pytest.mark.parametrize(("command", "policy"), [("serve", None), ("train", "passive"), ("generate", "passive")])
def test_threads_sleep_between_matmuls_except_those_of_a_server(
    command: str, policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(sys, "argv", ["graft", command, "--model", "demo"])
    monkeypatch.setattr(cli, "app", lambda: None)
    cli.main()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
