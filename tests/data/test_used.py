"""Nothing of a row is passed over in silence: it is honoured, refused, or said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_rows import encoder, write
from test_check import rendered

from graftlm import demo
from graftlm.base.chat import Encoder
from graftlm.base.loading import load_tokenizer
from graftlm.data.check import check
from graftlm.data.dataset import Dataset, Example, load
from graftlm.data.sources import Source
from graftlm.errors import DataError
from graftlm.training.view import View

BETWEEN = " ... "
CALL = {"id": "call_7", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TURNS = [turn("user", "One?"), turn("assistant", "First."), turn("user", "Two?"), turn("assistant", "Second.")]


@pytest.fixture(scope="module")
def demo_encoder() -> Encoder:
    """With the bundled model's own template, which writes tools and calls."""
    return Encoder(load_tokenizer(Path(demo.resolve_model("demo"))))


def one(place: Path, row: dict[str, Any], by: Encoder | None = None, name: str = "a") -> Example:
    return read(place, row, by, name).examples[0]


def read(place: Path, row: dict[str, Any], by: Encoder | None = None, name: str = "a") -> Dataset:
    return load([write(place / f"{name}.jsonl", [row])], by or encoder())


def text_of(example: Example) -> str:
    """The trained stretches of an example, with a mark between them."""
    pieces: list[str] = []
    for at in np.flatnonzero(example.loss_mask):
        if not pieces or not example.loss_mask[at - 1]:
            pieces.append("")
        pieces[-1] += encoder().tokenizer.decode([int(example.ids[at])])
    return BETWEEN.join(pieces)


# ---- weight ---------------------------------------------------------------------------------------------------------


def test_a_message_of_weight_0_is_read_and_not_trained(tmp_path: Path) -> None:
    plain = one(tmp_path, {"messages": TURNS})
    for skipped, left in (([1], "Second."), ([3], "First.")):
        weighed = [
            {**t, "weight": int(i not in skipped)} if t["role"] == "assistant" else t for i, t in enumerate(TURNS)
        ]
        found = one(tmp_path, {"messages": weighed})
        assert found.ids.tolist() == plain.ids.tolist()
        assert text_of(found).startswith(left)
        assert BETWEEN not in text_of(found)
        assert not (found.loss_mask & ~plain.loss_mask).any()
    assert text_of(plain).startswith("First.")
    assert text_of(plain).count(BETWEEN) == 1


def test_weights_of_1_and_of_0_on_what_is_not_trained_change_nothing(tmp_path: Path) -> None:
    weighed = [{**t, "weight": 1 if t["role"] == "assistant" else 0} for t in TURNS]
    assert one(tmp_path, {"messages": weighed}).digest == one(tmp_path, {"messages": TURNS}).digest


def test_a_masked_last_turn_of_a_template_without_an_end_trains_no_end_token(
    tmp_path: Path, demo_encoder: Encoder
) -> None:
    for by in (encoder(), demo_encoder):
        found = one(tmp_path, {"messages": [*TURNS[:3], {**TURNS[3], "weight": 0}]}, by)
        whole = one(tmp_path, {"messages": TURNS}, by)
        last = int(np.flatnonzero(found.loss_mask)[-1])
        assert last < int(np.flatnonzero(whole.loss_mask)[-1])
        assert found.loss_mask[:last].tolist() == whole.loss_mask[:last].tolist()


def test_train_on_last_with_a_last_message_of_weight_0_trains_nothing_and_is_refused(tmp_path: Path) -> None:
    last = Encoder(encoder().tokenizer, train_on="last-assistant")
    with pytest.raises(DataError, match="no target token"):
        one(tmp_path, {"messages": [*TURNS[:3], {**TURNS[3], "weight": 0}]}, last)


@pytest.mark.parametrize("weight", [2, -1, 0.5, "0", True, [0]])
def test_other_weights_are_refused(weight: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"messages\[1\].weight: .*; expected 0 \(read, not trained\) or 1 \(trained\)"):
        one(tmp_path, {"messages": [TURNS[0], {**TURNS[1], "weight": weight}]})


def test_weight_1_on_a_user_message_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"messages\[0\].weight: 1 in a message of role 'user'"):
        one(tmp_path, {"messages": [{**TURNS[0], "weight": 1}, TURNS[1]]})


