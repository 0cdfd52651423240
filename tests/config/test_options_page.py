"""The generated page of options says what the config classes say."""

from __future__ import annotations

from pathlib import Path

from graftlm.config.options_page import COMMANDS, options_markdown

PAGE = Path(__file__).parents[2] / "docs" / "options.md"


def test_the_page_of_options_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == options_markdown(), (
        "run: python -m graftlm.config.options_page > docs/options.md"
    )


def test_the_page_names_every_option_of_every_command() -> None:
    sections = options_markdown().split("\n## ")[1:]
    for section, (_, config) in zip(sections, COMMANDS, strict=True):
        rows = [line for line in section.splitlines() if line.startswith("| `--")]
        assert [row.split("`")[1] for row in rows] == [
            f"--{name.rstrip('_').replace('_', '-')}" for name in config.model_fields
        ]
        assert all(row.count(" | ") == 3 for row in rows)
