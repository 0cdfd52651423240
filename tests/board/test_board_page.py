"""The board in a real browser: live curves, runs side by side, keyboard, phone, dark, the playground, and hostile strings."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import board_files as files
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from graftlm.adapters.store import Store
from graftlm.dashboard.contents import Contents
from graftlm.dashboard.folders import Folders
from graftlm.dashboard.page import page_in_one_file

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))

import stores

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect


class Stub:
    """An OpenAI-compatible server that answers word by word, and waits before its last one until it may go on."""

    def __init__(self, key: str | None = None) -> None:
        self.key, self.go_on, self.broken_off, self.asked = key, False, False, list[dict[str, Any]]()

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[Route("/v1/models", self.models), Route("/v1/chat/completions", self.chat, methods=["POST"])]
        )

    async def models(self, request: Request) -> Response:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "no key"}}, 401)
        return JSONResponse({"data": [{"id": "base"}, {"id": "formal@2"}]})

    async def chat(self, request: Request) -> Response:
        asked = await request.json()
        self.asked.append(asked)
        return StreamingResponse(self.words(asked["model"]), media_type="text/event-stream")

    async def words(self, model: str) -> AsyncIterator[str]:
        try:
            for word in ("I am ", model, files.HOSTILE, " indeed"):
                while word == " indeed" and not self.go_on:
                    await asyncio.sleep(0.01)
                yield f"data: {json.dumps({'choices': [{'delta': {'content': word}}]})}\n\n"
            last = {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"completion_tokens": 4}}
            yield f"data: {json.dumps(last)}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.broken_off = True
            raise


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every state, a sweep, a comparison and a store."""
    root = tmp_path_factory.mktemp("board")
    runs = root / "runs"
    files.samples(files.run(runs / "first", 60), (0, 60))
    files.run(runs / "second", 60, bottom=1.0, learning_rate=1e-3)
    hostile = files.run(runs / files.HOSTILE.replace("/", "∕"), 20, method=files.HOSTILE, score=files.HOSTILE)
    files.samples(hostile, (0,), files.HOSTILE)
    files.sweep(runs / "search", 4)
    files.comparison(runs / "methods")
    store = Store(root / "adapters")
    version, _ = store.publish(stores.run(root / "a", 1), "formal")
    store.publish(stores.run(root / "b", 2), "formal", parents=[version.digest], note=files.HOSTILE)
    store.alias("formal", "prod", 2)
    summary = json.loads((runs / "first" / "summary.json").read_text())
    (runs / "first" / "summary.json").write_text(json.dumps({**summary, "adapter_digest": version.digest}))
    return root


