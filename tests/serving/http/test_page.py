"""The page, in a real browser: two adapters, one prompt, both answers as they stream; on a desk and on a phone."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiny_server.Loopback]:
    place = tmp_path_factory.mktemp("page")
    keys = tiny_server.keys_file(place, {"name": "half", "key": "half-key-1234", "adapters": ["alpha", "says"]})
    with tiny_server.serving(store=str(tiny_server.new_store(place)), api_keys=str(keys)) as one:
        yield one


@pytest.mark.parametrize("size", [(1280, 900), (360, 740)], ids=["desk", "phone"])
def test_two_adapters_answer_one_prompt_side_by_side(
    browser: Any, server: tiny_server.Loopback, size: tuple[int, int]
) -> None:
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#key-row:not([hidden])")
    assert "wants an API key" in page.inner_text("#problem")
    page.fill("#key", "half-key-1234")
    page.press("#key", "Tab")
    page.wait_for_selector("#adapters tr:nth-child(3)")
    table = page.inner_text("#adapters")
    assert "says@2" in table
    assert "beta@1" not in table, "not this key's"
    assert "lora" in table
    page.select_option("#left", "says@prod")
    page.select_option("#right", "says@2")
    page.fill("#prompt", "3: ")
    page.click("#go")
    for side in ("left", "right"):
        playwright.expect(page.locator(f"#{side}-note")).to_contain_text("tokens in")
    assert (page.inner_text("#left-answer"), page.inner_text("#right-answer")) == ("ALPHA", "BETA")
    assert "says@prod = says@1" in page.inner_text("#left-name")
    assert "answers at once" in page.inner_text("#running-text")
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, "nothing sticks out to the side"
    left, right = (page.locator(f"#{side}-answer").bounding_box() for side in ("left", "right"))
    assert (left["y"] == right["y"]) == (size[0] > 640), "side by side where there is room, else below each other"
    assert problems == []
    page.close()


def test_what_goes_wrong_is_said_where_the_answer_would_stand(browser: Any, server: tiny_server.Loopback) -> None:
    page = browser.new_page()
    page.goto(server.url)
    page.fill("#key", "half-key-1234")
    page.press("#key", "Tab")
    page.wait_for_selector("#adapters tr:nth-child(3)")
    page.fill("#tokens", "100000")
    page.fill("#prompt", "3: ")
    page.click("#go")
    page.wait_for_selector("#left-answer.bad")
    assert "max_tokens is 100000" in page.inner_text("#left-answer")
    page.close()


def test_a_long_answer_can_be_stopped_and_frees_its_place(
    browser: Any, server: tiny_server.Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = server.engine.runner.execute_model

    def slowly(work: Any) -> Any:
        time.sleep(0.05)
        return run(work)

    monkeypatch.setattr(server.engine.runner, "execute_model", slowly)
    page = browser.new_page()
    page.goto(server.url)
    page.fill("#key", "half-key-1234")
    page.press("#key", "Tab")
    page.wait_for_selector("#adapters tr:nth-child(3)")
    page.select_option("#left", "base")
    page.select_option("#right", "base")
    page.fill("#tokens", "240")
    page.fill("#temperature", "1")
    page.fill("#prompt", "once upon")
    page.click("#go")
    playwright.expect(page.locator("#left-answer")).to_contain_text(re.compile(r"\S"))
    page.click("#stop")
    playwright.expect(page.locator("#left-note")).to_contain_text(re.compile("stopped|tokens in"))
    page.wait_for_timeout(500)
    assert server.engine.num_running == 0
    page.close()


def test_the_page_needs_nothing_from_elsewhere(server: tiny_server.Loopback) -> None:
    with server.client() as client:
        found = client.get("/")
    assert "default-src 'none'" in found.headers["content-security-policy"]
    assert "http://" not in found.text
    assert "https://" not in found.text
