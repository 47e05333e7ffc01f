"""`UpstreamRelay`: models that OpenAI-compatible servers beside the gateway serve.

Invariant: whatever is under way is known here, so that it can be looked after and ended. It ignores what the bytes mean.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

from chaccu.serve.gateway.config import GatewayConfig
from chaccu.serve.gateway.upstreams.answer_receiver import AnswerReceiver
from chaccu.serve.gateway.upstreams.exchange import Exchange
from chaccu.serve.gateway.upstreams.pool import UpstreamPool
from chaccu.serve.gateway.upstreams.server import UpstreamStatus
from chaccu.serve.gateway.upstreams.stall_watch import SilenceLimits

_LONGEST_LOOK_S = 1.0
_LOOKS_A_LIMIT = 4


class UpstreamRelay:
    """Relays requests to the config's upstreams by model name; `on_continue(model)` is called when one goes on with the answer
    of another; `clock` gives seconds.
    """

    def __init__(self, config: GatewayConfig, on_continue: Callable[[str], None], clock: Callable[[], float]) -> None:
        """Raises `UsageError` when the API key of an upstream is not in the environment."""
        self.names = sorted({upstream.name for upstream in config.upstreams})
        self._pools = {
            name: UpstreamPool(
                [upstream for upstream in config.upstreams if upstream.name == name],
                wait_s=config.rejoin_wait_s,
                max_attempts=config.max_attempts,
                on_continue=functools.partial(on_continue, name),
                clock=clock,
            )
            for name in self.names
        }
        self._limits = SilenceLimits(config.first_byte_s, config.upstream_stall_s)
        self._open: set[Exchange] = set()
        self._look: asyncio.TimerHandle | None = None

    def serves(self, model: str) -> bool:
        return model in self._pools

    def ready(self) -> list[str]:
        """The models of which an upstream is used now."""
        return [name for name in self.names if not all(server.is_left_out for server in self._pools[name].servers)]

    def start(
        self,
        model: str,
        endpoint: str,
        body: bytes,
        receiver: AnswerReceiver,
        headers: bytes,
        on_tried: Callable[[str], None] = lambda upstream: None,
    ) -> Exchange:
        """Send a request to an upstream of `model`, with lines of `headers`; `receiver` gets the answer, or hears that there is
        none, and `on_tried` the URL of each upstream that is asked.
        """
        exchange = Exchange(self._pools[model], endpoint, body, receiver, headers, on_tried, self._open.discard)
        self._open.add(exchange)
        if self._look is None and self._limits.shortest_s:
            self._look_later()
        exchange.start()
        return exchange

    def statuses(self) -> list[UpstreamStatus]:
        """All upstreams by model, as they were named."""
        return [server.status() for name in self.names for server in self._pools[name].servers]

    def close(self) -> None:
        """Break off what is under way, and close all connections."""
        if self._look is not None:
            self._look.cancel()
        for exchange in list(self._open):
            exchange.cancel()
        for pool in self._pools.values():
            for server in pool.servers:
                server.close()

    def _look_later(self) -> None:
        wait_s = min(_LONGEST_LOOK_S, self._limits.shortest_s / _LOOKS_A_LIMIT)
        self._look = asyncio.get_running_loop().call_later(wait_s, self._look_for_stalls)

    def _look_for_stalls(self) -> None:
        # One look at all of them: a timer each would cost every answer.
        self._look = None
        now_s = asyncio.get_running_loop().time()
        for exchange in list(self._open):
            exchange.check_stall(now_s, self._limits)
        if self._open:
            self._look_later()
