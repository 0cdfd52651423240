"""What the steps of an engine take on a GPU beside base, KV cache and adapters: an estimate from the model's shape.

    states    of all tokens of a step, in one layer: gate, up and their product, or what is around attention, and four times the
              residual stream, which a forward pass has at hand
    logits    behind them, a row of each sequence that gets a token, and three more in float32 while it is drawn with penalties
    graphs    the pool that all CUDA graphs share: the states of the largest captured step, in whose memory the others' lie

CUDA's context, cuBLAS's workspace, the allocator's gaps and what the driver keeps for each graph's launches are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from graftlm.planning.activations import FLOAT32
from graftlm.planning.answers import answer_workspace_bytes
from graftlm.planning.shapes import ModelShape
from graftlm.serving.engine.graph_decoder import row_counts

LEAST_TOKENS = 256
"""Of a step, however little memory there is."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Estimated bytes of steps of `tokens` tokens with at most `sequences` sequences."""

    tokens: int
    step: int
    graphs: int

    @property
    def bytes(self) -> int:
        return self.step + self.graphs


def step_memory(shape: ModelShape, *, tokens: int, sequences: int, value_bytes: int, graphs: bool) -> StepMemory:
    """The bytes of a step, and of the graphs of decoding where there are `graphs`; `value_bytes`: of a state's value."""

    def states(rows: int) -> int:
        return answer_workspace_bytes(shape, value_bytes, rows) + 2 * shape.width * value_bytes * rows

    logits = 4 * sequences * shape.vocabulary * FLOAT32
    pool = states(row_counts(sequences)[-1]) if graphs else 0
    return StepMemory(tokens=tokens, step=max(states(tokens), logits), graphs=pool)


def fitting(shape: ModelShape, room: int, *, tokens: int, sequences: int, value_bytes: int, graphs: bool) -> StepMemory:
    """The memory of steps of `tokens` tokens, halved until they fit in `room` bytes or are LEAST_TOKENS, or `sequences`."""
    while True:
        found = step_memory(shape, tokens=tokens, sequences=sequences, value_bytes=value_bytes, graphs=graphs)
        least = max(LEAST_TOKENS, sequences)
        if found.bytes <= room or tokens <= least:
            return found
        tokens = max(tokens // 2, least)