@pytest.fixture(scope="module")
def board(place: Path) -> Iterator[files.Board]:
    with files.served(Stub().app) as url, files.board(place / "runs", store=place / "adapters", server=url) as one:
        yield one


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, board: files.Board) -> Iterator[Open]:
    """Opens a page of the board; at its end it has had no error, no dialog, and asked nobody but the board."""
    contexts: list[Any] = []
    problems: list[str] = []

    def open_page(path: str = "#/runs", *, url: str | None = None, width: int = 1280, **options: Any) -> Any:
        home = url or board.url + "/"
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(f"error {error}"))
        page.on(
            "console",
            lambda message: (
                problems.append(message.text)
                if message.type in ("error", "warning") and "ERR_FAILED" not in message.text  # a test broke it off
                else None
            ),
        )
        page.on("dialog", lambda dialog: (problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda asked: None if asked.url.startswith((home, "data:")) else problems.append(asked.url))
        page.goto(home + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@contextmanager
def ids(board: files.Board) -> Iterator[dict[str, str]]:
    found = board.contents.overview()
    yield {one["name"]: one["id"] for kind in ("runs", "sweeps", "comparisons") for one in found[kind]}


def id_of(board: files.Board, name: str) -> str:
    with ids(board) as known:
        return known[name]


def plot(page: Any, title: str) -> Any:
    return page.locator("figure", has=page.get_by_role("heading", name=title, exact=True)).locator(".plot")


def painted(page: Any, title: str) -> int:
    """Pixels of a chart that are not empty."""
    return (
        plot(page, title)
        .locator("canvas")
        .evaluate(
            "canvas => { const d = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
            " let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }"
        )
    )


def test_a_curve_grows_while_its_run_does(opened: Open, browser: Any, tmp_path: Path) -> None:
    folder = files.run(tmp_path / "live", 5, total=60, done=False)
    (folder / ".running").write_text(str(os.getpid()))
    with (folder / ".running").open(), files.board(tmp_path) as board:
        page = opened(f"#/run/{id_of(board, 'live')}", url=board.url + "/")
        expect(page.get_by_text("5 of 60")).to_be_visible()
        options = page.locator("#part-Options")
        options.locator("summary").click()
        page.evaluate("getSelection().selectAllChildren(document.querySelector('#part-Options dd'))")
        marked = page.evaluate("getSelection().toString()")
        assert marked
        expect(page.get_by_text(f"process {os.getpid()} holds its lock")).to_be_visible()
        before = plot(page, "Loss").get_attribute("aria-label")
        with (folder / "metrics.jsonl").open("a") as stream:
            for step in range(6, 41):
                stream.write(files.step_line(step, steps=60))
            stream.write(files.eval_line(40, 1.2345))
            stream.write('{"step": 41, "kind": "tr')  # half a line, as a reader may see it
            stream.flush()
            expect(plot(page, "Loss")).to_have_attribute(
                "aria-label", re.compile("eval loss 1.2345 at step 40"), timeout=9000
            )
            stream.write('ain", "loss": 1.5, "tokens": 10, "seconds": 0.1, "num_tokens": 9}\n')
            stream.flush()
            expect(page.get_by_text("41 of 60")).to_be_visible(timeout=9000)
            assert options.evaluate("node => node.open"), "a list that is open stays open"
            assert page.evaluate("getSelection().toString()") == marked
            assert page.evaluate("document.activeElement.textContent") == "Options"
            stream.writelines(files.step_line(step, steps=60) for step in range(42, 800))
            stream.flush()
            expect(page.get_by_text("training loss, mean and range of 2 steps")).to_be_visible(timeout=9000)
            expect(page.get_by_text("gradient norm, highest of 2 steps")).to_be_visible()
        assert before != plot(page, "Loss").get_attribute("aria-label")
        assert painted(page, "Loss") > 1000
        expect(page.get_by_text("cannot be read")).to_have_count(0)
        (folder / "adapter").mkdir()
        (folder / ".running").unlink()
        expect(page.get_by_text("its result is saved")).to_be_visible(timeout=9000)


def test_two_runs_lie_over_each_other_and_their_differences_beside(opened: Open) -> None:
    page = opened()
    for name in ("first", "second"):
        page.get_by_label(f"Choose {name}").check()
    page.get_by_role("link", name="Side by side").click()
    expect(page.get_by_role("heading", name=re.compile(r"Options that differ \(1 of"))).to_be_visible()
    row = page.get_by_role("row", name=re.compile("^learning-rate"))
    expect(row).to_contain_text("2e-4")
    expect(row).to_contain_text("0.001")
    expect(plot(page, "Loss")).to_have_attribute("aria-label", re.compile("first: .*second: "))
    assert painted(page, "Loss") > 1000
    page.get_by_label("Over").select_option("tokens")
    expect(page.locator("figure .legend li").first).to_be_visible()
    page.get_by_role("button", name="All options").click()
    expect(page.get_by_role("row", name=re.compile("^batch-size"))).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_light_or_dark_as_the_system_is_and_as_it_is_told(
    opened: Open, board: files.Board, scheme: str
) -> None:
    page = opened(f"#/run/{id_of(board, 'first')}", color_scheme=scheme)
    brightness = "parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    expect(plot(page, "Loss").locator("canvas")).to_be_visible()
    assert (page.evaluate(brightness) < 60) == (scheme == "dark")
    page.get_by_role("button", name="Theme: system").click()
    assert page.evaluate(brightness) > 200
    page.get_by_role("button", name="Theme: light").click()
    assert page.evaluate(brightness) < 60
    assert painted(page, "Loss") > 1000
    page.reload()
    assert page.evaluate(brightness) < 60, "it is kept"


def test_nothing_sticks_out_of_a_phone(opened: Open, board: files.Board) -> None:
    with ids(board) as known:
        paths = [
            "runs",
            f"run/{known['first']}",
            f"side/{known['first']},{known['second']}",
            "sweeps",
            f"sweep/{known['search']}",
            "comparisons",
            f"comparison/{known['methods']}",
            "adapters",
            "playground",
        ]
    page = opened("#/runs", width=360, has_touch=True)
    for path in paths:
        page.goto(f"{board.url}/#/{path}")
        expect(page.locator("main h1")).to_be_visible()
        wide = "[document.documentElement, document.querySelector('nav')].map(e => e.scrollWidth - e.clientWidth)"
        assert max(page.evaluate(wide)) <= 0, path
        buttons = "[...document.querySelectorAll('main button, main .button, main select')]"
        small = f"{buttons}.filter(e => e.offsetHeight && e.offsetHeight < 24)"
        assert page.evaluate(f"{small}.length") == 0, f"{path}: too small for a finger"


def test_everything_is_reached_with_the_keyboard_alone(opened: Open) -> None:
    page = opened()
    expect(page.get_by_role("link", name="second", exact=True)).to_be_visible()
    focused = "document.activeElement.textContent || document.activeElement.id"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Skip to the contents"
    page.keyboard.press("/")
    page.keyboard.type("second")
    expect(page.locator("table.runs tbody tr")).to_have_count(1)
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    assert page.evaluate(focused) == "second"
    page.keyboard.press("x")
    expect(page.get_by_label("Choose second")).to_be_checked()
    expect(page.get_by_text("1 run chosen")).to_be_visible()
    page.get_by_role("link", name="second", exact=True).press("Enter")
    expect(page.get_by_role("heading", name="second", level=1)).to_be_visible()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.keyboard.press("3")
    expect(page.get_by_role("heading", name="Comparisons", level=1)).to_be_visible()
    expect(page.get_by_role("link", name="Comparisons")).to_have_attribute("aria-current", "page")
    controls = "[...document.querySelectorAll('a, button, input, select, textarea')]"
    unnamed = f"{controls}.filter(e => !(e.textContent || e.ariaLabel || e.labels?.length))"
    assert page.evaluate(f"{unnamed}.length") == 0


def test_runs_that_go_on_keep_their_places_and_a_dead_board_is_said(opened: Open, tmp_path: Path) -> None:
    for name, hour in (("early", 8), ("late", 9)):
        folder = files.run(tmp_path / name, 5, total=60, done=False)
        (folder / "environment.json").write_text(json.dumps({"started": f"2026-11-30T{hour:02}:00:00+00:00"}))
        (folder / ".running").write_text("999999")
    with files.board(tmp_path) as board:
        page = opened(url=board.url + "/")
        names = page.locator("table.runs tbody th a")
        expect(names).to_have_text(["late", "early"])
        with (tmp_path / "early" / "metrics.jsonl").open("a") as stream:
            stream.write(files.step_line(6))
        expect(page.get_by_text("6 of 60")).to_be_visible(timeout=9000)
        expect(names).to_have_text(["late", "early"])
        ids = [run["id"] for run in board.contents.overview()["runs"]]
        page.goto(f"{board.url}/#/side/{','.join(ids)}")
        expect(page.get_by_role("row", name=re.compile("^late"))).to_contain_text("MB planned")
        page.route("**/api/**", lambda route: route.abort())
        expect(page.locator("#live")).to_have_text("the board does not answer", timeout=9000)


def test_a_history_that_is_open_stays_open_while_its_adapter_changes(opened: Open, tmp_path: Path) -> None:
    store = Store(tmp_path / "adapters")
    store.publish(stores.run(tmp_path / "a", 1), "formal")
    store.alias("formal", "prod", 1)
    (tmp_path / "runs").mkdir()
    with files.board(tmp_path / "runs", store=store.root) as board:
        page = opened("#/adapters", url=board.url + "/")
        page.get_by_text("History of aliases").click()
        expect(page.get_by_text(re.compile("prod → 1"))).to_be_visible()
        store.alias("formal", "test", 1)
        expect(page.get_by_text(re.compile("test → 1"))).to_be_visible(timeout=9000)


def test_rows_keep_the_focus_while_the_folders_are_read_again(opened: Open, place: Path) -> None:
    page = opened()
    page.get_by_role("link", name="first", exact=True).focus()
    files.run(place / "runs" / "third", 3)
    expect(page.get_by_role("link", name="third", exact=True)).to_be_visible(timeout=9000)
    assert page.evaluate("document.activeElement.textContent") == "first"


def test_the_playground_shows_two_answers_as_they_are_written(browser: Any, place: Path) -> None:
    stub = Stub("right")
    with files.served(stub.app) as url, files.board(place / "runs", server=url) as board:
        context = browser.new_context()
        page = context.new_page()  # its first question is answered with 401, which the console tells
        page.goto(board.url + "/#/playground")
        _ask_twice(page, stub)
        context.close()


def _ask_twice(page: Any, stub: Stub) -> None:
    expect(page.get_by_text("The server wants an API key.")).to_be_visible()
    page.get_by_label("API key").fill("right")
    page.get_by_label("API key").press("Tab")
    expect(page.get_by_label("Right")).to_have_value("formal@2")
    page.get_by_label("Prompt").fill("Who are you?")
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.locator("#left-answer")).to_have_text(f"I am base{files.HOSTILE}")
    expect(page.locator("#right-answer")).to_have_text(f"I am formal@2{files.HOSTILE}")
    stub.go_on = True
    expect(page.locator("#left-answer")).to_contain_text("indeed")
    expect(page.locator("#left-note")).to_contain_text("4 tokens in")
    assert sorted(asked["model"] for asked in stub.asked) == ["base", "formal@2"]
    assert all(asked["stream"] and asked["messages"][0]["content"] == "Who are you?" for asked in stub.asked)
    stub.go_on = stub.broken_off = False
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator("#left-answer")).to_contain_text("I am base")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#left-note")).to_have_text("stopped")
    for _ in range(100):
        if stub.broken_off:
            break
        page.wait_for_timeout(50)
    assert stub.broken_off, "the server is told that nobody reads any more"


