"""The generated page of options says what the config classes say."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from graftlm.cli import app
from graftlm.config import Config
from graftlm.config.fields import flag_name, is_argument
from graftlm.config.options_page import COMMANDS, options_markdown, usage

PAGE = Path(__file__).parents[2] / "docs" / "options.md"


def test_the_page_of_options_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == options_markdown(), (
        "run: python -m graftlm.config.options_page > docs/options.md"
    )


def test_the_page_names_every_option_of_every_command() -> None:
    sections = options_markdown().split("\n## ")[1:]
    for section, (_, config) in zip(sections, COMMANDS, strict=True):
        rows = [line for line in section.split("\n# ")[0].splitlines() if line.startswith("| `")]
        arguments = [name for name, field in config.model_fields.items() if is_argument(field)]
        options = [name for name in config.model_fields if name not in arguments]
        assert [row.split("`")[1] for row in rows] == [
            *(name.upper() for name in arguments), *(f"--{flag_name(name)}" for name in options),
        ]  # fmt: skip
        assert all(row.count(" | ") == 3 for row in rows)


@pytest.mark.parametrize(("command", "config"), COMMANDS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_usage_line_is_that_of_the_command(command: str, config: type[Config]) -> None:
    shown = CliRunner().invoke(app, [*command.split()[1:], "--help"], env={"COLUMNS": "200"}).stdout
    line = next(line for line in shown.splitlines() if "Usage:" in line)
    line = line.replace("{", "").replace("}", "")  # typer's braces around what is required
    assert line.split("[OPTIONS]")[1].split() == usage(command, config).split("[OPTIONS]")[1].split()


def test_the_page_shows_an_argument_in_a_table_of_its_own_and_not_as_a_flag() -> None:
    page = options_markdown()
    assert "`graft adapters diff [OPTIONS] FIRST SECOND`\n\n### Arguments\n" in page
    assert "--first" not in page
