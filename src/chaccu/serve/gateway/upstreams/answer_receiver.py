"""`AnswerReceiver`: who gets an upstream's answer, whoever it is written for."""

from __future__ import annotations

from typing import Protocol

from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.upstreams.connection import ResponseHead


class AnswerReceiver(Protocol):
    """Who gets the answer."""

    def begin(self, head: ResponseHead) -> None:
        """The head has come."""
        ...

    def deliver(self, body: bytes) -> None:
        """The next bytes of the body, as far as they have come; none when only the head has."""
        ...

    def finish(self, body: bytes) -> None:
        """The last bytes of the body, and its end."""
        ...

    def fail(self, lost: ApiError) -> None:
        """There will be no more; a head was given, or not."""
        ...
