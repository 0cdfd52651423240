"""JSON and YAML are read within limits, in one place each; a limit is named with the file and the place."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from graftlm import jsonfile, yamlfile
from graftlm.config import PlanConfig, TrainConfig
from graftlm.errors import ConfigError, RunError
from graftlm.jsonfile import RowParser, duplicate_key, parse_json, read_json
from graftlm.yamlfile import read_yaml

PACKAGE = Path(__file__).parents[1] / "graftlm"


@pytest.mark.parametrize("value", [{"a": [1, -2.5, None, True, "é\u2028"]}, [], "x", 10**299, {"": {"": {}}}])
def test_what_is_within_the_limits_is_what_pythons_own_parser_gives(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize("depth", [101, 500, 2_000, 1_000_000])
def test_nesting_over_the_limit_is_a_value_error_with_its_place(depth: int) -> None:
    with pytest.raises(json.JSONDecodeError, match=r"nested too deep, at most 100 levels are read: line 2 column 105 "):
        parse_json(_nested(depth))


def _nested(depth: int) -> str:
    """A text whose 101st level begins at column 105 of line 2; brackets within strings are no level."""
    return '["[[[{",\n     ' + "[" * depth + "]" * depth + "]"


def test_a_hundred_levels_are_read() -> None:
    assert parse_json("[" * 100 + "]" * 100)
    assert RowParser("[" * 100 + "]" * 100).at(0)[1] == 200
    for text in ("[" * 101 + "]" * 101, '{"a":' * 101 + "1" + "}" * 101):
        with pytest.raises(json.JSONDecodeError, match="nested too deep"):
            parse_json(text)
        with pytest.raises(json.JSONDecodeError, match="nested too deep"):
            RowParser(text).at(0)


@pytest.mark.parametrize("digits", [301, 5_000, 50_000])
def test_a_number_of_more_digits_than_a_float_holds_is_a_value_error_with_its_place(digits: int) -> None:
    with pytest.raises(
        json.JSONDecodeError, match=rf"a number of {digits:,} digits, at most 300 are read: line 1 column 8"
    ):
        parse_json('{"a": -' + "7" * digits + "}")


def test_a_key_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' is there twice"):
        parse_json('{"a": 1, "b": 2, "a": 3}')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[" * 100_000, "nested too deep, at most 100 levels"),
        (b'{"a": ' + b"9" * 50_000 + b"}", "a number of 50,000 digits, at most 300 are read: line 1 column 7"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        (b"[]", "holds a list, expected an object"),
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
    ],
)
def test_a_file_of_json_that_is_none_is_named(tmp_path: Path, text: bytes, said: str) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(text)
    with pytest.raises(RunError) as caught:
        read_json(file, RunError)
    assert str(file) in str(caught.value)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


def test_nothing_but_its_one_home_parses_json_or_yaml() -> None:
    """The makers of the bundled files (demo/) read what they have written themselves."""
    homes = {"jsonfile.py": "json", "yamlfile.py": "yaml"}
    for file in sorted(PACKAGE.rglob("*.py")):
        if "demo" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
                continue
            reads = node.attr in ("load", "loads", "safe_load", "JSONDecoder", "SafeLoader")
            if node.value.id in ("json", "yaml") and reads:
                assert homes.get(file.name) == node.value.id, f"{file}:{node.lineno}"


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "its aliases stand for more than 100,000 values"),
        (MERGES, "its aliases stand for more than 100,000 values"),
        ("data: &a [*a]", "does an alias hold itself?"),
        ("data: " + "[" * 60 + "]" * 60, "line 1 is nested too deep, at most 50 levels"),
        ("[" * 100_000, "nested too deep, at most 50 levels"),
        ("{a: " * 3_000, "nested too deep, at most 50 levels"),
        ("rank: " + "1" * 50_000, "line 1 has a number of 50,000 digits, at most 300 are read"),
        ("rank: 4\nseed: 1\nrank: 8", "line 3: 'rank' is there twice"),
        ("seed: 2026-02-31", "day is out of range"),
        ("rank: [", "is not YAML"),
        ("rank: \x00", "is not YAML"),
        ("!!python/object/apply:os.system [ls]", "is not YAML"),
    ],
)
def test_a_run_file_of_yaml_over_a_limit_is_a_config_error(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        TrainConfig.read(file, {})
    assert said in str(caught.value)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_aliases_and_merges_within_the_limits_mean_what_they_mean(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rank: &r 4\nseed: *r\n")
    assert read_yaml(file, ConfigError) == {"rank": 4, "seed": 4}
    file.write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\n")
    assert read_yaml(file, ConfigError)["b"] == {"x": 1, "y": 2}
    file.write_text("")
    assert read_yaml(file, ConfigError) is None


@pytest.mark.parametrize(
    "text",
    [
        "keys: [{name: a, key: hunter2hunter2",
        "hunter2: 1\nhunter2: 2",
        "key: 'hunter2",
        "key: !hunter2 x",
        "key: *hunter2",
    ],
)
def test_an_error_about_a_file_of_secrets_quotes_nothing_of_it(text: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(file, ConfigError, secret=True)
    assert str(file) in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_run_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yamlfile, "MOST_YAML_BYTES", 10)
    file = tmp_path / "run.yaml"
    file.write_text("rank: 4444")
    assert read_yaml(file, ConfigError) == {"rank": 4444}
    file.write_text("rank: 44444")
    with pytest.raises(ConfigError, match="has 11 bytes, and at most 10 are read"):
        read_yaml(file, ConfigError)


def test_a_wrong_value_is_shown_shortened() -> None:
    with pytest.raises(ConfigError) as caught:
        PlanConfig.build({"models": ["demo"], "batch_size": "x" * 1_000_000})
    assert "(1,000,002 characters)" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_limit_of_digits_is_what_a_float_holds() -> None:
    assert float(int("9" * jsonfile.MOST_DIGITS)) < float("inf")


def test_the_first_duplicate_key_of_a_text_is_found_at_any_depth() -> None:
    assert duplicate_key(b'[{"a": 1}, {"a": {"b": 1, "c": 2, "b": 1}, "a": 3}]') == "b"
    assert duplicate_key(b'{"a": {"a": {"a": ["a", "a"]}}}') is None
