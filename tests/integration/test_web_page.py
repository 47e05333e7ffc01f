"""The chat page in a real browser, before a real gateway with real workers."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from chat_page import choose, said, send, until

from chaccu.testing.processes import start_command, start_gateway, start_with_url, start_worker

pytest.importorskip("gradio")
_PICTURE = "![](http://tracker.example/pixel.png)"
_TUNED = f"scripted:tuned?tokens_per_s=15&text={'The%20vicuna%20grazes. ' * 12}"
_BASE = f"scripted:base?text=**Base** speaks. {_PICTURE}"


class Stage(dict[str, Any]):
    """What the tests share: gateway, workers by name, the page's service, the folder for more of them."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("web")
    with (
        start_gateway(folder, "--rejoin-wait", "0.3") as gateway,
        start_worker(folder, gateway, _BASE) as base,
        start_with_url(folder, ["web", "--gateway", gateway.url, "--port", "0"], url_option="--url-file") as page,
        start_worker(folder, gateway, _TUNED) as tuned,
    ):
        yield (made := Stage(folder=folder, gateway=gateway, base=base, tuned=tuned, page=page))
        made["tuned"].stop()


@pytest.fixture
def page(browser: Any, stage: Stage) -> Iterator[Any]:
    """The page, open; at the end nothing may have been fetched from elsewhere, and no script may have failed."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    opened = context.new_page()
    foreign: list[str] = []
    failures: list[str] = []

    def serve_foreign(route: Any) -> None:
        foreign.append(route.request.url)
        route.fulfill(status=200, body="")

    # What the browser asks of any other address is answered here, so that it counts even on a machine without a network.
    context.route(lambda url: not url.startswith((stage["page"].url, "data:", "blob:")), serve_foreign)
    opened.on("pageerror", lambda error: failures.append(str(error)))
    opened.goto(stage["page"].url)
    choose(opened, "tuned")
    yield opened
    context.close()
    assert foreign == []
    assert failures == []


def test_both_models_answer_and_an_answer_is_seen_to_grow(page: Any) -> None:
    assert page.title() == "Chaccu"
    send(page, "What does it do?")
    early = until(page, lambda text: "grazes" in text)
    later = until(page, lambda text: text.count("grazes") >= early.count("grazes") + 2)
    assert "tuned is writing" in later
    until(page, lambda text: text.count("grazes") == 12 and re.search(r"tuned · \d+ tokens", text) is not None)
    choose(page, "base")
    send(page, "And you?")
    until(page, lambda text: "Base speaks." in text and re.search(r"base · \d+ tokens", text) is not None)
    assert page.locator("#chaccu-chat strong").inner_text() == "Base"


def test_stop_keeps_what_has_come_and_frees_the_worker(page: Any, stage: Stage) -> None:
    send(page, "Go on.")
    until(page, lambda text: "grazes" in text)
    page.locator("#chaccu-text button.stop-button").click()
    text = until(page, lambda text: "tuned · stopped" in text)
    page.wait_for_timeout(500)
    assert said(page).count("grazes") == text.count("grazes") < 12
    page.locator("#chaccu-chat").get_by_label("Retry").click()
    until(page, lambda text: text.count("grazes") == 12 and "tokens" in text)
    assert said(page).count("Go on.") == 1
    page.get_by_role("button", name="New chat").click()
    until(page, lambda text: "grazes" not in text)


def test_a_lost_worker_is_named_the_other_goes_on_and_it_may_come_back(page: Any, stage: Stage) -> None:
    send(page, "Tell me all.")
    until(page, lambda text: "grazes" in text)
    stage["tuned"].kill()
    text = until(page, lambda text: "worker lost" in text)
    assert "tuned · worker lost" in text
    assert "The worker of 'tuned' was lost while it answered" in text
    assert "grazes" in text
    choose(page, "base")
    send(page, "Still there?")
    until(page, lambda text: "Base speaks." in text)
    stage["tuned"] = start_worker(stage["folder"], stage["gateway"], _TUNED)
    choose(page, "tuned")
    send(page, "Back again?")
    until(page, lambda text: text.count("grazes") >= 12 and re.search(r"tuned · \d+ tokens", text) is not None)


def test_the_settings_stand_beside_the_page(page: Any) -> None:
    for width in (1500, 1100, 800):
        page.set_viewport_size({"width": width, "height": 700})
        page.locator(".sidebar .toggle-button").click()
        page.get_by_label("System prompt").fill("Be brief.")
        # Each takes clicks where it is: nothing lies over it.
        choose(page, "base")
        page.get_by_role("button", name="New chat").click()
        page.locator(".sidebar .toggle-button").click()


def test_it_fits_a_phone_in_the_dark(browser: Any, stage: Stage) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 700}, color_scheme="dark", has_touch=True)
    opened = context.new_page()
    opened.goto(stage["page"].url)
    choose(opened, "base")
    send(opened, "x" * 200)
    until(opened, lambda text: "Base speaks." in text)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    box = opened.locator("#chaccu-text").bounding_box()
    assert box["y"] + box["height"] <= 700
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    context.close()


def test_a_busy_port_is_one_error_and_sigterm_a_normal_end(stage: Stage) -> None:
    port = stage["page"].url.rstrip("/").rpartition(":")[2]
    second = start_command(stage["folder"], ["web", "--gateway", stage["gateway"].url, "--port", port])
    assert second.wait(60) == 1
    assert (
        second.log
        == f"chaccu: port {port} on 127.0.0.1 is in use.\n  try: --port with another number (0 lets the system pick)\n"
    )
    third = start_with_url(
        stage["folder"],
        ["web", "--gateway", stage["gateway"].url, "--port", "0", "--path-prefix", "/chat"],
        url_option="--url-file",
    )
    assert third.url.endswith("/chat/")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(third.url, timeout=10) as response:
        assert b"Chaccu" in response.read()
    assert third.stop() == 0
    assert third.log == f"chat page ready at {third.url}\n"
