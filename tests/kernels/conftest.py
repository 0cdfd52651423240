"""What the tests of several kernels share."""

from collections.abc import Iterator

import pytest

from graftlm.kernels import native


@pytest.fixture(params=native.instruction_sets())
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn; skipped where the C kernels are not compiled."""
    native.choose(request.param)
    yield request.param
    native.choose(None)
