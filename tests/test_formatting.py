"""Numbers as people read them: nothing that takes time takes 0.0 s."""

from __future__ import annotations

import pytest

from graftlm.formatting import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"), (0.0000123, "0.0123 ms"), (0.00312, "3.12 ms"),
        (0.0125, "12.5 ms"), (0.812, "812 ms"), (0.9994, "999 ms"),
        (0.9996, "1 s"), (1.254, "1.25 s"), (9.994, "9.99 s"), (9.996, "10 s"), (42.4, "42 s"), (300.0, "5 min"),
        (12_000.0, "3 h 20 min"), (187_200.0, "2 d 4 h"),
    ],
)  # fmt: skip
def test_a_time_has_up_to_three_digits_in_the_unit_that_shows_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
