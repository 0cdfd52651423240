"""Imports go down one list; a room that reaches up is a design that has slipped."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "graftlm"
# From the ground up: each room may import those in front of it. `docs/design.md` says the same in words.
FLOORS = [
    "errors",
    "jsonfile",
    "yamlfile",
    "tensorfile",
    "progress",
    "files",
    "formatting",
    "terminal",
    "heap",
    "config",
    "scores",
    "demo",
    "gguf",
    "kernels",
    "segments",
    "distributed",
    "base",
    "adapters",
    "data",
    "planning",
    "training",
    "serving",
    "experiments",
    "dashboard",
    "commands",
    "api",
    "cli",
]
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem != "__init__")


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_below_it(file: Path) -> None:
    own = FLOORS.index(_room(file))
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "graftlm":
            names = [node.module] if node.module != "graftlm" else [f"graftlm.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("graftlm.")]
        for name in names:
            room = name.split(".")[1]
            if room.startswith("__"):
                continue
            assert FLOORS.index(room) <= own, f"{file.name} imports {name}, which lies above it"


def test_the_engine_knows_nothing_of_http() -> None:
    for file in (PACKAGE / "serving" / "engine").rglob("*.py"):
        assert "graftlm.serving.http" not in file.read_text(encoding="utf-8"), file


def test_training_and_serving_never_import_each_other() -> None:
    for room, other in (("training", "serving"), ("serving", "training")):
        for file in (PACKAGE / room).rglob("*.py"):
            assert f"graftlm.{other}" not in file.read_text(encoding="utf-8"), file
