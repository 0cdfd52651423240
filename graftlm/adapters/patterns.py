"""Patterns that match layer names: globs in Graft's options, and regular expressions in PEFT's configs.

An `adapter_config.json` is untrusted, and Python's `re` backtracks: matching one name with `(.*)*(.*)*(.*)*x` takes years and
cannot be interrupted. So patterns of files run in RE2 (Cox 2007, "Regular Expression Matching Can Be Simple And Fast"), in time
linear in the name, and their total size in one file is bounded. PEFT uses Python's `re`, so patterns that the two engines read
differently are refused.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import re2

from graftlm.errors import AdapterError

MOST_NAMES, MOST_EXPRESSIONS = 100_000, 2_000
"""Plain names and patterns in one file: a rank and an alpha for each layer of the largest models are about 1,800."""
MOST_CHARACTERS = 1 << 18  # of all expressions
MOST_INSTRUCTIONS = 1 << 17
"""RE2 instructions of all expressions in one file. A name takes at most 40 ns for each, on one core."""
_MEMORY_BYTES = 1 << 22  # memory of one compiled pattern
# The output of re.escape for a name, or a name without dots: compared as text.
_LITERAL = re.compile(r"(?:[A-Za-z0-9_]|\\[.\-])+")
_UNLIKE = {
    "{,": "'{,n}', which engines read in two ways; write {0,n}",
    "[:": "'[:', which engines read in two ways",
    "(?=": "a lookahead", "(?!": "a lookahead", "(?<=": "a lookbehind", "(?<!": "a lookbehind",
    "(?P=": "a backreference", "(?(": "a condition", "(?>": "an atomic group", "(?#": "a comment",
}  # fmt: skip

# PEFT 0.21 refuses LoRA on these layers of these models, since their GPU kernels read the weights without calling the module.
_REFUSED_BY_PEFT = {
    "FalconH1ForCausalLM", "FalconMambaForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM", "NemotronHForCausalLM",
}  # fmt: skip


def matches(name: str, pattern: str) -> bool:
    """Whether an option's pattern matches a layer: its full name, its end after a dot, or a glob with * ? [ ]."""
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return named_by(name, pattern)


def named_by(name: str, end: str) -> bool:
    """Whether `end` is a module's full name or its end after a dot, as PEFT matches the entries of its lists."""
    return name == end or name.endswith("." + end)


def refused_by_peft(architecture: str, name: str) -> bool:
    """Whether PEFT refuses an adapter on a layer of a model class (`_check_lora_target_modules_mamba`)."""
    return architecture in _REFUSED_BY_PEFT and name.rpartition(".")[2] == "out_proj"


