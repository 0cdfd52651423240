"""The page: its files as a server sends them, and all of it, contents too, in one file.

The files in `page/` are plain scripts without a build step, in the order of `SCRIPTS`. uPlot (MIT, 50 kB, no dependencies)
draws every curve: it redraws 10,000 points within a frame, on a canvas. It is shipped here, so the page asks nothing of any
other machine.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from functools import cache
from importlib.resources import files
from typing import Any

from graftlm.dashboard.contents import Contents

STYLES = ("uplot/uPlot.min.css", "board.css")
SCRIPTS = (
    "uplot/uPlot.iife.min.js", "text.js", "data.js", "charts.js", "runs.js", "run.js", "experiments.js", "adapters.js",
    "playground.js", "board.js",
)  # fmt: skip
POLICY = {
    "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "connect-src": "'self'", "img-src": "data:",
    "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
}  # fmt: skip
"""The page may load what its own server sends, and nothing else."""
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""A report is a file of a folder: it is shown, and no script of it runs."""


@cache
def asset(name: str) -> str:
    """A file of the page."""
    return files("graftlm.dashboard").joinpath("page", *name.split("/")).read_text(encoding="utf-8")


def served_page() -> str:
    """The page of a server: its styles and scripts are files of the server's."""
    styles = "".join(f'<link rel="stylesheet" href="assets/{name}">\n' for name in STYLES)
    scripts = "".join(f'<script src="assets/{name}"></script>\n' for name in SCRIPTS)
    return asset("index.html").replace("<!-- styles -->", styles).replace("<!-- scripts -->", scripts)


def policy(rules: dict[str, str] = POLICY) -> str:
    """The Content-Security-Policy as a header has it."""
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def page_in_one_file(contents: Contents) -> str:
    """The page with what the folders hold now, for a file that needs no server."""
    overview = contents.overview()
    ids = [run["id"] for run in overview["runs"]]
    values = {
        "overview": {**overview, "server": False},
        **{f"runs/{id}": contents.run(id) for id in ids},
        **{f"runs/{id}/curve": contents.curve(id) for id in ids},
        **{f"sweeps/{sweep['id']}": contents.sweep(sweep["id"]) for sweep in overview["sweeps"]},
        **{f"comparisons/{one['id']}": contents.comparison(one["id"]) for one in overview["comparisons"]},
        "adapters": contents.adapters(),
    }
    style, script = "\n".join(map(asset, STYLES)), "\n".join(map(asset, SCRIPTS))
    rules = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data:",
        "base-uri": "'none'",
    }
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy(rules)}">\n'
    data = encode(values).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    block = f'<script type="application/json" id="contents">{data}</script>\n'
    page = asset("index.html").replace("<!-- styles -->", f"{meta}<style>{style}</style>\n")
    return page.replace("<!-- scripts -->", f"{block}<script>{script}</script>\n")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def encode(value: Any) -> str:
    """JSON as a browser reads it, in ASCII: what is not finite is null."""
    return json.dumps(_plain(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | bool) else str(value)
