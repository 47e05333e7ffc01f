"""`SentStream`: what a client has got of a stream of completion events, read once its upstream is lost.

Invariant: `is_text` only where the text of one answer is all that it got. It ignores what was asked.
"""

from __future__ import annotations

from typing import Any

import msgspec

from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.upstreams.event_lines import DONE_DATA, data_event, data_of

# What an event may say without being part of the answer.
_OF_TEXT = frozenset({"role", "content"})


class CannotContinueError(ApiError):
    """A stream that was broken off cannot go on; the message says why, as the end of a sentence."""

    def __init__(self, why: str) -> None:
        super().__init__(502, why, kind="service_unavailable", code="upstream_lost", param="model")


class SentStream:
    """The whole lines `sent` of a chat completion's stream, or of a raw completion's when `chat` is false.

    `is_blank`: nothing of the answer itself has come. `given_tokens`: its tokens so far, by the usage where events tell it,
    else one for each event with text; the spaces at the end are not among them. `roles`: choices that were given their role.

    Raises `CannotContinueError` when they are no such events.
    """

    def __init__(self, sent: bytes, *, chat: bool) -> None:
        self.first: dict[str, Any] = {}
        self.is_done = False
        self.is_text = True
        self.is_single = True
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        self.has_last_usage = False
        self.roles: set[int] = set()
        self.is_blank = True
        self._chat = chat
        self._texts: list[str] = []
        try:
            for line in sent.splitlines():
                data = data_of(line)
                if data == DONE_DATA:
                    self.is_done = True
                elif data is not None:
                    self._add(msgspec.json.decode(data))
            self.text = "".join(self._texts)
            self.given_tokens = self._count_tokens()
        except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
            raise CannotContinueError("what it held is no completion") from error

    def end_event(self, finish_reason: str) -> bytes:
        """The event that says why the answer ends."""
        said: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return data_event({**self.first, "choices": [choice]})

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        """The event that tells the usage."""
        return data_event({**self.first, "choices": [], "usage": usage})

    def _count_tokens(self) -> int:
        events = len(self._texts)
        spaces = next((index for index, text in enumerate(reversed(self._texts)) if text.strip()), events)
        counted: int = events if self.usage is None else self.usage["completion_tokens"]
        return max(0, counted - spaces)

    def _add(self, event: dict[str, Any]) -> None:
        if not self.first:
            self.first = {name: value for name, value in event.items() if name not in ("choices", "usage")}
        if event.get("error") is not None:
            raise CannotContinueError("it held an error of the upstream itself")
        choices = event["choices"]
        if isinstance(event.get("usage"), dict):
            self.usage = event["usage"]
            self.has_last_usage = not choices
        for choice in choices:
            self._add_choice(choice)

    def _add_choice(self, choice: dict[str, Any]) -> None:
        index = choice["index"]
        said = choice["delta"] if self._chat else {"content": choice["text"]}
        text = said.get("content") or ""
        more = any(value for name, value in said.items() if name not in _OF_TEXT)
        if said.get("role"):
            self.roles.add(index)
        if index != 0:
            self.is_single = False
        if more or (text and index != 0):
            self.is_text = False
        if more or text:
            self.is_blank = False
        if text:
            self._texts.append(text)
        if choice.get("finish_reason") is not None:
            self.is_blank = False
            self.finish_reason = choice["finish_reason"]
