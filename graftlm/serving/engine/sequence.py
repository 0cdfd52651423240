"""One answer in the making: its tokens, what of them is computed, what it holds, and what it has told."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from graftlm.serving.engine.detokenizer import Detokenizer
from graftlm.serving.engine.request import Request


class Sequence:
    """Answer `index` of a request. The engine moves it from waiting to running to done, and back when memory is short."""

    def __init__(self, request: Request, index: int, tokenizer: Any, after: Sequence | None) -> None:
        self.request, self.index = request, index
        self.after = after
        """The first of several answers to one prompt, whose kept keys and values the others wait for."""
        self.tokens: list[int] = list(request.prompt)
        """Prompt and answer."""
        self.computed = 0
        """Tokens whose keys and values are kept."""
        self.cached_prompt_tokens = 0
        """Tokens of the prompt that were kept from an earlier request."""
        self.slot = 0
        self.batch_slot = -1
        self.blocks: list[int] = []
        self.names: list[bytes] = []
        """Names of its full blocks, see `kv_cache.py`."""
        self.matcher: Any = request.grammar.start() if request.grammar is not None else None
        self.detokenizer = Detokenizer(tokenizer, request.hidden_ids, request.stop)
        self.arrived = time.monotonic()
        self.first_token: float | None = None
        self.worked = 0
        """The step in which it last took part."""
        self.passed_over = 0
        """How often others were let in before it because its adapter found no slot."""
        self.states: Tensor | None = None
        """Sum of the states of an `embed` request, (width,) float32."""
        self.cancelled = False
        self.done = False

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def answer(self) -> list[int]:
        """The tokens written so far."""
        return self.tokens[self.prompt_length :]

    @property
    def written(self) -> int:
        """How many tokens were written so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def left(self) -> int:
        """Tokens that are there and not computed yet."""
        return len(self.tokens) - self.computed

    @property
    def most_tokens(self) -> int:
        """Prompt and answer at their longest."""
        return self.prompt_length + self.request.max_tokens

    @property
    def decoding(self) -> bool:
        """Whether only the newest token is left to compute."""
        return self.computed > 0 and self.left == 1
