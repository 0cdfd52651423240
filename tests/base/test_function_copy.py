"""A function with other names under the same code, its decorators included."""

from __future__ import annotations

from functools import wraps
from types import FunctionType
from typing import Any

from graftlm.base.function_copy import copy_function


def scale(x: float) -> float:
    return 3 * x


def renaming(function: Any) -> Any:
    """What transformers does to an outdated argument."""

    @wraps(function)
    def outer(*args: Any, **kwargs: Any) -> Any:
        if "old" in kwargs:
            kwargs["new"] = kwargs.pop("old")
        return function(*args, **kwargs)

    return outer


def elsewhere(function: Any) -> Any:
    """A decorator that holds its function in no variable of its own."""
    held = [function]

    @wraps(function)
    def outer(*args: Any) -> Any:
        return held[0](*args)

    return outer


def plain(x: float, *, new: float = 5.0, **rest: float) -> float:
    return scale(x) + new


def copied(function: FunctionType) -> Any:
    found = copy_function(function, {"scale": lambda x: 7 * x})
    assert found is not None
    return found


def test_a_copy_calls_the_other_function_and_the_original_its_own() -> None:
    assert copied(plain)(2.0) == 19.0
    assert plain(2.0) == 11.0


def test_a_copy_of_a_decorated_function_does_what_its_decorators_do() -> None:
    twice = renaming(renaming(plain))
    assert copied(twice)(2.0, old=1.0) == 15.0
    assert twice(2.0, old=1.0) == 7.0


def test_a_copy_of_a_copy_is_one_too() -> None:
    assert copied(copied(renaming(plain)))(2.0, old=1.0) == 15.0


def test_no_copy_is_made_below_a_decorator_that_keeps_its_function_elsewhere() -> None:
    assert copy_function(elsewhere(plain), {"scale": abs}) is None
