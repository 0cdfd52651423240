"""Find the characters of a rendered chat that the model itself generates.

Some templates mark them: the text between `{% generation %}` and `{% endgeneration %}` is the model's. For all others the
text T of a row is compared with a skeleton (`template_skeleton.py`): the same conversation rendered (`template_render.py`)
with every content replaced by a sentinel, a word that occurs nowhere else. T must be exactly the skeleton's literal parts
with the contents put back, so a template that drops, shortens or moves a message is detected on the row where it happens. An
assistant turn (`template_turns.py`) begins where the generation prompt ends, so that an empty `<think></think>` block, the
content and the tool calls are targets and the header is not. It ends after the end-of-turn marker: the text that follows the
turn both when it is the last one and when another turn follows.

Prefixes of the conversation are rendered only to find these two borders, never to cut T: templates such as Qwen3's drop the
thinking of earlier turns, so that a prefix's text is not a prefix of T. A skeleton depends on roles, tools and tool calls but
not on contents, so one skeleton serves all conversations of the same form.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from graftlm.base.jinja import MARKS, OPEN, unmark
from graftlm.base.template_render import Message, TemplateRenderer, Tools, message_of, probe_text
from graftlm.base.template_skeleton import Field, Skeleton, SkeletonCache, align, moved
from graftlm.base.template_turns import TurnFinder
from graftlm.config.fields import TrainOn
from graftlm.errors import DataError

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Marked:
    """A text and the character ranges of its target tokens: what the model generates, or everything.

    `bos`: add the tokenizer's own first tokens (a chat template writes them itself). `eos`: add the end token after the last
    range, as a target token, unless the text ends with it already.
    """

    text: str
    spans: tuple[Span, ...]
    bos: bool = False
    eos: bool = False


class Template:
    """One chat template, with the tokenizer's special tokens and the date it may print.

    `source`: the Jinja text. `variables`: the template's variables besides the messages (`bos_token`, `eos_token`, ...).
    `specials`: strings that are single tokens; an end-of-turn marker is one of them. `date`: ISO date for `strftime_now` and
    `date_string`, so that a row has the same tokens on every day. Raises ModelError if the template is not valid Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, str], specials: Iterable[str], date: str) -> None:
        self.renderer = TemplateRenderer(source, variables, specials, date)
        self._turns = TurnFinder(self.renderer)
        self._marks = self._marks_hold_the_end()
        self._skeletons = SkeletonCache(self.renderer, self._turns, self._marks)

    @property
    def source(self) -> str:
        return self.renderer.source

    @property
    def notes(self) -> list[str]:
        """Notes for the user about this template."""
        return self.renderer.notes

    def render(self, messages: Sequence[Message], tools: Tools | None = None, *, prompt: bool = False) -> str:
        """The text of a conversation; `prompt` adds the generation prompt. Raises DataError."""
        return self.renderer.render(messages, tools, prompt=prompt)

    def mark(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        *,
        masked: Collection[int] = (),
        train_on: TrainOn = "all-assistant",
    ) -> Marked:
        """The text of a conversation and its target ranges, without messages with an index in `masked`.

        `train_on`: what the model generates, only the last assistant message of it if that is not masked, or the whole text. Of
        a masked message the whole text leaves out the turn of an assistant, and the content of any other role. Raises
        DataError if the template leaves out or changes a part of the conversation, with what it did and the way out.
        """
        for index, message in enumerate(messages):
            for name in ("content", "reasoning_content"):
                if (found := MARKS.search(str(message.get(name)))) is not None:
                    raise DataError(
                        f"messages[{index}].{name} holds U+{ord(found[0]):04X}, which Unicode reserves and no text "
                        "has; remove it"
                    )
        prepared = self.renderer.prepare(messages)
        apart = [_thinking_apart(message) for message in prepared]
        if apart == prepared:
            return self._mark(prepared, tools, masked, train_on)
        # Thinking inside the content: pass it as thinking to a template that writes thinking, and separately to a template that
        # separates them itself.
        forms = (apart, prepared) if self._skeletons.writes_thinking else (prepared, apart)
        try:
            return self._mark(forms[0], tools, masked, train_on)
        except DataError:
            return self._mark(forms[1], tools, masked, train_on)

    def _mark(self, messages: list[Message], tools: Tools | None, masked: Collection[int], train_on: TrainOn) -> Marked:
        text = self.renderer.render_marked(messages, tools, prompt=False)
        skeleton, fields = self._skeletons.skeleton(messages, tools)
        text, blocks = unmark(text)
        starts = align(text, skeleton, fields)
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        trained = set(assistants[-1:] if train_on == "last-assistant" else assistants) - set(masked)
        if self._marks:
            if len(blocks) != len(skeleton.blocks):
                raise DataError("the chat template marks other parts of this conversation as generated than its form")
            turns = list(zip(skeleton.blocks, blocks, strict=True))
        else:
            turns = [
                (turn.message, (moved(turn.start, skeleton, starts), moved(turn.end, skeleton, starts)))
                for turn in skeleton.turns
            ]
        eos = False
        if not self._marks and turns and turns[-1][0] == len(messages) - 1 and (skeleton.ending or skeleton.eos):
            last, (start, end) = turns[-1]
            text = text[:end] + skeleton.ending
            turns[-1] = (last, (start, len(text)))
            eos = skeleton.eos and last in trained
        spans = [span for message, span in turns if message in trained]
        if train_on == "everything":
            left_out = [span for message, span in turns if message in masked]
            left_out += [span for message, span in _contents(skeleton, fields, starts) if message in masked]
            spans = _everything(len(text), [start for start, _ in spans], left_out)
        return Marked(text, _not_empty(spans), eos=eos)

    def stop_strings(self) -> list[str]:
        """The special tokens that end the model's turn: those after a last turn, plain or a tool call."""
        return self._turns.stop_strings()

    def _marks_hold_the_end(self) -> bool:
        """Whether the template's generation marks include the end of the turn, which must be a target."""
        answer = probe_text(1)
        try:
            conversation = [message_of("user", probe_text(0)), message_of("assistant", answer)]
            marked = self.renderer.render_marked(conversation, None, prompt=False)
        except DataError:
            return OPEN in self.source or re.search(r"\{%-?\+?\s*generation\s*[-+]?%\}", self.source) is not None
        text, blocks = unmark(marked)
        blocks = _joined(blocks)
        if not blocks:
            return False
        if any(text[start:end].rstrip().endswith(answer) for start, end in blocks):
            self.renderer.note(
                "the chat template's {% generation %} marks leave out the end of the turn; "
                "its turns are found without them"
            )
            return False
        return True


