"""The Python that README, docs/python.md and the notebook show is Python that runs."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import graftlm as graft
from graftlm.api import calls

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
ROWS = [{"prompt": f"{i} and ", "completion": "then"} for i in range(40)]


def _blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_of_the_readme_runs(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = _blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    exec(block, {})
    base, tuned = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
    assert isinstance(base, str)
    assert isinstance(tuned, str)


def test_the_block_of_the_page_runs_as_it_stands(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        verdict = best = None

    # Both take minutes on the whole of `demo`; what they give is tested in test_api.py.
    for name in ("compare", "sweep"):
        real = getattr(calls, name)
        monkeypatch.setattr(graft, name, lambda *a, real=real, **k: inspect.signature(real).bind(*a, **k) and Found())
    names: dict[str, Any] = {"rows": ROWS}
    exec(_blocks(PAGE)[0], names)
    assert names["run"].adapter is not None
    assert names["loss"] > 0
    assert [v.label for v in graft.Store(Path("adapters")).versions()] == ["formal@1"]


def test_the_page_has_every_name() -> None:
    for name in graft.__all__:
        if name != "__version__":
            assert re.search(rf"^## .*\b{name}\b", PAGE, flags=re.MULTILINE), name
    for name in (
        "generate",
        "new_adapter",
        "encode",
        "forward_backward",
        "optimizer_step",
        "save_adapter",
        "remove_adapter",
    ):
        assert f"model.{name}(" in PAGE


def test_the_notebook_runs(elsewhere: Path) -> None:
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [], "outputs are not kept in the repository"
        body = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(body[:-1], []), "<cell>", "exec"), names)
        last = body[-1]
        if isinstance(last, ast.Expr):
            shown = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
            assert not hasattr(shown, "_repr_html_") or shown._repr_html_().startswith("<")
        else:
            exec(compile(ast.Module([last], []), "<cell>", "exec"), names)
    assert names["tuned"] != names["base"]
    assert "lamp" in names["tuned"]
