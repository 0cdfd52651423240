"""Models whose own code writes to its modules in a pass: told at load, and run one pass at a time."""

from __future__ import annotations

import threading
from typing import Any

import families
import pytest
import tiny
import torch
from torch import Tensor

from graftlm.base.context import ForwardContext
from graftlm.base.loading import Base, load_base
from graftlm.segments import Segments


def loaded(place: Any) -> Base:
    return load_base(str(place), compute_dtype="float32", device="cpu")


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "bloom", "mixtral"])
def test_most_models_keep_nothing_of_a_pass_in_their_modules(architecture: str) -> None:
    assert not loaded(tiny.folder(architecture)).keeps_state


def test_frequencies_that_follow_the_longest_text_are_state(tmp_path: Any) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert loaded(tiny.write(tmp_path, tiny.random_model("llama", rope_parameters=rope))).keeps_state


def test_passes_of_two_threads_through_a_model_with_states_in_its_modules_wait_for_each_other(tmp_path: Any) -> None:
    base = loaded(tiny.write(tmp_path, families.random_model("recurrent_gemma")))
    assert base.keeps_state
    texts = [tiny.ids(7, seed=1), tiny.ids(11, seed=2)]

    def hidden(i: int) -> Tensor:
        with torch.no_grad():
            context = ForwardContext(Segments(lengths=(len(texts[i]),), slots=(0,), batched=True))
            return base.hidden(texts[i], context)

    alone = [hidden(0), hidden(1)]
    inside, leave, found = threading.Event(), threading.Event(), list[Tensor]()

    def hold(module: Any, args: Any, output: Any) -> None:
        if threading.current_thread() is first and not inside.is_set():
            inside.set()
            leave.wait(10)

    # Held within its first layer's recurrence, whose states the other pass would overwrite.
    block = next(m for m in base.model.modules() if type(m).__name__ == "RecurrentGemmaRglru")
    handle = block.register_forward_hook(hold)
    first = threading.Thread(target=lambda: found.append(hidden(0)))
    other = threading.Thread(target=lambda: found.append(hidden(1)))
    first.start()
    assert inside.wait(10)
    other.start()
    other.join(0.2)
    assert other.is_alive(), "it waits"
    leave.set()
    for thread in (first, other):
        thread.join(10)
    handle.remove()
    assert torch.equal(found[0], alone[0])
    assert torch.equal(found[1], alone[1])