class Expressions:
    """Compiles the regular expressions of one file; `where` begins every error."""

    def __init__(self, where: str) -> None:
        self._where, self._names, self._expressions, self._characters, self._instructions = where, 0, 0, 0, 0

    def compile(self, key: str, text: str, form: str = "{}") -> Any:
        """`form` with `text`, the value of `key`, put into it: an RE2 expression whose `match` and `fullmatch` take bytes.

        Raises AdapterError for an invalid regular expression, one that RE2 does not support, and one beyond the bounds.
        """
        self._expressions += 1
        self._bound(key, text)
        odd = next((what for mark, what in _UNLIKE.items() if mark in text), None)
        options = re2.Options()
        options.max_mem, options.log_errors, options.never_capture = _MEMORY_BYTES, False, "(?P<" not in form
        try:
            if not odd:
                re.compile(text)  # PEFT's engine: syntax of RE2 alone is refused
                re.compile(form.format(text))
            found = None if odd else re2.compile(form.format(text).encode(), options)
        except re2.error as error:
            found, odd = None, str(error.args[0].decode() if isinstance(error.args[0], bytes) else error)
        except (re.error, RecursionError, OverflowError, UnicodeEncodeError) as error:
            why = "it is nested too deep" if isinstance(error, RecursionError) else error
            raise AdapterError(f"{self._where}: {key} {text[:200]!r} is not a regular expression: {why}") from None
        if found is None:
            raise AdapterError(
                f"{self._where}: {key} {text[:200]!r} holds {odd}. Patterns in a file are matched by RE2, which does not "
                f"support this; write the names of the layers instead: {_plain(key)}"
            )
        self._instructions += found.programsize
        self._bound(key, "")
        return found

    def values(self, key: str, patterns: Mapping[str, Any] | None) -> Values:
        """`rank_pattern` or `alpha_pattern`, compiled."""
        found = Values()
        for number, (text, value) in enumerate((patterns or {}).items()):
            if _LITERAL.fullmatch(text):
                self._names += 1
                self._bound(key, "")
                name = text.replace("\\", "")
                found.names.setdefault(name, (number, value))
                found.within.setdefault(name.rpartition(".")[0], (number, value))
            else:
                found.expressions.append((number, self.whole(key, text, r"(.*\.)?({})"), value))
        return found

    def ends(self, key: str, entries: Sequence[str]) -> Callable[[str], bool]:
        """A function that says whether a list has a module's name, or its end after a dot, as PEFT does."""
        self._names += len(entries)
        self._bound(key, "")
        known = frozenset(entries)
        return lambda name: not known.isdisjoint(_ends(name))

    def whole(self, key: str, text: str, form: str = "{}") -> Callable[[str], bool]:
        """A function that says whether an expression matches a full name."""
        fits = self.compile(key, text, form).fullmatch
        return lambda name: fits(name.encode()) is not None

    def _bound(self, key: str, text: str) -> None:
        self._characters += len(text)
        for count, most, what in (
            (self._names, MOST_NAMES, "patterns"), (self._expressions, MOST_EXPRESSIONS, "regular expressions"),
            (self._characters, MOST_CHARACTERS, "characters of patterns"),
            (self._instructions, MOST_INSTRUCTIONS, "instructions of compiled patterns"),
        ):  # fmt: skip
            if count > most:
                raise AdapterError(
                    f"{self._where}: up to an entry of {key} it holds {count:,} {what}, at most {most:,} are allowed; "
                    f"write the names of the layers instead: {_plain(key)}"
                )


def _plain(key: str) -> str:
    return '{"model.layers.0.self_attn.q_proj": ...}' if key.endswith("_pattern") else '["q_proj", "v_proj"]'


def _ends(name: str) -> list[str]:
    """A name and its ends after a dot: `a.b.c`, `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


class Values:
    """The values of `rank_pattern` or `alpha_pattern`: each layer gets the value of the first pattern that matches."""

    def __init__(self) -> None:
        self.names: dict[str, tuple[int, Any]] = {}  # plain name -> number of the pattern, its value
        self.within: dict[str, tuple[int, Any]] = {}  # the module around a plain name -> the same
        self.expressions: list[tuple[int, Callable[[str], bool], Any]] = []

    def of(self, key: str, default: Any) -> Any:
        """The value for a name: PEFT's `get_pattern_key`, so `re.match(rf"(.*\\.)?({pattern})$", key)`."""
        return self._first(key, [self.names[end] for end in _ends(key) if end in self.names], default)

    def of_place(self, place: str, default: Any) -> Any:
        """The same without a base, from the prefix of a layer's tensors; that of a stack is its module's, or below it."""
        module = re.sub(r"(\.base_layer)+$", "", place)
        found = [self.names[end] for end in _ends(module) if end in self.names]
        return self._first(module, [*found, *([self.within[module]] if module in self.within else [])], default)

    def _first(self, key: str, found: list[tuple[int, Any]], default: Any) -> Any:
        number, value = min(found, key=lambda pair: pair[0], default=(math.inf, default))
        return next((v for n, fits, v in self.expressions if n < number and fits(key)), value)
