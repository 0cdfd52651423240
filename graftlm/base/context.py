"""What a forward pass knows beside its input, for modules whose signature is not ours.

    context = ForwardContext(segments)
    hidden = base.hidden(ids, context)          # holds while the layers run
    with context: ...                           # the same, for code that calls modules itself

`nn.Linear` takes no keyword arguments, so a stored linear, its bank of adapters, the attention and the embedding read the
active context of their thread. A thread has one only while a pass of its own runs: there is no default, and a thread never
sees another's. So a server may check one adapter in one thread while it answers in another. Activation checkpointing runs a
layer again under the context that its first run had (`structure.py`), in whatever thread autograd does that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from graftlm.segments import Segments


class TiedGradient:
    """What a head leaves for the lookup of its matrix: nothing yet, its gradient, or how to make that (`embedding.py`)."""

    def __init__(self) -> None:
        self.gradient: Tensor | None = None
        self.make: Callable[[], Tensor] | None = None

    def take(self) -> Tensor | None:
        """The head's gradient, or None where it has left none; nothing is kept."""
        gradient, make = self.gradient, self.make
        self.gradient = self.make = None
        return gradient if make is None else make()


@dataclass(eq=False)
class ForwardContext:
    """One micro-batch's routing and options; made where it begins, and active between `__enter__` and `__exit__`."""

    segments: Segments
    bf16_matmul: bool = field(default=True, kw_only=True)
    """False: modules that multiply in bfloat16 keep to float32. A canary is taken so."""
    head_gradient_last: bool = field(default=False, kw_only=True)
    """A tied head makes its weight's gradient when the layers have run back, from its logits once more: less memory."""
    tied: TiedGradient | None = field(default=None, kw_only=True)
    """Left by the embedding of this pass for the head that shares its matrix; the loss takes it."""

    def over(self, segments: Segments) -> ForwardContext:
        """The same options over other segments, for the rows of a pass that its head sees."""
        return replace(self, segments=segments, tied=None)

    def take_tied(self) -> TiedGradient | None:
        """What the embedding left, once."""
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
    """The context of the pass that runs in this thread, or None outside of one."""
    stack = _stack()
    return stack[-1] if stack else None


def current() -> ForwardContext:
    """The context of the pass that runs in this thread. Raises RuntimeError outside of one."""
    stack = _stack()
    if not stack:
        raise RuntimeError(
            f"no ForwardContext is active in thread '{threading.current_thread().name}'; run the model through "
            "base.hidden(ids, context), or inside `with ForwardContext(segments):`"
        )
    return stack[-1]
