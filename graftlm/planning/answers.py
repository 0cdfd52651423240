"""Answers that are generated in the middle of a training (`--score`): what the engine takes beside weights and optimizer.

    keys and values   2 x key-value width x attention layers, for every token of SEQUENCES answers at their longest
    logits            a row for every sequence; while the cache is proven, of the proof's texts
    workspace         one layer's states of a step of STEP_TOKENS prompt tokens

No gradients and no saved activations are there at the same time. The engine (`serving/engine/`) has no part in planning, so its
sizes stand here again, and a test holds them against it.
"""

from __future__ import annotations

from dataclasses import dataclass

from graftlm.planning.activations import FLOAT32, attention_modules
from graftlm.planning.shapes import ModelShape

SEQUENCES, SPARE_TOKENS, BLOCK_TOKENS = 16, 16, 16  # of the engine that answers a list of prompts
STEP_TOKENS = 256  # most tokens of one step of the engine
PROOF_TOKENS = (
    33  # rows of logits while `base/kv_cache.py` proves the cache: two texts of 13 and 11, and a step of at most 9
)


@dataclass(frozen=True, kw_only=True)
class AnswerLoad:
    """The answers of one evaluation."""

    prompts: int
    longest: int
    """Tokens of the longest prompt and its longest answer."""

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache has memory for."""
        tokens = min(self.prompts, SEQUENCES) * (self.longest + SPARE_TOKENS)
        return max(tokens // BLOCK_TOKENS, 2) * BLOCK_TOKENS


def kv_cache_bytes(shape: ModelShape, tokens: int, value_bytes: int) -> int:
    """Bytes of the keys and values of so many tokens in all layers."""
    return 2 * shape.key_value_width * attention_modules(shape) * value_bytes * tokens


def answer_logit_bytes(shape: ModelShape, load: AnswerLoad) -> int:
    """Bytes of the most logits that exist at once, in float32."""
    return max(min(load.prompts, SEQUENCES), PROOF_TOKENS) * shape.vocabulary * FLOAT32


def answer_workspace_bytes(shape: ModelShape, value_bytes: int, tokens: int = STEP_TOKENS) -> int:
    """Bytes of one layer's states in a step of so many tokens: gate, up and their product, and around attention its queries,
    keys, values and result."""
    experts = shape.experts_per_token if shape.mixture else 1
    feed_forward = 3 * shape.inner_width * experts + 2 * shape.width
    attention = 2 * shape.attention_width + 2 * shape.key_value_width + 2 * shape.width
    return max(feed_forward, attention) * value_bytes * tokens
