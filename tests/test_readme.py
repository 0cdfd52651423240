"""The README says what is true: its commands are commands, its tree is the tree, and it is short."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from graftlm.cli import app
from graftlm.config import CheckConfig, GenerateConfig, TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))]
CONFIGS = {"train": TrainConfig, "generate": GenerateConfig, "check": CheckConfig}


def _commands() -> list[str]:
    text = "\n".join(PAGES).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in text.splitlines()]
    found = [re.split(r"\s+#\s", line)[0] for line in lines if line.startswith("graft ")]
    return list(dict.fromkeys(found))


def test_there_are_commands_to_check() -> None:
    assert len(_commands()) >= 5


@pytest.mark.parametrize("line", _commands())
def test_every_command_of_the_pages_is_one_that_the_program_takes(line: str) -> None:
    words = shlex.split(line)
    group = typer.main.get_command(app)
    name = words[1]
    command = group.get_command(None, name)  # type: ignore[attr-defined, arg-type]
    assert command is not None, f"no command '{name}'"
    rest = words[2:]
    if hasattr(command, "get_command"):  # a group, such as `graft adapters`
        named = command.get_command(None, rest[0])
        name, rest = (f"{name} {rest[0]}", rest[1:]) if named is not None else (f"{name} run", rest)
        command = named or command.get_command(None, "run")  # `graft sweep` alone runs one
        assert command is not None, f"no command '{name}'"
    context = command.make_context(name, rest, resilient_parsing=True)
    flags = {option for parameter in command.params for option in parameter.opts}
    used = {word.split("=")[0] for word in rest if word.startswith("--")}
    assert used <= flags, f"unknown flags {used - flags}"
    config = CONFIGS.get(name)
    values = {
        k: v for k, v in context.params.items() if config and k in config.model_fields and v not in (None, [], ())
    }
    if config is not None and not context.params.get("config_file"):
        config.build(values)


def test_every_file_of_the_tree_is_there() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    folder: list[str] = []
    for line in tree.splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folder = [*folder[:depth], name]
        place = ROOT.joinpath(*folder)
        assert place.exists(), f"the README names {'/'.join(folder)}"
        assert len(line.split()) > 1, f"{name} has no phrase"


def test_the_readme_has_at_most_700_words() -> None:
    assert len(README.split()) <= 700
