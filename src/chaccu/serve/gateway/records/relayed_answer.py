"""What the log says of an upstream's answer: its bytes, kept as they pass, and read afterwards.

Invariants: bytes are only kept while they pass; an answer with a part that cannot be read, or without its end, is never logged
as a whole one. It ignores reasoning, and everything else beside the text and the calls of tools.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import msgspec

from chaccu.serve.gateway.records.logged_answer import CANCELLED, FAILED, LogLine, UnreadableAnswerError
from chaccu.serve.gateway.upstreams.event_lines import DONE_DATA, data_of
from chaccu.serve.gateway.workers.chat_history import read_history

_UNREADABLE = "unreadable"
_MAX_KEPT_BYTES = 32 * 2**20
_OK = 200


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Said(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Said | None = None
    message: _Said | None = None
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    """A chat completion, or one event of its stream."""

    id: str | None = None
    choices: list[_Choice] = []
    error: Any = None


class _Joined:
    """One choice out of all events."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self._texts: list[str] = []
        self._calls: dict[int, _Call] = {}

    def add(self, choice: _Choice) -> None:
        self.finish_reason = choice.finish_reason or self.finish_reason
        said = choice.delta or choice.message or _Said()
        self._texts.append(said.content or "")
        for place, call in enumerate(said.tool_calls or ()):
            known = self._calls.setdefault(place if call.index is None else call.index, _Call(function=_Function("", "")))
            function = call.function or _Function()
            known.id = known.id or call.id
            assert known.function is not None
            known.function.name = (known.function.name or "") + (function.name or "")
            known.function.arguments = (known.function.arguments or "") + (function.arguments or "")

    def message(self) -> dict[str, Any]:
        text = "".join(self._texts)
        if not self._calls:
            return {"role": "assistant", "content": text}
        calls = [{"id": call.id, "type": "function", "function": call.function} for _, call in sorted(self._calls.items())]
        return {"role": "assistant", "content": text or None, "tool_calls": calls}

    @property
    def is_begun(self) -> bool:
        return self.finish_reason is not None or bool(self._calls) or any(self._texts)


class RelayedAnswer:
    """An upstream's answer to the request `body` (a JSON object), as its bytes pass by.

    `broken_off`: why the response did not come to its end, None once it has.
    """

    def __init__(self, model: str, body: bytes) -> None:
        self.broken_off: str | None = CANCELLED
        self._model = model
        self._body = body
        self._status = 0
        self._streamed = False
        self._pieces: list[bytes] = []
        self._kept = 0

    def begin(self, status: int, content_type: str) -> None:
        """The response's head."""
        self._status = status
        self._streamed = content_type.startswith("text/event-stream")

    def take(self, piece: bytes) -> None:
        """The next bytes of its body."""
        if self._status == _OK:
            self._kept += len(piece)
            if self._kept <= _MAX_KEPT_BYTES:
                self._pieces.append(piece)

    @property
    def is_answered(self) -> bool:
        return bool(self._pieces)

    @property
    def size(self) -> int:
        return len(self._body) + min(self._kept, _MAX_KEPT_BYTES)

    def lines(self, time: str) -> list[LogLine]:
        if self._kept > _MAX_KEPT_BYTES:
            raise UnreadableAnswerError(f"an answer of {self._model!r} has {self._kept:,} bytes; {_MAX_KEPT_BYTES:,} are kept.")
        answer_id, ending, choices = self._join(b"".join(self._pieces))
        request = msgspec.json.decode(self._body)
        system, history = read_history(request.get("messages"))
        user = request.get("user")
        answer_id = answer_id or f"chatcmpl-{secrets.token_hex(12)}"
        return [
            LogLine(
                id=f"{answer_id}-{index}" if index else answer_id,
                time=time,
                model=self._model,
                finish_reason=choice.finish_reason or ending,
                system=system,
                messages=[*history, choice.message()],
                user=user if isinstance(user, str) else "",
            )
            for index, choice in sorted(choices.items())
            if choice.is_begun
        ]

    def _join(self, data: bytes) -> tuple[str | None, str | None, dict[int, _Joined]]:
        """The answer's id, why choices without a finish reason ended, and the choices by index."""
        answer_id: str | None = None
        ending = self.broken_off
        choices: dict[int, _Joined] = {}
        try:
            for event in _read_events(data) if self._streamed else [_decode(data)]:
                answer_id = event.id or answer_id
                for choice in event.choices:
                    choices.setdefault(choice.index, _Joined()).add(choice)
                if event.error is not None:
                    code = event.error.get("code") if isinstance(event.error, dict) else None
                    ending = code if isinstance(code, str) and code else FAILED
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if self.broken_off is None and not choices:
                raise UnreadableAnswerError(f"the upstream of {self._model!r} sent no chat completion: {error}.") from error
            ending = self.broken_off or _UNREADABLE
            if self.broken_off is None:
                # What followed is not known, so no choice is known to be whole.
                for joined in choices.values():
                    joined.finish_reason = None
        if not choices and ending is None:
            raise UnreadableAnswerError(f"the upstream of {self._model!r} sent no choice.")
        return answer_id, ending, choices


_decode = msgspec.json.Decoder(_Completion).decode


def _read_events(data: bytes) -> Iterator[_Completion]:
    """The events of a stream that hold JSON."""
    for line in data.splitlines():
        body = data_of(line)
        if body is not None and body != DONE_DATA:
            yield _decode(body)