def test_weight_counts_in_lists_of_prompt_and_completion(tmp_path: Path) -> None:
    row = {"prompt": TURNS[:2], "completion": [TURNS[2], {**TURNS[3], "weight": 0}, *TURNS[:2]]}
    assert text_of(one(tmp_path, row)).startswith("First.")
    assert text_of(one(tmp_path, {"prompt": TURNS[:2], "completion": TURNS[2:]})).startswith("Second.")


# ---- columns that are honoured ----------------------------------------------------------------------------------------

SYSTEM = turn("system", "Be brief.")
CHAT = {"messages": [SYSTEM, *TURNS[:2]]}
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "system beside an instruction": ({"system": "Be brief.", "instruction": "One?", "output": "First."}, CHAT),
    "system beside an instruction with an input": (
        {"system": "Be brief.", "instruction": "One", "input": "two", "output": "First."},
        {"messages": [SYSTEM, turn("user", "One\n\ntwo"), TURNS[1]]},
    ),
    "system beside messages": ({"system": "Be brief.", "messages": TURNS[:2]}, CHAT),
    "an empty system": ({"system": " ", "messages": TURNS[:2]}, {"messages": TURNS[:2]}),
    "history": (
        {"instruction": "Two?", "output": "Second.", "history": [["One?", "First."]], "system": "Be brief."},
        {"messages": [SYSTEM, *TURNS]},
    ),
    "history as JSON": ({"instruction": "Two?", "output": "Second.", "history": '[["One?", "First."]]'}, {"messages": TURNS}),
    "an empty history": ({"instruction": "One?", "output": "First.", "history": []}, {"messages": TURNS[:2]}),
    "tools beside an instruction": (
        {"instruction": "One?", "output": "First.", "tools": [TOOL]}, {"messages": TURNS[:2], "tools": [TOOL]},
    ),
    "functions": (
        {"messages": TURNS[:2], "functions": [TOOL["function"]]}, {"messages": TURNS[:2], "tools": [TOOL]},
    ),
    "function_call": (
        {"messages": [TURNS[0], {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [CALL]}]},
    ),
    "lists with a system column": (
        {"system": "Be brief.", "prompt": TURNS[:1], "completion": TURNS[1:2]}, CHAT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_a_row_is_the_same_example_as_its_form_in_messages(name: str, tmp_path: Path, demo_encoder: Encoder) -> None:
    ours, plain = SAME[name]
    found, wanted = (read(tmp_path, row, demo_encoder) for row in (ours, plain))
    assert found.examples[0].digest == wanted.examples[0].digest
    assert not any("columns" in note for note in found.notes)


def test_a_table_has_system_and_history_too(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('system,instruction,output,history\nBe brief.,Two?,Second.,"[[""One?"", ""First.""]]"\n')
    found = load([Source(path=str(file))], encoder()).examples[0]
    assert found.digest == one(tmp_path, {"messages": [SYSTEM, *TURNS]}).digest


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "completion": "b", "system": "s"}, 'system: "s"; expected no such column beside plain texts. '
         "Rename 'prompt' to 'instruction' and 'completion' to 'output'"),
        ({"prompt": "a", "completion": "b", "history": [["a", "b"]]}, "history: [["),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "tools: [{"),
        ({"text": "a", "system": "s"}, 'system: "s"; expected no such column beside plain texts'),
        ({"text": "a", "tools": [TOOL]}, "tools: [{"),
        ({**CHAT, "system": "s"}, "system: a text; expected none beside the first message, of role 'system'"),
        ({**CHAT, "system": 5}, "system: 5; expected a text"),
        ({**CHAT, "history": [["a", "b"]]}, "history: [["),
        ({**CHAT, "chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs: {"),
        ({**CHAT, "functions": [TOOL["function"]], "tools": [TOOL]}, "functions: [{"),
        ({**CHAT, "functions": "f"}, 'functions: "f"; expected a list of function descriptions'),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, 'history[0]: ["a"]; expected a list of pairs of texts'),
        ({"instruction": "a", "output": "b", "history": "x"}, 'history: "x"; expected a list of pairs of texts'),
        ({"instruction": "a", "output": "b", "history": [["a", 5]]}, "history[0][1]: 5; expected a text"),
        ({"messages": [TURNS[0], {**TURNS[1], "thinking": "a", "reasoning_content": "b"}]}, "thinking: beside"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [CALL], "function_call": {"name": "f"}}]}, "function_call: besi"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{**CALL, "type": "custom"}]}]}, 'type: "custom"; expected'),
        ({"messages": [TURNS[0], {**TURNS[1], "function_call": "f"}]}, "tool_calls[0]: {"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        one(tmp_path, row)
    assert said in str(caught.value)


def test_the_way_out_of_a_system_column_beside_texts_works(tmp_path: Path) -> None:
    row = {"instruction": "One?", "output": "First.", "system": "Be brief."}
    assert one(tmp_path, row).digest == one(tmp_path, CHAT).digest


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b", "text": "c"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: line: 'text' is there twice; expected each key once"):
        load([Source(path=str(file))], encoder())