def _contents(skeleton: Skeleton, fields: Sequence[Field], starts: Sequence[int]) -> list[tuple[int, Span]]:
    """Where each content stands in the row's text, with the message that it belongs to; `starts` are those of the literals."""
    ends = [start + len(literal) for start, literal in zip(starts, skeleton.literals, strict=True)]
    return [
        (fields[field].message, (end, start))
        for field, end, start in zip(skeleton.fields, ends[:-1], starts[1:], strict=True)
    ]


def _everything(length: int, borders: Sequence[int], left_out: Sequence[Span]) -> list[Span]:
    """The whole text without some ranges, in pieces that begin where turns begin, so that its tokens stay the same."""
    cuts = sorted({0, length, *borders, *(at for span in left_out for at in span)})
    return [
        (start, end)
        for start, end in pairwise(cuts)
        if not any(first <= start and end <= last for first, last in left_out)
    ]


def _not_empty(spans: Iterable[Span]) -> tuple[Span, ...]:
    return tuple(span for span in spans if span[1] > span[0])


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Join adjacent ranges."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _thinking_apart(message: Message) -> Message:
    """`<think>A</think>B` in an assistant's content, as the fields `reasoning_content` A and `content` B."""
    content = message.get("content")
    if message["role"] != "assistant" or "reasoning_content" in message or not isinstance(content, str):
        return message
    head, mark, tail = content.partition("</think>")
    if not mark or "</think>" in tail:
        return message
    thought = head.rpartition("<think>")[2].strip("\n")
    return {**message, "reasoning_content": thought, "content": tail.lstrip("\n")}
