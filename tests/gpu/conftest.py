"""The fake card for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fixtures import NoCard, Worker, compile_guard


@pytest.fixture(scope="session")
def card() -> Iterator[Worker]:
    """A process with two fake CUDA cards; skipped, with the reason, where there can be none."""
    try:
        worker = Worker(compile_guard())
    except NoCard as reason:
        pytest.skip(str(reason))
    yield worker
    worker.close()