# ---- what is said ------------------------------------------------------------------------------------------------------


def test_columns_that_are_not_used_are_reported_once_for_each_file(tmp_path: Path) -> None:
    row = {
        "prompt": "a",
        "completion": "b",
        "id": 7,
        "source": "web",
        "text": "also",
        "empty": "",
        "none": None,
        "list": [],
    }
    source = write(tmp_path / "a.jsonl", [row, {**row, "score": 0.5}, row])
    other = write(tmp_path / "b.jsonl", [{"text": "a"}])
    notes = (f"{source.path}: columns not used: id, source, text, score",)
    dataset = load([source, other], encoder())
    assert dataset.notes == notes
    report = check([source], encoder(), eval_sources=[source])
    assert report.notes == notes
    assert rendered(report).count("columns not used: id, source, text, score") == 1


def test_train_says_what_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = read(tmp_path, {"text": "a", "id": 7})
    View().data(dataset, dataset)
    assert " ".join(capsys.readouterr().err.split()).count("columns not used: id") == 1


def test_keys_of_messages_are_reported_if_the_template_does_not_write_them(
    tmp_path: Path, demo_encoder: Encoder
) -> None:
    part = {"type": "text", "text": "One?", "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [part], "name": "ann"},
        {"role": "assistant", "tool_calls": [{**CALL, "index": 0}], "annotations": [1], "weight": 1},
        {"role": "tool", "content": "2", "tool_call_id": "call_7"},
        turn("assistant", "Two.", refusal=None),
    ]
    (note,) = read(tmp_path, {"messages": messages, "tools": [TOOL]}, demo_encoder).notes
    head, _, names = note.partition(": ")
    assert head == "keys of messages not used, since the chat template does not write them"
    assert set(names.split(", ")) == {
        "content[].cache_control", "name", "annotations", "tool_calls[].id", "tool_calls[].index", "tool_call_id",
    }  # fmt: skip


def test_a_key_that_the_template_writes_is_not_reported(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(Path(demo.resolve_model("demo")))
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.name %}{{ m.name }}: {% endif %}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    rows = [{"messages": TURNS}, {"messages": [{**TURNS[0], "name": "ann", "mood": "glad"}, TURNS[1]]}]
    notes = load([write(tmp_path / "a.jsonl", rows)], Encoder(tokenizer)).notes
    assert notes == ("keys of messages not used, since the chat template does not write them: mood",)


def test_long_lists_of_unused_columns_are_shortened(tmp_path: Path) -> None:
    (note,) = read(tmp_path, {"text": "a", **{f"c{i}" * 50: 1 for i in range(100)}}).notes
    assert note.endswith(" and 88 more")
    assert len(note) < 1000


def test_a_report_of_notes_is_json(tmp_path: Path) -> None:
    report = check([write(tmp_path / "a.jsonl", [{"text": "a", "id": 1}])], encoder())
    assert json.loads(json.dumps(report.to_json()))["notes"] == list(report.notes)


def test_the_page_about_data_names_every_column_role_and_limit() -> None:
    from graftlm import jsonfile
    from graftlm.data import columns, lines, rows, sources, tables

    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for name in (*columns.KNOWN, *rows.ROLES, *rows._MESSAGE_KEYS, *rows._THINKING):
        assert f"`{name}`" in page, name
    for ending in sources.FORMATS:
        assert ending[1:].upper() in page.upper().replace("ONE OBJECT A LINE", "NDJSON"), ending
    for word in tables._DELIMITERS.values():
        assert word in page
    assert f"at most {lines.MOST_ROW_BYTES >> 20} MB" in page
    assert f"at most {jsonfile.MOST_DEPTH} levels, {jsonfile.MOST_DIGITS} digits" in page
