"""How the package is cut: a class name stands once, no file is a drawer for the rest, none and no function is too long."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "graftlm"
FILES = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc"}

# What is longer today, with its reason; nothing may join.
LONG_FILES = {"serving/engine/engine.py"}  # scheduling and decoding of one request, step by step
LONG_FUNCTIONS = {
    ("adapters/gguf.py", "write_gguf"),  # one header field after another
    ("config/train.py", "_consistent"),  # one rule of options after another
}


def test_a_class_name_stands_once_in_the_package() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for file, text in FILES.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(file)
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_no_module_is_a_drawer_for_what_has_no_home() -> None:
    assert [file for file in FILES if DRAWERS & {part.strip("_") for part in Path(file).with_suffix("").parts}] == []


def test_no_file_outside_the_kernels_is_longer_than_450_lines() -> None:
    long = {
        file for file, text in FILES.items() if text.count("\n") > MAX_FILE_LINES and not file.startswith("kernels/")
    }
    assert long <= LONG_FILES


def test_no_function_outside_the_kernels_is_longer_than_60_lines() -> None:
    long = {
        (file, node.name)
        for file, text in FILES.items()
        if not file.startswith("kernels/")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long <= LONG_FUNCTIONS
