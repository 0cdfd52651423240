"""The context of a pass: a thread's own, the innermost, and none outside of one."""

from __future__ import annotations

import threading

import pytest
import tiny
import torch

from graftlm.base.context import ForwardContext, active, current
from graftlm.base.loading import load_base
from graftlm.segments import Segments

FIRST, SECOND = (ForwardContext(Segments(lengths=(n,), slots=(0,))) for n in (3, 2))


def test_a_thread_sees_the_context_of_its_own_forward_pass_and_never_another_threads() -> None:
    entered, leave, seen = threading.Event(), threading.Event(), list[ForwardContext | None]()

    def work() -> None:
        seen.append(active())
        with SECOND:
            entered.set()
            leave.wait(10)
            seen.append(active())
        seen.append(active())

    thread = threading.Thread(target=work)
    with FIRST:
        thread.start()
        assert entered.wait(10)
        assert current() is FIRST
    leave.set()
    thread.join()
    assert seen == [None, SECOND, None]
    assert active() is None


def test_the_innermost_context_is_the_current_one_and_leaves_with_an_error_too() -> None:
    with FIRST:
        try:
            with SECOND:
                assert current() is SECOND
                raise KeyError
        except KeyError:
            pass
        assert current() is FIRST
    with pytest.raises(RuntimeError, match=r"no ForwardContext is active in thread 'MainThread'.*base\.hidden"):
        current()


def test_a_layer_with_an_adapter_says_that_it_needs_a_context() -> None:
    base = load_base(str(tiny.folder("llama")), compute_dtype="float32", device="cpu")
    tiny.adapted(base)
    with pytest.raises(RuntimeError, match="no ForwardContext is active"):
        base.stored()["model.layers.0.mlp.up_proj"](torch.zeros(2, 28))


def test_a_checkpointed_layer_runs_again_under_its_own_context_in_whatever_thread_goes_back() -> None:
    base = load_base(str(tiny.folder("llama")), compute_dtype="float32", device="cpu")
    adapter = tiny.adapted(base, dropout=0.3)
    context = ForwardContext(Segments(lengths=(9,), slots=(1,), streams=((5, 2),)))
    wanted = list(adapter.parameters().values())

    def gradients(checkpointing: bool, elsewhere: bool) -> list[torch.Tensor]:
        base.structure.checkpoint_layers(checkpointing)
        total = base.hidden(tiny.ids(9), context).square().sum()
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(total, wanted)))
        if elsewhere:
            thread.start()
            thread.join()
        else:
            thread.run()
        return found

    plain = gradients(checkpointing=False, elsewhere=False)
    for elsewhere in (False, True):
        again = gradients(checkpointing=True, elsewhere=elsewhere)
        assert len(again) == len(plain)
        assert all(torch.equal(a, b) for a, b in zip(again, plain))
