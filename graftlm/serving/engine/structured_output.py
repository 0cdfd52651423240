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
from graftlm.formatting import quote
from graftlm.kernels import to_device
from graftlm.serving.engine.schema_endings import endless
from graftlm.serving.engine.tool_grammar import CallConstraint, calls_grammar, reasoned_json

ANY_OBJECT: dict[str, Any] = {"type": "object"}
_MOST_SCHEMA = 100_000  # characters


class GrammarCompiler:
    """Compiles schemas for one tokenizer; may be used from several threads."""

    def __init__(self, tokenizer: Any, vocabulary: int, stop_ids: Collection[int]) -> None:
        self._tokenizer, self._vocabulary, self._stops = tokenizer, vocabulary, sorted(stop_ids)
        self._bound: Any = None
        self._lock = threading.Lock()

    def json(self, schema: dict[str, Any] | None = None, *, opened: bool = False, thinks: bool = False) -> JsonGrammar:
        """A grammar for JSON of `schema` (any object without one).

        Reasoning goes on before it where the prompt has `opened` it, and may where the model `thinks`.

        Raises RequestError for one that cannot be followed.
        """
        LLMatcher = _matcher()
        wanted = ANY_OBJECT if schema is None else schema
        text = json.dumps(wanted)
        if len(text) > _MOST_SCHEMA:
            raise _refused(f"the schema has {len(text)} characters, at most {_MOST_SCHEMA} are taken")
        bound = self._bind()
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_flexible": False})
            fault = LLMatcher.validate_grammar(grammar, bound)
        except ValueError as error:
            grammar, fault = "", str(error) or "it is no schema"
        if fault:
            raise _refused(f"the schema cannot be followed: {_reason(fault)}")
        place = endless(wanted)
        if place is not None:
            raise _refused(
                f"the schema has no answer that ends: {place[:200]} needs itself again and again; make a property optional, or "
                "allow something else, such as null, by anyOf"
            )
        found = self._begun(grammar)
        if not opened and not thinks:
            return found
        return self._lark(reasoned_json(wanted, self._special(), opened=opened, thinks=thinks), "response_format")

    def calls(self, wanted: CallConstraint, *, opened: bool = False, thinks: bool = False) -> JsonGrammar:
        """A grammar for an answer that calls functions (`calls_grammar` says how). Raises RequestError for a schema that
        cannot be followed, with its function's name."""
        for function in wanted.functions:
            try:
                self.json(function.schema)
            except RequestError as error:
                raise RequestError(f"tools: function {quote(function.name)}: {error}", field="tools") from None
        if wanted.instead is not None:
            self.json(wanted.instead)
        return self._lark(calls_grammar(wanted, self._special(), opened=opened, thinks=thinks), "tools")

    def _lark(self, grammar: str, field: str) -> JsonGrammar:
        """A grammar whose schemas can be followed each by itself; `field` asks for it."""
        LLMatcher, bound = _matcher(), self._bind()
        try:
            compiled = LLMatcher.grammar_from_lark(grammar)
            fault = LLMatcher.validate_grammar(compiled, bound)
        except ValueError as error:
            compiled, fault = "", str(error) or "it is no grammar"
        if fault:
            raise RequestError(f"what is asked for cannot be followed together: {_reason(fault)}", field=field)
        return self._begun(compiled)

    def _begun(self, grammar: str) -> JsonGrammar:
        """A grammar that was seen to begin."""
        found = JsonGrammar(self._bind(), grammar, self._vocabulary)
        failure = found.start().begin()
        if failure:
            raise _refused(f"the schema cannot be followed: {failure}")
        return found

    def _special(self) -> dict[str, int]:
        """The tokens that are not written as text: llguidance takes some for it that a tokenizer does not."""
        bound = self._bind()
        added: dict[str, int] = self._tokenizer.get_added_vocab()
        return {text: id for text, id in added.items() if id < self._vocabulary and bound.is_special_token(id)}

    def _bind(self) -> Any:
        """The tokenizer as llguidance reads it, made once: it takes a second."""
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._bound is None:
                try:
                    self._bound = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._stops)
                except Exception as error:  # it raises many kinds for tokenizers whose bytes it cannot tell
                    raise _refused(
                        f"this model's tokenizer cannot be guided by a schema: {str(error).strip()[:200]}"
                    ) from None
            return self._bound


class JsonGrammar:
    """A compiled schema; each answer walks through it on its own."""

    def __init__(self, tokenizer: Any, grammar: str, vocabulary: int) -> None:
        self._tokenizer, self._grammar, self._vocabulary = tokenizer, grammar, vocabulary

    def start(self) -> GrammarMatcher:
        """Begin one answer."""
        from llguidance import LLMatcher

        return GrammarMatcher(LLMatcher(self._tokenizer, self._grammar, log_level=0), self._vocabulary)


class GrammarMatcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self.failure = ""
        """Why the answer cannot go on: the grammar is too large for llguidance's bounds, or the tokenizer lacks a token."""
        self._mask = np.zeros((vocabulary + 31) // 32, dtype=np.int32)  # a bit a token

    def begin(self) -> str:
        """Why nothing may be written at all; empty where something may."""
        self._look()
        return self.failure

    def restrict(self, row: Tensor) -> None:
        """Rule out, in a row of logits (V,), every token that may not follow; nothing where `failure` says why none may."""
        self._look()
        if not self.failure:
            allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: len(row)]
            row.masked_fill_(to_device([torch.from_numpy(allowed == 0)], row.device)[0], float("-inf"))

    def accept(self, token: int) -> bool:
        """Go on by a token; True when the answer is complete with it, or `failure` says why it cannot go on."""
        if not self.failure:
            self._matcher.consume_token(token)
            self._fail(self._matcher.is_error())
        return bool(self.failure) or bool(self._matcher.is_stopped())

    def _look(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._fail(self._matcher.is_error() or not self._mask.any())

    def _fail(self, failed: bool) -> None:
        if failed:
            lines = self._matcher.get_error().strip().splitlines()
            self.failure = f"no token may come next ({lines[0][:200] if lines else 'the tokenizer has none for it'})"


def _matcher() -> Any:
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise _refused(
            "JSON-schema output needs llguidance; install it on the server: pip install 'graftlm[serve]'"
        ) from None
    return LLMatcher


def _reason(fault: str) -> str:
    """llguidance's message on one line, with ways out that a request has."""
    said = " ".join(fault.split())
    said = said.replace("Enable 'coerce_one_of' option to approximate oneOf with anyOf", "Write anyOf instead")
    return said.replace("Unimplemented keys:", "these keywords are not supported, leave them out:")[:300]


def _refused(message: str) -> RequestError:
    return RequestError(message, field="response_format")
