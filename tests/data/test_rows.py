"""Raw rows to examples, and the faults of bad ones."""

from __future__ import annotations

from typing import Any

import pytest

from graftlm.data.columns import Fault, RawRow, format_of, refuse
from graftlm.data.rows import ChatRow, CompletionRow, ParsedRow, TextRow, parse

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def example_of(columns: dict[str, Any]) -> ParsedRow:
    raw = RawRow("a.jsonl:1", columns)
    form = format_of(raw)
    assert not isinstance(form, Fault), form
    parsed = parse(raw, form)
    assert not isinstance(parsed, list), parsed
    return parsed


def fault_of(columns: dict[str, Any]) -> str:
    raw = RawRow("a.jsonl:7", columns)
    form = format_of(raw)
    if isinstance(form, Fault):
        return str(form)
    faults = parse(raw, form)
    assert isinstance(faults, list), faults
    return "\n".join(map(str, faults))


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def test_each_format_becomes_its_example() -> None:
    assert example_of(chat(USER, ASSISTANT)) == ChatRow("a.jsonl:1", (USER, ASSISTANT))
    assert example_of({"prompt": "a", "completion": "b"}) == CompletionRow("a.jsonl:1", "a", "b")
    assert example_of({"text": "a", "source": "web"}) == TextRow("a.jsonl:1", "a")
    assert example_of({"prompt": [USER], "completion": [ASSISTANT]}) == ChatRow(
        "a.jsonl:1", (USER, ASSISTANT), prompt=1
    )


def test_an_instruction_becomes_a_user_message_with_its_input() -> None:
    for more, content in (({}, "Add"), ({"input": ""}, "Add"), ({"input": "1 2"}, "Add\n\n1 2")):
        parsed = example_of({"instruction": "Add", "output": "3", **more})
        messages = ({"role": "user", "content": content}, {"role": "assistant", "content": "3"})
        assert parsed == ChatRow("a.jsonl:1", messages)


def test_text_parts_are_joined_and_keys_that_are_null_are_dropped() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    message = {"role": "user", "content": parts, "tool_calls": None}
    assert example_of(chat(message, ASSISTANT)) == ChatRow("a.jsonl:1", (USER, ASSISTANT))


def test_tools_and_calls_are_kept_and_a_call_needs_no_content() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    tool = {"type": "function", "function": {"name": "f"}}
    row = chat(USER, {"role": "assistant", "content": None, "tool_calls": [call]}, tools=[tool])
    assert example_of(row) == ChatRow("a.jsonl:1", (USER, {"role": "assistant", "tool_calls": [call]}), tools=(tool,))
    row["tools"] = '[{"type": "function", "function": {"name": "f"}}]'
    assert example_of(row).kind == "chat"


def test_thinking_is_known_by_both_of_its_names() -> None:
    parsed = example_of(chat(USER, {**ASSISTANT, "thinking": "Hm"}))
    assert isinstance(parsed, ChatRow)
    assert parsed.messages[1] == {**ASSISTANT, "reasoning_content": "Hm"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"promt": "a", "completion": "b"}, "a.jsonl:7: columns: has 'promt', 'completion'; expected 'prompt' beside "
         "'completion'. Rename 'promt' to 'prompt'."),
        ({"message": []}, "expected messages, prompt + completion, instruction + output, or text. "
         "'message', did you mean 'messages'?"),
        ({"conversations": []}, "Rename 'conversations' to 'messages'"),
        ({"prompt": "a"}, "expected 'completion' beside 'prompt'. Add the column 'completion'."),
        ({"instruction": "a", "output": "b", "inputs": "c"}, "inputs: an unknown column; expected 'input'"),
        ({}, "has no columns"),
        ({"text": 3}, "a.jsonl:7: text: 3; expected a text. Put it in quotes"),
        ({"text": "  "}, 'text: "  "; expected a text with something in it'),
        ({"prompt": "a", "completion": ""}, 'completion: ""; expected a text with something in it'),
        ({"prompt": None, "completion": "b"}, "prompt: null; expected a text"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "completion: a list of messages"),
        ({"prompt": [USER], "completion": [USER]}, "completion: only user; expected at least one assistant message"),
        (chat(), "messages: []; expected a list of messages"),
        (chat(USER), "messages: only user; expected at least one assistant message. Add the answer"),
        ({"messages": "Hi"}, 'messages: "Hi"; expected a list of messages'),
        (chat("Hi", ASSISTANT), 'messages[0]: "Hi"; expected an object'),
        (chat(USER, {"role": "asistant", "content": "x"}),
         'messages[1].role: "asistant"; expected system, developer, user, assistant, tool. Did you mean'),
        (chat({"from": "human"}, ASSISTANT), "messages[0].role: missing"),
        (chat({"role": "human", "content": "x"}, ASSISTANT), "Rename it to 'user'"),
        (chat(USER, {"role": "assistant", "contents": "x"}), "contents: an unknown key; expected 'content'"),
        (chat(USER, {"role": "assistant"}), "messages[1].content: missing; expected a text"),
        (chat(USER, {"role": "assistant", "content": " "}), 'messages[1].content: " "; expected a text with something'),
        (chat({"role": "user", "content": 5}, ASSISTANT), "messages[0].content: 5; expected a text"),
        (chat({"role": "user", "content": [{"type": "image", "url": "x"}]}, ASSISTANT),
         "messages[0].content[0]: {\"type\": \"image\", \"url\": \"x\"}; expected"),
        (chat({**USER, "reasoning_content": "x"}, ASSISTANT), "messages[0].reasoning_content: in a message of"),
        (chat(USER, {"role": "assistant", "tool_calls": "f()"}), 'messages[1].tool_calls: "f()"; expected a list'),
        (chat(USER, {"role": "assistant", "tool_calls": [{"x": 1}]}), 'tool_calls[0]: {"x": 1}; expected a call'),
        (chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}),
         "messages[1].tool_calls[0].function.arguments: [1]; expected an object"),
        (chat(USER, ASSISTANT, tools="no json"), 'tools: "no json"; expected a list of tool descriptions'),
        (chat(USER, ASSISTANT, tools=["f"]), 'tools: ["f"]; expected a list of tool descriptions'),
    ],
)  # fmt: skip
def test_a_bad_row_says_where_what_and_how_to_mend_it(columns: dict[str, Any], expected: str) -> None:
    assert expected in fault_of(columns)


def test_all_faults_of_a_row_are_found() -> None:
    faults = fault_of(chat({"role": "usr", "content": "x"}, {"role": "assistant", "content": 5}))
    assert "messages[0].role" in faults
    assert "messages[1].content" in faults


def test_long_values_are_shortened() -> None:
    assert len(fault_of({"prompt": ["x" * 5000], "completion": "y"})) < 300
    assert len(fault_of({"text": {"x": "y" * 5000}})) < 300


def test_a_row_of_another_format_than_the_files_first_is_a_fault() -> None:
    faults = parse(RawRow("a.jsonl:7", {"text": "a"}), "messages")
    assert isinstance(faults, list)
    assert "a row of format 'text'; expected 'messages', as the file's first row" in str(faults[0])


def test_twenty_faults_are_listed_and_the_rest_counted() -> None:
    faults = [Fault(f"a.jsonl:{line}", "text", "3", "a text", "") for line in range(1, 26)]
    message = str(refuse(faults))
    assert message.startswith("25 rows cannot be trained on; nothing was trained:")
    assert message.count("a.jsonl:") == 20
    assert message.endswith("and 5 more")
    assert "more" not in str(refuse(faults[:20]))
