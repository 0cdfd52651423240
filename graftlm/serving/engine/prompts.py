"""How a base or an adapter is asked: its tokenizer, its template, and whether it knows chats or plain texts.

The same `base/chat.py` encodes here that encoded in training, with the date and the tokens that the adapter's manifest names,
so what was trained is what is asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from graftlm.adapters import peft_format as adapter_format
from graftlm.base.chat import Encoder
from graftlm.base.loading import Base, load_tokenizer
from graftlm.base.template_render import Tools, message_of, probe_text
from graftlm.errors import DataError, ModelError, RequestError
from graftlm.jsonfile import read_json
from graftlm.serving.engine.answer_parser import CLOSE, OPEN, ReasoningName
from graftlm.serving.engine.tool_call_forms import FORM_NAMES, CallForm, FormName, find_form, usual_form, writes_tools

Style = Literal["chat", "text"]
_PLAIN_TEXT = "asked in plain text, since it has no chat template or was trained without (graft serve --format chat)"


@dataclass(frozen=True, slots=True)
class Parsers:
    """How answers to chats are read: `auto` finds it in the chat template, other names are those of vLLM's parsers."""

    tool_calls: FormName | Literal["auto"] = "auto"
    reasoning: ReasoningName | Literal["auto", "none"] = "auto"


