"""A copy of a function in which some global names mean something else, so that nobody else's calls change.

    copy_function(LlamaAttention.forward, {"apply_rotary_pos_emb": ours})

Decorators are copied too: transformers renames outdated arguments in one (`past_key_values` to `cache` since 5.24), and a
copy without it would drop that argument in silence.
"""

from __future__ import annotations

from types import CellType, FunctionType
from typing import Any


def copy_function(function: FunctionType, names: dict[str, Any]) -> FunctionType | None:
    """A copy whose code, below all decorators, finds these objects under these global names; the decorators see the copy.

    None where a decorator does not hold the function that it wraps in a variable of its own.
    """
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return _with(function, {**function.__globals__, **names}, function.__closure__)
    copied = copy_function(inner, names) if isinstance(inner, FunctionType) else None
    cells = function.__closure__ or ()
    if copied is None or not any(_holds(cell, inner) for cell in cells):
        return None
    outer = _with(
        function, function.__globals__, tuple(CellType(copied) if _holds(cell, inner) else cell for cell in cells)
    )
    outer.__dict__["__wrapped__"] = copied
    return outer


def _with(function: FunctionType, names: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    found = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    found.__kwdefaults__ = function.__kwdefaults__
    return found


def _holds(cell: CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # a cell without a value yet
        return False
