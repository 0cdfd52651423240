"""What `graft plan` says of a GPU, beside what a step holds on the fake card; `bench/traced.py` does it at 7B, 13B and 70B."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures import Worker
from traced_memory import TracedRun, plan, trace

# Each of its terms is a part of the whole that matters: weights, gradients, states, activations, logits, one layer's backward.
LLAMA: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 8000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
BF16 = {"base_precision": "bfloat16"}
CHECKPOINTED = {"activation_checkpointing": True}
IN_BACKWARD = {**BF16, **CHECKPOINTED, "optimizer": "adamw-8bit", "optimizer_in_backward": True, "max_grad_norm": 0.0}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
RUNS: dict[str, tuple[Any, int, int, dict[str, Any]]] = {
    "qlora, checkpointed": ("qlora", 2048, 1, CHECKPOINTED),
    "lora": ("lora", 1024, 2, {}),
    "dora": ("lora", 1024, 2, {"dora": True}),
    "full in float32": ("full", 1024, 1, {}),
    "full in bfloat16, checkpointed": ("full", 1024, 1, {**BF16, **CHECKPOINTED}),
    "activations on the host": ("qlora", 2048, 1, {**CHECKPOINTED, "offload_activations": True}),
    "states on the host": ("full", 1024, 1, {**IN_BACKWARD, "offload_optimizer": True}),
    "lora of a mixture": ("lora", 1024, 2, MIXTURE),
    "lora of a mixture, checkpointed": ("lora", 2048, 1, {**MIXTURE, **CHECKPOINTED}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_plan_is_within_three_percent_of_what_a_step_holds(card: Worker, name: str) -> None:
    method, tokens, batch, options = RUNS[name]
    experts = {key: options[key] for key in options if key in MIXTURE}
    options = {key: value for key, value in options.items() if key not in MIXTURE}
    run = TracedRun(name=name, model=LLAMA | experts, method=method, tokens=tokens, batch=batch, options=options)
    traced, planned = trace(card, run), plan(run)
    assert planned.training == pytest.approx(traced["peak"], rel=0.03), (planned.moment, planned.parts)
    assert planned.host == pytest.approx(traced["host"], rel=0.03, abs=1 << 20)
