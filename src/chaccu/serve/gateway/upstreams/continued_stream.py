"""`ContinuedStream`: the events of the upstream that goes on, made to fit behind those that the client has.

Invariants: the client sees one stream, with one id, one role a choice, one end; of the text it has, nothing comes again; the
usage counts each token once. An event that says nothing new is left out. It ignores where the events come from.
"""

from __future__ import annotations

from typing import Any

import msgspec

from chaccu.serve.gateway.dialects.responses import CONTINUED_TOKENS
from chaccu.serve.gateway.upstreams.event_lines import DONE_DATA, data_event, data_of
from chaccu.serve.gateway.upstreams.sent_stream import CannotContinueError, SentStream

_IDENTITY = ("id", "created", "model")


class ContinuedStream:
    """What follows `sent`.

    `repeated`: text that comes again first, and has to; `spaces`: spaces that may come again; `given_tokens`: tokens of the
    answer that the upstream counts as the prompt's, unless it says otherwise; `is_ended`: the answer is whole, its usage alone
    is to come.
    """

    def __init__(
        self, sent: SentStream, *, repeated: str = "", spaces: str = "", given_tokens: int = 0, is_ended: bool = False
    ) -> None:
        self._sent = sent
        self._repeated = repeated
        self._spaces = spaces
        self._given_tokens = given_tokens
        self._is_ended = is_ended
        self._leaves_out = False

    def take(self, lines: bytes) -> bytes:
        """What whole `lines` become. Raises `CannotContinueError` when they do not fit."""
        return b"".join(map(self._take_line, lines.splitlines(keepends=True)))

    def _take_line(self, line: bytes) -> bytes:
        data = data_of(line)
        if data is None:
            # The empty line behind an event goes with it.
            left_out, self._leaves_out = self._leaves_out, False
            return b"" if left_out and not line.strip() else line
        if data == DONE_DATA:
            self._check_repeated()
            return line
        try:
            event = self._rewrite(msgspec.json.decode(data))
        except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
            raise CannotContinueError("the one that went on with it sent no completion") from error
        self._leaves_out = event is None
        return b"" if event is None else data_event(event)[:-1]

    def _rewrite(self, event: dict[str, Any]) -> dict[str, Any] | None:
        if event.get("error") is not None:
            return event
        first = self._sent.first
        event.update({name: first[name] for name in _IDENTITY if name in first})
        choices = event["choices"]
        has_usage = isinstance(event.get("usage"), dict)
        if has_usage:
            event["usage"] = self._count(event["usage"])
        if not choices:
            return event
        if self._is_ended:
            return {**event, "choices": []} if has_usage else None
        event["choices"] = [choice for choice in choices if self._keep(choice)]
        return event if event["choices"] else None

    def _keep(self, choice: dict[str, Any]) -> bool:
        """Take out of `choice` what the client has; returns whether it says anything more."""
        is_chat = "delta" in choice
        said = choice["delta"] if is_chat else choice
        name = "content" if is_chat else "text"
        if is_chat and choice["index"] in self._sent.roles:
            said.pop("role", None)
        elif is_chat and said.get("role"):
            self._sent.roles.add(choice["index"])
        if said.get(name) and choice["index"] == 0:
            text = self._take_out(said[name])
            if text and text != said[name] and choice.get("logprobs"):
                raise CannotContinueError("the one that went on with it cut the text elsewhere")
            said[name] = text
        if choice.get("finish_reason") is not None:
            self._check_repeated()
            return True
        return any(said.values()) if is_chat else bool(said["text"])

    def _take_out(self, text: str) -> str:
        if self._repeated:
            known = _shared(self._repeated, text)
            if known < min(len(self._repeated), len(text)):
                self._check_repeated()
            self._repeated = self._repeated[known:]
            return text[known:]
        known = _shared(self._spaces, text)
        # Once something else has come, spaces are new ones.
        self._spaces = self._spaces[known:] if known == len(text) else ""
        return text[known:]

    def _check_repeated(self) -> None:
        if self._repeated:
            raise CannotContinueError("the one that began it again wrote another text")

    def _count(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The usage of the whole answer."""
        known = self._sent.usage
        if self._is_ended:
            prompt, completion = usage["prompt_tokens"], self._sent.given_tokens
        elif self._given_tokens:
            # Most servers count the text that they go on from with the prompt; one that tells how it counts is believed.
            told = (usage.get("prompt_tokens_details") or {}).get(CONTINUED_TOKENS, self._given_tokens)
            prompt = max(0, usage["prompt_tokens"] - told) if known is None else known["prompt_tokens"]
            completion = (usage.get("completion_tokens") or 0) + self._given_tokens
        else:
            return usage
        return {**usage, "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _shared(known: str, text: str) -> int:
    """How many characters both begin with."""
    return next(
        (at for at, (one, other) in enumerate(zip(known, text, strict=False)) if one != other), min(len(known), len(text))
    )
