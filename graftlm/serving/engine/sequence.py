"""One answer in progress: its tokens, which of them are computed, the memory it holds, and the text sent so far."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from graftlm.serving.engine.detokenizer import Detokenizer
from graftlm.serving.engine.request import Request


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
        self.slot = 0
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
        self.times_skipped = 0
        """How often others were admitted before it because its adapter found no slot."""
        self.hidden_sum: Tensor | None = None
        """Sum of the hidden states of an `embed` request, (width,) float32."""
        self.aborted = False
        self.done = False

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
