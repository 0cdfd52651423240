"""One answer in progress: its tokens, which of them are computed, the memory it holds, and the text sent so far."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from graftlm.serving.engine.detokenizer import Detokenizer
from graftlm.serving.engine.request import Request, TokenLogprobs


class Sequence:
    """Answer `index` of a request. The scheduler moves it from waiting to running, and back when memory is short."""

    def __init__(self, request: Request, index: int, tokenizer: Any, first_sibling: Sequence | None) -> None:
        self.request, self.index = request, index
        self.first_sibling = first_sibling
        """The first of several answers to one prompt; the others wait for the prompt's KV cache that it computes."""
        self.tokens: list[int] = list(request.prompt)
        """Prompt and answer."""
        self.num_computed = 0
        """Tokens whose keys and values are in the KV cache."""
        self.cached_prompt_tokens = 0
        """Tokens of the prompt that were found in the prefix cache."""
        self.adapter_slot = 0
        """The slot of its adapter in the banks while it runs; 0 is the base."""
        self.batch_slot = -1
        """Its row in the tables of the KV cache while it runs, else -1."""
        self.blocks: list[int] = []
        self.block_hashes: list[bytes] = []
        """Hashes of its full blocks, see `kv_cache.py`."""
        self.matcher: Any = request.grammar.start() if request.grammar is not None else None
        self.detokenizer = Detokenizer(tokenizer, request.hidden_ids, request.stop)
        self.arrived = time.monotonic()
        self.first_token: float | None = None
        self.last_step = 0
        """The last step that it took part in."""
        self.num_slot_misses = 0
        """How often it was passed over in admission because its adapter found no slot."""
        self.hidden_sum: Tensor | None = None
        """Sum of the hidden states of an `embed` request, (width,) float32."""
        self.prompt_logprobs: list[TokenLogprobs] | None = (
            [] if request.prompt_logprobs is not None and index == 0 else None
        )
        """Of the prompt's tokens from the second on, as far as they are computed; None where nobody wants them, or has them."""
        self.aborted = False
        self.done = False

    def take_prompt_logprobs(self) -> list[TokenLogprobs] | None:
        """The prompt's log probabilities, once."""
        found, self.prompt_logprobs = self.prompt_logprobs, None
        return found

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> list[int]:
        """The tokens generated so far."""
        return self.tokens[self.prompt_length :]

    @property
    def num_generated(self) -> int:
        """How many tokens were generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def num_uncomputed(self) -> int:
        """Tokens that are known and not computed yet."""
        return len(self.tokens) - self.num_computed

    @property
    def max_total_tokens(self) -> int:
        """Prompt and answer at their longest."""
        return self.prompt_length + self.request.max_tokens

    @property
    def decoding(self) -> bool:
        """Whether only the newest token is left to compute."""
        return self.num_computed > 0 and self.num_uncomputed == 1
