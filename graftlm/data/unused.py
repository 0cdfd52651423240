"""Parts of rows that are not used: columns of no format, and keys of messages that the chat template does not write.

They are reported once, by `graft check` and at the start of training. Whether a template writes a key (`name`,
`tool_call_id`, the `id` of a call) is found by rendering the row with and without it; a key that makes no difference in the
first sixteen rows that have it is reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from graftlm.base.chat import Encoder
from graftlm.base.template_render import Message
from graftlm.data.columns import Format, RawRow, columns_of
from graftlm.data.rows import ChatRow
from graftlm.errors import DataError

_TRIES = 16
_SHOWN = 12
_WRITTEN = ("role", "content", "reasoning_content", "tool_calls")
"""Keys whose omission by a template is an error (`base/template.py`)."""
_OF_CALLS = "tool_calls[]."


class Unused:
    """Collects unused columns and keys by source."""

    def __init__(self) -> None:
        self._columns: dict[str, dict[str, None]] = {}
        self._dropped: dict[str, None] = {}
        self._without_effect: Counter[str] = Counter()
        self._written: set[str] = set()

    def columns(self, source: str, raw: RawRow, form: Format) -> None:
        """Record a row's columns that its format does not have."""
        used = columns_of(form)
        for name, value in raw.columns.items():
            if name not in used and value not in (None, "", [], {}):
                self._columns.setdefault(source, {})[name] = None

    def keys(self, parsed: ChatRow, encoder: Encoder) -> None:
        """Record the keys of a conversation's messages that its template does not write."""
        self._dropped |= dict.fromkeys(parsed.dropped)
        for key in dict.fromkeys(key for message in parsed.messages for key in _keys(message)):
            if key in self._written or self._without_effect[key] >= _TRIES:
                continue
            without = [_without(message, key) for message in parsed.messages]
            try:
                same = encoder.same_text(parsed.messages, without, parsed.tools)
            except DataError:  # the template needs it
                same = False
            if same:
                self._without_effect[key] += 1
            else:
                self._written.add(key)

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for the columns of each source, and one for keys."""
        notes = [f"{source}: columns not used: {_listed(names)}" for source, names in self._columns.items()]
        keys = [*self._dropped, *(key for key in self._without_effect if key not in self._written)]
        if keys:
            notes.append(f"keys of messages not used, since the chat template does not write them: {_listed(keys)}")
        return tuple(notes)


def _listed(names: Sequence[str] | dict[str, None]) -> str:
    found = [name or "''" for name in names]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(name if len(name) <= 60 else f"{name[:57]}..." for name in found[:_SHOWN]) + more


def _keys(message: Message) -> list[str]:
    calls = [call for call in message.get("tool_calls") or () if isinstance(call, dict)]
    found = [key for key in message if key not in _WRITTEN]
    # A call may stand in its message without a `function` around it; the function's own keys are its content.
    return [
        *found,
        *(_OF_CALLS + key for c in calls if "function" in c for key in c if key not in ("function", "type")),
    ]


def _without(message: Message, key: str) -> Message:
    if not key.startswith(_OF_CALLS):
        return {name: value for name, value in message.items() if name != key}
    inner = key.removeprefix(_OF_CALLS)
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [{k: v for k, v in call.items() if k != inner} for call in calls]}