def test_strings_of_files_are_text_and_never_markup(opened: Open, board: files.Board) -> None:
    name = files.HOSTILE.replace("/", "∕")
    page = opened()
    page.get_by_role("link", name=name, exact=True).click()
    expect(page.get_by_role("heading", name=name)).to_be_visible()
    expect(page.locator(".sample .answer").first).to_contain_text(files.HOSTILE)
    page.get_by_text("Options", exact=True).click()
    page.goto(f"{board.url}/#/side/{id_of(board, name)},{id_of(board, 'first')}")
    expect(page.get_by_role("row", name=re.compile("^method"))).to_contain_text(files.HOSTILE)
    page.goto(f"{board.url}/#/adapters")
    expect(page.get_by_text(files.HOSTILE)).to_be_visible()
    assert page.evaluate("document.querySelectorAll('main script, main img').length") == 0


@pytest.mark.parametrize("how", ["other values", "huge values"])
def test_damaged_files_leave_every_view_standing(opened: Open, place: Path, tmp_path: Path, how: str) -> None:
    draw = random.Random(f"page, {how}")
    for attempt in range(2):
        copy = tmp_path / str(attempt)
        shutil.copytree(place, copy)
        files.damage(copy, how, draw)
        with files.board(copy / "runs", store=copy / "adapters") as board:
            page = opened("#/runs", url=board.url + "/")
            found = board.contents.overview()
            paths = [f"run/{run['id']}" for run in found["runs"] if not run["parent"]]
            paths += [f"side/{','.join(run['id'] for run in found['runs'])}", "adapters", "sweeps", "comparisons"]
            for kind in ("sweep", "comparison"):
                paths += [f"{kind}/{one['id']}" for one in found[f"{kind}s"]]
            for path in paths:
                page.goto(f"{board.url}/#/{path}")
                expect(page.locator("main h1")).to_be_visible()
                expect(page.locator("#live")).to_have_text("live")
            page.close()


