"""The chat page as a person uses it, through Playwright."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any


def choose(page: Any, model: str) -> None:
    """Pick a model in the settings."""
    page.locator("#chaccu-model input").click()
    page.get_by_role("option", name=re.compile(rf"^(✓\s*)?{model}")).click()


def send(page: Any, text: str) -> None:
    """Type a message and send it."""
    page.locator("#chaccu-text textarea").fill(text)
    page.keyboard.press("Enter")


def said(page: Any) -> str:
    """The text of the conversation as it stands."""
    text: str = page.locator("#chaccu-chat").inner_text()
    return text


def until(page: Any, condition: Callable[[str], bool], timeout_s: float = 15.0) -> str:
    """The text of the conversation once `condition` holds for it."""
    deadline_s = time.monotonic() + timeout_s
    while not condition(text := said(page)):
        assert time.monotonic() < deadline_s, f"after {timeout_s:g} s the page says:\n{text}"
        page.wait_for_timeout(50)
    return text
