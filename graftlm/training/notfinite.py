"""Where a number first stopped being finite: which module, and on which rows.

A loss that is NaN says nothing of its cause, and by the time it is seen the pass is over. So the examples of the step are run
once more, each alone, with a hook on every module: the first one whose output, or whose output's gradient on the way back,
is not finite is the one to look at. All random numbers come from counters, so the second run does what the first did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _tensors(output: Any) -> Iterator[Tensor]:
    """The float tensors in what a module returned, however it is nested."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from (t for value in output.values() for t in _tensors(value))
    elif isinstance(output, (tuple, list)):
        yield from (t for value in output for t in _tensors(value))


@contextmanager
def watching(model: nn.Module) -> Iterator[list[str]]:
    """Collect, while open, what first was not finite: at most one entry, such as "the output of 'model.norm'"."""
    found: list[str] = []

    def note(what: str, name: str, module: nn.Module) -> None:
        if found:
            return
        bad = [n for n, p in module.named_parameters(recurse=False) if not bool(p.isfinite().all())]
        name = name.removesuffix(".stored") or type(module).__name__
        found.append(f"{what} of '{name}'" + (f", whose own {bad[0]} is not finite" if bad else ""))

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not bool(tensor.detach().isfinite().all()):
                    note("the output", name, module)
                if tensor.requires_grad:
                    tensor.register_hook(
                        lambda g: None if bool(g.isfinite().all()) else note("the output's gradient", name, module)
                    )

        return after

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def first(
    model: nn.Module, rows: Sequence[str], parameters: Iterable[tuple[str, nn.Parameter]], run: Callable[[int], None]
) -> tuple[str | None, list[str]]:
    """Run each of the examples alone; returns what first was not finite, and the rows that were not.

    `run(i)` runs example i forward, and backward where that is wanted. Where no example is to blame alone, None and [].
    """
    named = list(parameters)
    where: str | None = None
    bad: list[str] = []
    for i, row in enumerate(rows):
        for _, parameter in named:
            parameter.grad = None
        with watching(model) as found:
            run(i)
        for name, parameter in named:
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                found.append(f"the gradient of '{name}'")
                break
        if found:
            where = where or found[0]
            bad.append(row)
    for _, parameter in named:
        parameter.grad = None
    return where, bad
