"""What the tests that talk to the stub of the hub share: a client of this process that asks it and nobody else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "base"))

from stub_hub import Hub


def talking_to(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub ask `hub`, keep what it fetches in `cache`, and try again without waiting."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": True, "HF_TOKEN_PATH": str(cache / "token"),
    }.items():  # fmt: skip
        patch.setattr(constants, name, value)
    patch.setenv("HF_TOKEN", "hf_of_nobody")
    patch.setenv("no_proxy", "127.0.0.1")
    patch.setattr(_http.time, "sleep", lambda seconds: None)