class PromptEncoder:
    """Turns chats and texts into prompts for one base, or one adapter version on it."""

    def __init__(
        self, tokenizer: Any, known: Mapping[str, Any] | None, style: str = "auto", parsers: Parsers = Parsers()
    ) -> None:
        """`known` is the manifest of the adapter, or of a tuned model; `style` may force chat or text."""
        self.tokenizer, self._parsers = tokenizer, parsers
        self.encoder = Encoder(tokenizer, date=((known or {}).get("template") or {}).get("date"))
        self.style: Style = choose_format(style, known, self.encoder)
        self.stop_ids = self.encoder.stop_ids
        self.hidden_ids = hidden_ids(self.encoder)

    def chat(self, messages: Sequence[dict[str, Any]], tools: Tools | None = None) -> list[int]:
        """The tokens that ask for the next assistant turn. One that knows texts only is given the contents as one text.

        Raises DataError for a conversation that the template refuses, RequestError for what plain text has no place for.
        """
        if self.style == "chat":
            return self.encoder.prompt(messages, tools)
        for name in ("tool_calls", "reasoning_content"):
            if any(message.get(name) for message in messages):
                raise RequestError(
                    f"a message has {name}, and this model is {_PLAIN_TEXT}; leave {name} out, or write it into the content",
                    field="messages",
                )
        if not messages:
            raise DataError("a conversation needs at least one message")
        return self.text("\n".join(str(message.get("content") or "") for message in messages))

    def text(self, prompt: str) -> list[int]:
        """The tokens of a raw prompt."""
        return self.encoder.prompt_text(prompt)

    @cached_property
    def _form(self) -> CallForm | str:
        """The form of tool calls, or why there is none."""
        if self.style != "chat":
            return f"it is {_PLAIN_TEXT}"
        if not writes_tools(self.encoder):
            return "its chat template has no place for tools"
        found = find_form(self.encoder)
        name = self._parsers.tool_calls
        if name != "auto":
            return found if found is not None and found.name == name else usual_form(name)
        if found is None:
            known = ", ".join(FORM_NAMES)
            return (
                f"its chat template writes calls in a form that this server does not read; it reads {known} "
                "(graft serve --tool-call-parser)"
            )
        return found

    def call_form(self) -> CallForm:
        """The form in which this model writes tool calls. Raises RequestError where it cannot be given tools."""
        if isinstance(self._form, str):
            raise RequestError(f"this model cannot be given tools: {self._form}; leave tools out", field="tools")
        return self._form

    @cached_property
    def thinks(self) -> bool:
        """Whether reasoning is told from content in answers: by name, or where the chat template has it."""
        if self.style != "chat" or self._parsers.reasoning == "none":
            return False
        if self._parsers.reasoning != "auto":
            return True
        turn = {**message_of("assistant", probe_text(1)), "reasoning_content": probe_text(2)}
        text = self.encoder.attempt([message_of("user", probe_text(0)), turn])
        prompt = self.encoder.attempt([message_of("user", probe_text(0))], prompt=True) or ""
        return CLOSE in self.encoder.template or CLOSE in (text or "") or prompt.rstrip().endswith(OPEN)

    def opens_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether the answer to a prompt begins within reasoning: the prompt ends so, or `deepseek_r1` takes it so."""
        if not self.thinks:
            return False
        return self._parsers.reasoning == "deepseek_r1" or self.show(prompt[-16:]).rstrip().endswith(OPEN)

    def show(self, ids: Sequence[int]) -> str:
        """Tokens as the text that a reader gets."""
        return self.tokenizer.decode([i for i in ids if i not in self.hidden_ids], skip_special_tokens=False)


def hidden_ids(encoder: Encoder) -> frozenset[int]:
    """Tokens without a place in the text: what begins, ends and pads. A special token that a model was taught stays."""
    tokenizer: Any = encoder.tokenizer
    return frozenset(i for i in (*encoder.stop_ids, tokenizer.bos_token_id, tokenizer.pad_token_id) if i is not None)


def choose_format(asked: str, known: Mapping[str, Any] | None, encoder: Encoder) -> Style:
    """`auto`: what the adapter (or the tuned model) was trained on; else chat where the tokenizer has a template."""
    if asked in ("chat", "text"):
        return "chat" if asked == "chat" else "text"
    formats = ((known or {}).get("data") or {}).get("train", {}).get("formats")
    if formats:
        return "chat" if "chat" in formats else "text"
    return "chat" if encoder.has_own_template else "text"


class PromptEncoderCache:
    """The prompts of a base, and of the adapter versions that were asked lately.

    Versions that are asked alike, by the base's tokenizer with the same date and format, share one: a template takes tens of
    kilobytes, and a server sees thousands of versions.
    """

    _MOST, _MOST_KINDS = 256, 32

    def __init__(self, base: Base, style: str = "auto", parsers: Parsers = Parsers()) -> None:
        self._tokenizer, self._style, self._parsers = base.tokenizer, style, parsers
        self.base = PromptEncoder(base.tokenizer, _tuned(base.folder), style, parsers)
        self._of: OrderedDict[str, PromptEncoder] = OrderedDict()
        self._kinds: OrderedDict[str, PromptEncoder] = OrderedDict()

    def known(self, digest: str) -> PromptEncoder | None:
        """Those of a version, or of the base, where they need no reading of files."""
        return self._of.get(digest) if digest else self.base

    def of(
        self, digest: str, folder: Path | None, manifest: Callable[[], Mapping[str, Any] | None] | None = None
    ) -> PromptEncoder:
        """The prompts of an adapter version, or of the base without one. Raises AdapterError, StoreError, ModelError.

        `manifest` gives the version's, checked; without it the whole folder is.
        """
        if not digest or folder is None:
            return self.base
        found = self._of.get(digest)
        if found is None:
            own = manifest() if manifest is not None else adapter_format.inspect_folder(folder).manifest
            known = own or _tuned_or_none(self.base)
            listed = (folder / "tokenizer.json").is_file() if own is None else "tokenizer.json" in own["files"]
            found = (
                PromptEncoder(load_tokenizer(folder), known, self._style, self._parsers)
                if listed
                else self._like(known)
            )
            self._of[digest] = found
            if len(self._of) > self._MOST:
                self._of.popitem(last=False)
        return found

    def _like(self, known: Mapping[str, Any] | None) -> PromptEncoder:
        """Those of a version that is asked by the base's tokenizer."""
        formats = (((known or {}).get("data") or {}).get("train") or {}).get("formats") or {}
        kind = f"{((known or {}).get('template') or {}).get('date')} {sorted(formats)}"
        found = self._kinds.get(kind)
        if found is None:
            found = self._kinds[kind] = PromptEncoder(self._tokenizer, known, self._style, self._parsers)
            if len(self._kinds) > self._MOST_KINDS:
                self._kinds.popitem(last=False)
        return found


def _tuned(folder: Path) -> dict[str, Any] | None:
    """What a model folder that Graft wrote says of its training."""
    try:
        return read_json(folder / "graft.json", ModelError)
    except ModelError:
        return None


def _tuned_or_none(base: PromptEncoder) -> dict[str, Any] | None:
    """An adapter without a manifest is asked as its base is."""
    return {"template": {"date": base.encoder.date}, "data": {"train": {"formats": {base.style: 1}}}}
