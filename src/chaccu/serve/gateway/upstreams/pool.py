"""`UpstreamPool`: the upstreams that serve one model.

Invariant: who waits for an upstream is woken as soon as one is used again. It ignores requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence

from chaccu.serve.gateway.config import Upstream
from chaccu.serve.gateway.upstreams.routing import choose_upstream
from chaccu.serve.gateway.upstreams.server import UpstreamServer


class UpstreamPool:
    """`wait_s`: how long a request waits while all are left out; `max_attempts`: how many may lose one request in turn;
    `on_continue` is called when one goes on with the answer of another; `clock` gives seconds."""

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        *,
        wait_s: float,
        max_attempts: int,
        on_continue: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """Raises `UsageError` when the API key of one is not in the environment."""
        self.model = upstreams[0].name
        self.wait_s = wait_s
        self.max_attempts = max_attempts
        self.on_continue = on_continue
        self.servers = [UpstreamServer(upstream, clock, self._wake) for upstream in upstreams]
        self._ready = asyncio.Event()

    def choose(self, failed: Collection[UpstreamServer]) -> UpstreamServer | None:
        """The upstream for a request that those in `failed` did not answer; None when all are left out."""
        if len(self.servers) == 1:
            # Most have one, and every request comes by here.
            return None if self.servers[0].is_left_out else self.servers[0]
        chosen = choose_upstream([server.load(has_failed=server in failed) for server in self.servers])
        return None if chosen is None else self.servers[chosen]

    async def wait_ready(self) -> None:
        """Wait until one is used again."""
        await self._ready.wait()

    def _wake(self) -> None:
        self._ready.set()
        self._ready = asyncio.Event()