def test_a_sweep_a_comparison_and_the_store_are_shown(opened: Open, board: files.Board) -> None:
    page = opened(f"#/sweep/{id_of(board, 'search')}")
    expect(page.locator("main .title .state").first).to_have_text("stopped")
    expect(page.get_by_text(re.compile(r"Best so far: trial \d, eval loss 1\.3"))).to_be_visible()
    for title in ("Loss by trial", "Loss by learning-rate", "Loss by rank", "Eval loss of each trial"):
        expect(plot(page, title).locator("canvas")).to_be_visible()
        assert painted(page, title) > 300, title
    page.goto(f"{board.url}/#/comparison/{id_of(board, 'methods')}")
    expect(page.get_by_text("Take lora.")).to_be_visible()
    expect(plot(page, "Share of the gain")).to_have_attribute("aria-label", re.compile(r"lora 98\.8 \(95 to 99\.8\)"))
    expect(page.get_by_role("row", name=re.compile("^qlora"))).to_contain_text("97.6 % (93.0 to 98.6)")
    page.goto(f"{board.url}/#/adapters")
    newest = page.locator("[id='adapter-formal@2']")
    expect(newest).to_contain_text("prod")
    expect(newest.get_by_role("button", name="formal@1")).to_be_visible()
    page.locator("[id='adapter-formal@1']").get_by_role("link", name="open the run").click()
    expect(page.get_by_role("heading", name="first", level=1)).to_be_visible()


def test_the_page_as_one_file_shows_the_same_without_a_server(opened: Open, place: Path, tmp_path: Path) -> None:
    contents = Contents(Folders([place / "runs"]), place / "adapters")
    file = tmp_path / "page.html"
    file.write_text(page_in_one_file(contents), encoding="utf-8")
    page = opened("#/runs", url=file.as_uri())
    page.get_by_role("link", name="first", exact=True).click()
    expect(plot(page, "Loss")).to_have_attribute("aria-label", re.compile("eval loss .* at step 56"))
    assert painted(page, "Loss") > 1000
    expect(page.get_by_text("as of when it was written")).to_be_visible()
    page.get_by_role("link", name="Adapters").click()
    expect(page.get_by_text("formal@2").first).to_be_visible()
