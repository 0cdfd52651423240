"""The child process of a run: what it answers."""

from __future__ import annotations

import json
import signal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from graftlm.commands.subprocess_main import main
from graftlm.errors import Stopped


def test_a_run_that_is_stopped_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping(*args: Any, **options: Any) -> None:
        raise Stopped(signal.SIGTERM, "stopped after step 2")

    monkeypatch.setattr("graftlm.commands.train.train", stopping)
    answers = StringIO()
    main(StringIO(json.dumps(tiny_run.options(tmp_path))), answers)
    assert json.loads(answers.getvalue()) == {"event": "stopped", "signal": 15, "message": "stopped after step 2"}
