"""`SharedLimits`: the limits of API keys that several gateways keep together, in Redis or Valkey.

One task talks to the server, a batch at a time: asks of requests that their leases do not cover, and what leases have too much
or too little. Each is one call of `shared_limits.lua`, which is atomic.

Invariants: nothing here blocks the event loop; a request waits for an answer `_TIMEOUT_S` at most, twice that where a batch is
under way; a server that does not answer is left alone for `_RETRY_S`, meanwhile gateways decide by themselves as they were
told; slots of a gateway that died are free after `_SLOTS_LAST_S`. A URL may hold a password, so no message and no log line
holds the URL. It ignores whose keys they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from chaccu.errors import MissingDependencyError, UsageError
from chaccu.serve.gateway.access.leased_meter import Asked, LeasedMeter, LeaseState, Lent, WhenDown
from chaccu.serve.gateway.access.limits import Limits
from chaccu.serve.gateway.errors import ApiError

if TYPE_CHECKING:
    from redis.asyncio import Redis

_TIMEOUT_S = 0.25
_RETRY_S = 1.0
_SETTLE_S = 0.5
_SLOTS_LAST_S = 10.0
_LOOK_AGAIN_S = 0.03
_PREFIX = "chaccu:limits:"
_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss"}
_log = logging.getLogger(__name__)


def check_url(url: str) -> str:
    """The URL of a server as its client takes it. Raises `UsageError` for another kind of URL."""
    parts = urlsplit(url)
    scheme = _SCHEMES.get(parts.scheme)
    if scheme is None or not parts.hostname:
        raise UsageError("--shared-state is no URL of Redis or Valkey.", remedy="write it as redis://HOST:6379/0, or rediss://")
    return urlunsplit((scheme, *parts[1:]))


class _Ask:
    """A request that waits for a lease."""

    def __init__(self, meter: LeasedMeter, tokens: int) -> None:
        self.meter = meter
        self.tokens = tokens
        self.reserved: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.looks_again = True


class SharedLimits:
    """One gateway's side of it; `start` it in the event loop, and `close` it."""

    def __init__(self, url: str, when_down: WhenDown, clock: Callable[[], float]) -> None:
        """Raises `UsageError` for a wrong URL, `MissingDependencyError` where the client is not installed."""
        self.exchanges = self.failures = 0
        self._redis = _connect(check_url(url))
        self._shown = urlsplit(url).hostname
        self._clock = clock
        self._state = LeaseState(when_down)
        self._gateway = secrets.token_hex(8)
        self._script = (importlib.resources.files("chaccu.serve.gateway.access") / "shared_limits.lua").read_text(
            encoding="utf-8"
        )
        self._sha: str | None = None
        self._meters: dict[str, LeasedMeter] = {}
        self._names: dict[LeasedMeter, str] = {}
        self._asks: list[_Ask] = []
        self._urgent: dict[LeasedMeter, None] = {}
        self._has_work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """Whether the server has answered last."""
        return self._state.is_up

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Give back all leases, and end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        leases = [(meter, meter.settle(is_last=True)) for meter in self._meters.values() if meter.has_lease]
        if self.is_up and leases:
            await self._exchange(leases)
        await self._redis.aclose()

    def meter(self, key_id: str, limits: Limits) -> LeasedMeter:
        """The meter of a key."""
        meter = self._meters[key_id] = LeasedMeter(limits, self._clock, self._state, self._hurry)
        self._names[meter] = _PREFIX + key_id
        return meter

    async def begin(self, meter: LeasedMeter, tokens: int) -> int:
        """`meter.begin`, once there is a lease or a refusal of all gateways. Raises `ApiError` as it does."""
        if meter.decides_now(tokens):
            return meter.begin(tokens)
        ask = _Ask(meter, tokens)
        self._ask(ask)
        try:
            return await ask.reserved
        except asyncio.CancelledError:
            # It may have begun in the very moment in which nobody waited any more.
            if ask.reserved.done() and not ask.reserved.cancelled() and ask.reserved.exception() is None:
                meter.end(ask.reserved.result(), 0)
            raise

    def _ask(self, ask: _Ask) -> None:
        self._asks.append(ask)
        self._has_work.set()

    def _hurry(self, meter: LeasedMeter) -> None:
        self._urgent[meter] = None
        self._has_work.set()

    async def _run(self) -> None:
        settled_s = self._clock()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SETTLE_S):
                    await self._has_work.wait()
            self._has_work.clear()
            if not self.is_up:
                await asyncio.sleep(_RETRY_S)
                await self._exchange(())
                continue
            if self._clock() - settled_s >= _SETTLE_S:
                settled_s = self._clock()
                self._urgent.update((meter, None) for meter in self._meters.values() if meter.has_lease)
            await self._talk()

    async def _talk(self) -> None:
        asks, self._asks = self._asks, []
        urgent, self._urgent = self._urgent, {}
        seen: set[LeasedMeter] = set()
        calls: list[tuple[LeasedMeter, Asked]] = []
        for ask in asks:
            calls.append((ask.meter, ask.meter.ask(ask.tokens, is_first=ask.meter not in seen)))
            seen.add(ask.meter)
        calls += [(meter, meter.settle()) for meter in urgent if meter not in seen]
        if not calls:
            return
        try:
            await self._exchange(calls)
        finally:
            # Whatever goes wrong, nobody is left waiting.
            for ask in asks:
                self._decide(ask)

    def _decide(self, ask: _Ask) -> None:
        if ask.reserved.cancelled():
            return
        if ask.looks_again and self.is_up and ask.meter.lacks_a_slot:
            # A slot that was left on another gateway a moment ago may not be known yet: a client that asks one request after
            # the other must not meet itself.
            ask.looks_again = False
            asyncio.get_running_loop().call_later(_LOOK_AGAIN_S, self._ask, ask)
            return
        try:
            ask.reserved.set_result(ask.meter.begin(ask.tokens))
        except ApiError as error:
            ask.reserved.set_exception(error)

    async def _exchange(self, calls: Sequence[tuple[LeasedMeter, Asked]]) -> None:
        """Say and ask all of it; without an answer leases are lost. With no calls it only looks whether the server answers."""
        from redis.exceptions import RedisError

        try:
            async with asyncio.timeout(_TIMEOUT_S):
                if self._sha is None:
                    self._sha = await self._redis.script_load(self._script)
                pipeline = self._redis.pipeline(transaction=False)
                for meter, asked in calls:
                    pipeline.evalsha(self._sha, 1, self._names[meter], *self._arguments(meter.limits, asked))
                replies = await pipeline.execute()
        except (RedisError, OSError, TimeoutError) as error:
            self._go_down(error)
            return
        self.exchanges += 1
        if not self.is_up:
            _log.warning("the shared state at %s answers again", self._shown)
            self._state.is_up = True
        for (meter, _), reply in zip(calls, replies, strict=True):
            meter.take_lease(msgspec.convert(dict(zip(Lent.__struct_fields__, reply, strict=True)), Lent, strict=False))

    def _arguments(self, limits: Limits, asked: Asked) -> list[Any]:
        of_key = (limits.requests_per_minute or 0, limits.tokens_per_minute or 0, limits.concurrent or 0)
        numbers = (int(value) if isinstance(value, bool) else value for value in msgspec.structs.astuple(asked))
        return [self._gateway, round(_SLOTS_LAST_S * 1000), *of_key, *numbers]

    def _go_down(self, error: Exception) -> None:
        self.failures += 1
        self._sha = None
        if self._state.is_up:
            does = "keeps to the limits of keys by itself" if self._state.when_down == "local" else "refuses keys with limits"
            _log.warning(
                "the shared state at %s does not answer (%s); until it does, this gateway %s",
                self._shown,
                type(error).__name__,
                does,
            )
        self._state.is_up = False
        for meter in self._meters.values():
            meter.lose_lease()


def _connect(url: str) -> Redis:
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as error:
        raise MissingDependencyError("redis", extra="redis", needed_for="--shared-state") from error
    client: Redis = Redis.from_url(url, decode_responses=True, retry=Retry(NoBackoff(), 0))
    return client
