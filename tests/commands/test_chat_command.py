"""`graft chat`: one answerer, or two side by side, each in a conversation of its own."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import tiny_server
from rich.console import Console
from typer.testing import CliRunner

from graftlm.cli import app
from graftlm.commands import chat
from graftlm.commands.chat import Conversation, Side, SideAnswer, render
from graftlm.config import ChatConfig
from graftlm.errors import ConfigError, StoreError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_server.new_store(tmp_path_factory.mktemp("chat"))


def config(store: Path, **options: Any) -> ChatConfig:
    return ChatConfig.build(
        {"model": str(tiny_run.folder()), "store": store, "device": "cpu", "max_tokens": 9, **options}
    )


@pytest.fixture
def pair(store: Path) -> Iterator[Conversation]:
    conversation = Conversation(config(store, adapter="says@1", beside="says@2", format="chat"))
    yield conversation
    conversation.engine.close()


def texts(conversation: Conversation, line: str) -> list[str]:
    *_, last = conversation.ask(line)
    return [answer.text for answer in last]


def talked(*given: object, lines: str, terminal: bool) -> Any:
    """`graft chat` with lines typed, on a terminal of 80 columns or into a pipe."""
    env = {"COLUMNS": "80", **({"FORCE_COLOR": "1", "TERM": "xterm"} if terminal else {})}
    words = ["chat", "--model", str(tiny_run.folder()), *map(str, given), "--max-tokens", "9"]
    found = CliRunner().invoke(app, words, input=lines, env=env)
    assert found.exit_code == 0, found.output
    return found


def test_two_answers_stand_side_by_side_in_the_terminal(store: Path) -> None:
    found = talked(
        "--store",
        store,
        "--adapter",
        "says@prod",
        "--beside",
        "says@2",
        lines="3: \n\n/new\n5: \n/exit\n",
        terminal=True,
    )
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", found.stdout)
    assert len(re.findall(r"│ ALPHA +│ +│ BETA +│", shown)) >= 2, shown
    assert re.search(r"─ says@prod ─+╮ +╭─ says@2 ─", shown)
    assert "6 tokens" in shown
    assert "a new conversation" in shown


def test_into_a_pipe_go_the_answers_and_nothing_else(store: Path) -> None:
    lines = "3: \n\n/new\n5: \n"
    one = talked("--store", store, "--adapter", "says@prod", lines=lines, terminal=False)
    assert one.stdout == "ALPHA\nALPHA\n"
    assert "a new conversation" in one.stderr
    two = talked("--store", store, "--adapter", "says@prod", "--beside", "says@2", lines=lines, terminal=False)
    assert two.stdout == "says@prod: ALPHA\nsays@2: BETA\n" * 2
    assert "\x1b" not in one.output + two.output


def test_what_cannot_begin_is_said_before_a_question_is_asked(store: Path) -> None:
    with pytest.raises(StoreError, match=r"no adapter named 'sayz'.*says"):
        Conversation(config(store, adapter="sayz"))
    with pytest.raises(ConfigError, match="'says' is what answers already"):
        config(store, adapter="says", beside="says")
    with pytest.raises(ConfigError, match="'base' is what answers already"):
        config(store, beside="base")


def test_each_side_is_asked_with_what_it_has_said_itself(pair: Conversation) -> None:
    assert texts(pair, "3: ") == texts(pair, "4: ") or pair.sides[0].messages != pair.sides[1].messages
    assert [m["role"] for m in pair.sides[0].messages] == ["user", "assistant"] * 2
    left, right = (side.encode("5: ") for side in pair.sides)
    assert left == pair.sides[0].encoder.chat([*pair.sides[0].messages, {"role": "user", "content": "5: "}])
    assert left != right
    pair.forget()
    assert pair.sides[0].encode("5: ") == pair.sides[1].encode("5: ")


def test_the_same_answers_come_from_one_side_alone(store: Path, pair: Conversation) -> None:
    together = texts(pair, "3: ")
    for label, expected in zip(("says@1", "says@2"), together):
        alone = Conversation(config(store, adapter=label, format="chat"))
        assert texts(alone, "3: ") == [expected]
        alone.engine.close()


def test_a_system_message_outlives_a_new_conversation(store: Path) -> None:
    one = Conversation(config(store, adapter="alpha", format="chat", system="be kind"))
    texts(one, "3: ")
    one.forget()
    assert one.sides[0].messages == [{"role": "system", "content": "be kind"}]
    one.engine.close()


def test_a_conversation_that_has_grown_too_long_says_so_and_can_begin_anew(pair: Conversation) -> None:
    with pytest.raises(ConfigError, match=r"tokens, and 256 fit; begin anew with /new"):
        list(pair.ask("x" * 300))
    assert texts(pair, "3: "), "it can still be asked"


def test_what_fails_on_one_side_is_said_there_and_is_no_part_of_its_conversation(tmp_path: Path) -> None:
    store = tiny_server.new_store(tmp_path)
    conversation = Conversation(config(store, adapter="says@1", beside="beta"))
    file = next(side.folder for side in conversation.sides if side.label == "beta") / "adapter_model.safetensors"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1])
    *_, answers = conversation.ask("3: ")
    assert answers[0].text == "ALPHA"
    assert "is cut short" in answers[1].error
    assert [len(side.messages) for side in conversation.sides] == [2, 0]
    console = Console(file=StringIO(), width=120)
    console.print(render(conversation.sides, answers))
    assert "is cut short" in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    conversation.engine.close()


def test_ctrl_c_ends_the_answer_and_not_the_conversation(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(config(store, max_tokens=200))
    console = Console(file=StringIO(), width=60)
    before = signal.getsignal(signal.SIGINT)
    asked = conversation.ask

    def interrupted(line: str) -> Iterator[list[SideAnswer]]:
        for i, answers in enumerate(asked(line)):
            if i == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield answers

    monkeypatch.setattr(conversation, "ask", interrupted)
    chat._show(conversation, "once", console, console)  # pyright: ignore[reportPrivateUsage]
    assert "stopped" in console.file.getvalue()  # type: ignore[attr-defined]
    assert signal.getsignal(signal.SIGINT) is before
    assert conversation.sides[0].messages == []
    assert not conversation.engine.busy, "nothing of it goes on"
    monkeypatch.undo()
    assert texts(conversation, "again")[0]
    conversation.engine.close()


def test_one_answer_is_no_grid(store: Path) -> None:
    side = Side("base", None)  # type: ignore[arg-type]
    console = Console(file=StringIO(), width=40)
    console.print(render([side], [SideAnswer("one\ntwo", 2, "length")]))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("╭") == 1
    assert "2 tokens, cut at the limit" in said
