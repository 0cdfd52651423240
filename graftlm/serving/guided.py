"""Answers that are JSON of a given schema: before each token, whatever cannot go on to such an answer is ruled out.

llguidance (Rust) turns the schema into a grammar over the tokenizer's bytes and says which tokens may follow; here it is
bound to a tokenizer and to rows of logits.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftlm.errors import RequestError

ANY_OBJECT: dict[str, Any] = {"type": "object"}
_MOST_SCHEMA = 100_000  # characters


class Guide:
    """Compiles schemas for one tokenizer; may be used from several threads."""

    def __init__(self, tokenizer: Any, vocabulary: int, stop_ids: Collection[int]) -> None:
        self._tokenizer, self._vocabulary, self._stops = tokenizer, vocabulary, sorted(stop_ids)
        self._bound: Any = None
        self._lock = threading.Lock()

    def json(self, schema: Any = None) -> JsonGrammar:
        """A grammar for JSON of `schema` (any object without one). Raises RequestError for one that cannot be followed."""
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise RequestError(
                "JSON-schema output needs llguidance; install it on the server: pip install 'graftlm[serve]'"
            ) from None
        text = json.dumps(ANY_OBJECT if schema is None else schema)
        if len(text) > _MOST_SCHEMA:
            raise RequestError(f"the schema has {len(text)} characters, at most {_MOST_SCHEMA} are taken")
        bound = self._bind()
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
            fault = LLMatcher.validate_grammar(grammar, bound)
        except ValueError as error:
            grammar, fault = "", str(error) or "it is no schema"
        if fault:
            raise RequestError(f"the schema cannot be followed: {fault.strip().splitlines()[0][:300]}")
        return JsonGrammar(bound, grammar, self._vocabulary)

    def _bind(self) -> Any:
        """The tokenizer as llguidance reads it, made once: it takes a second."""
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._bound is None:
                try:
                    self._bound = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._stops)
                except Exception as error:  # it raises many kinds for tokenizers whose bytes it cannot tell
                    raise RequestError(
                        f"this model's tokenizer cannot be guided by a schema: {str(error).strip()[:200]}"
                    ) from None
            return self._bound


class JsonGrammar:
    """A compiled schema; each answer walks through it on its own."""

    def __init__(self, tokenizer: Any, grammar: str, vocabulary: int) -> None:
        self._tokenizer, self._grammar, self._vocabulary = tokenizer, grammar, vocabulary

    def start(self) -> Walk:
        """Begin one answer."""
        from llguidance import LLMatcher

        return Walk(LLMatcher(self._tokenizer, self._grammar), self._vocabulary)


class Walk:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._mask = np.zeros((vocabulary + 31) // 32, dtype=np.int32)  # a bit a token

    def restrict(self, row: Tensor) -> None:
        """Rule out, in a row of logits (V,), every token that may not follow."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: len(row)]
        row.masked_fill_(torch.from_numpy(allowed == 0).to(row.device), float("-inf"))

    def accept(self, token: int) -> bool:
        """Go on by a token; True when the answer is complete with it."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())
