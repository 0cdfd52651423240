"""The context of a forward pass: its segments and options, for modules whose signature is not ours.

    context = ForwardContext(segments)
    hidden = base.hidden(ids, context)          # active while the layers run
    with context: ...                           # the same, for code that calls modules itself

`nn.Linear` takes no keyword arguments, so stored linears, their banks of adapters, attention and embedding read the active
context of their thread. A thread has one only during a forward pass: there is no default, and threads do not share it, so a
server may check an adapter in one thread while it decodes in another. Activation checkpointing recomputes a layer under the
context of its first forward pass (`structure.py`), in whatever thread autograd uses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from graftlm.segments import Segments


class TiedGradient:
    """A tied head's gradient for the embedding: none yet, the gradient, or a function that computes it (`embedding.py`)."""

    def __init__(self) -> None:
        self.gradient: Tensor | None = None
        self.make: Callable[[], Tensor] | None = None

    def take(self) -> Tensor | None:
        """The head's gradient, or None if there is none; it is not kept here."""
        gradient, make = self.gradient, self.make
        self.gradient = self.make = None
        return gradient if make is None else make()


@dataclass(eq=False)
class ForwardContext:
    """The routing and options of one micro-batch; active between `__enter__` and `__exit__`."""

    segments: Segments
    bf16_matmul: bool = field(default=True, kw_only=True)
    """False: bf16-mixed modules use float32 matmuls, as a canary needs."""
    defer_tied_head_gradient: bool = field(default=False, kw_only=True)
    """A tied head computes its gradient after the layers' backward, by recomputing its logits, which saves memory."""
    tied: TiedGradient | None = field(default=None, kw_only=True)
    """Set by the embedding for the tied head; the loss takes it."""
    waiting: Any = field(default=None, kw_only=True)
    """Outputs of layers that share an input with one that was called (`shared_input.py`)."""

    def over(self, segments: Segments) -> ForwardContext:
        """The same options with other segments, for the rows that the head gets."""
        return replace(self, segments=segments, tied=None, waiting=None)

    def take_tied(self) -> TiedGradient | None:
        """What the embedding has set; None from the second call on."""
        tied, self.tied = self.tied, None
        return tied

    def __enter__(self) -> ForwardContext:
        _stack().append(self)
        return self

    def __exit__(self, *error: object) -> None:
        left = _stack().pop()
        assert left is self


_own = threading.local()


def _stack() -> list[ForwardContext]:
    try:
        return _own.stack
    except AttributeError:
        _own.stack = list[ForwardContext]()
        return _own.stack


def active() -> ForwardContext | None:
    """The context of this thread's forward pass, or None outside of one."""
    stack = _stack()
    return stack[-1] if stack else None


def current() -> ForwardContext:
    """The context of this thread's forward pass. Raises RuntimeError outside of one."""
    stack = _stack()
    if not stack:
        raise RuntimeError(
            f"no ForwardContext is active in thread '{threading.current_thread().name}'; run the model through "
            "base.hidden(ids, context), or inside `with ForwardContext(segments):`"
        )
    return stack[-1]
