"""Limits of API keys over two gateways and a real Redis (or Valkey)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from chaccu.serve.gateway.access.keys import KeyFile
from chaccu.serve.gateway.access.leased_meter import Asked, LeasedMeter
from chaccu.serve.gateway.access.limits import Limits
from chaccu.serve.gateway.access.shared_limits import SharedLimits
from chaccu.serve.gateway.errors import ApiError
from chaccu.testing.processes import Service, start_gateway, start_worker
from chaccu.testing.redis_server import find_server, pick_port, redis_server

pytestmark = pytest.mark.skipif(find_server() is None, reason="no Redis: apt-get install redis-server")
pytest.importorskip("redis", reason="pip install 'chaccu[redis]'")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as (served, _):
        yield served


@contextlib.asynccontextmanager
async def sharing(*urls: str) -> AsyncIterator[list[SharedLimits]]:
    made = [SharedLimits(one, "local", time.monotonic) for one in urls]
    for shared in made:
        shared.start()
    yield made
    for shared in made:
        await shared.close()


async def begin(shared: SharedLimits, meter: LeasedMeter, tokens: int = 10) -> bool:
    try:
        await shared.begin(meter, tokens)
    except ApiError as error:
        if error.status == 429:
            return False
        raise
    return True


async def test_no_more_than_the_limit_begins_however_many_ask_at_once(url: str) -> None:
    async with sharing(url, url, url) as gateways:
        limits = Limits(requests_per_minute=90, tokens_per_minute=10**6)
        meters = [shared.meter("burst", limits) for shared in gateways]
        began = await asyncio.gather(*(begin(gateways[n % 3], meters[n % 3]) for n in range(300)))
        assert 85 <= sum(began) <= 91, "less what is leased and not used: a second's worth each"
        assert sum(shared.exchanges for shared in gateways) < 60, "those that ask at once ask together"
        assert not await begin(gateways[0], meters[0])
        headers = dict(meters[0].headers())
        assert (headers[b"x-ratelimit-limit-requests"], headers[b"x-ratelimit-remaining-requests"]) == (b"90", b"0")


async def test_slots_are_shared_and_free_at_once(url: str) -> None:
    async with sharing(url, url) as (left, right):
        limits = Limits(concurrent=1)
        one, two = left.meter("slots", limits), right.meter("slots", limits)
        # A client that asks one request after the other, by a load balancer that takes turns.
        for _ in range(20):
            for shared, meter in ((left, one), (right, two)):
                assert await begin(shared, meter)
                meter.end(0, None)
        assert await begin(left, one)
        assert not await begin(right, two)
        began = await asyncio.gather(*(begin(right, two) for _ in range(5)))
        assert not any(began)


async def test_a_slot_that_was_left_a_moment_ago_is_not_held_against_the_next(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sharing(url, url) as (left, right):
        limits = Limits(concurrent=1)
        one, two = left.meter("moment", limits), right.meter("moment", limits)
        assert await begin(left, one)
        exchange = left._exchange

        async def exchange_late(calls: Sequence[tuple[LeasedMeter, Asked]]) -> None:
            await asyncio.sleep(0.01)
            await exchange(calls)

        monkeypatch.setattr(left, "_exchange", exchange_late)
        one.end(0, None)
        assert await begin(right, two)


async def test_slots_of_a_gateway_that_died_come_back(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaccu.serve.gateway.access.shared_limits._SLOTS_LAST_S", 1.0)
    dying = SharedLimits(url, "local", time.monotonic)
    dying.start()
    limits = Limits(concurrent=1)
    assert await begin(dying, dying.meter("died", limits))
    assert dying._task is not None
    async with sharing(url) as (left,):
        meter = left.meter("died", limits)
        assert not await begin(left, meter)
        # It goes on for longer than slots last, and keeps its own.
        await asyncio.sleep(1.5)
        assert not await begin(left, meter)
        dying._task.cancel()
        await asyncio.sleep(1.2)
        assert await begin(left, meter)


async def test_a_request_that_nobody_waits_for_takes_nothing(url: str) -> None:
    async with sharing(url) as (left,):
        meter = left.meter("left", Limits(concurrent=1, tokens_per_minute=100))
        waiting = asyncio.create_task(left.begin(meter, 100))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0.1)
        assert await begin(left, meter, 100)


async def test_a_server_that_hangs_or_dies_delays_nobody_for_long(tmp_path: Path) -> None:
    port = pick_port()
    with redis_server(tmp_path, port=port) as (url, server):
        async with sharing(url) as (left,):
            meter = left.meter("hangs", Limits(requests_per_minute=10))
            assert await begin(left, meter)
            server.send_signal(signal.SIGSTOP)
            began = time.monotonic()
            # Nine are left, as far as this gateway knows.
            allowed = [await begin(left, meter) for _ in range(12)]
            assert (sum(allowed), left.is_up) == (9, False)
            assert time.monotonic() - began < 1
            server.send_signal(signal.SIGCONT)
            await wait_for(left, True)
            server.kill()
            server.wait()
            await wait_for(left, False, nudge=meter)
            with redis_server(tmp_path, port=port):
                await wait_for(left, True)
                assert await begin(left, meter), "a server that remembers nothing begins with full buckets"
            assert left.failures >= 2


async def wait_for(shared: SharedLimits, is_up: bool, nudge: LeasedMeter | None = None) -> None:
    for _ in range(250):
        if shared.is_up == is_up:
            return
        if nudge is not None:
            await begin(shared, nudge)
        await asyncio.sleep(0.02)
    raise AssertionError("not within 5 s")


def ask(gateway: Service, key: str) -> httpx.Response:
    body = {"model": "far", "messages": [{"role": "user", "content": "Hi"}]}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers, trust_env=False)


def test_two_gateways_count_together(url: str, tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    (slow, _), (quick, _) = (
        keys.create(name, limits=Limits(requests_per_minute=limit, concurrent=2))
        for name, limit in (("slow", 6), ("quick", 6000))
    )
    metrics, _ = keys.create("metrics", ["metrics"])
    arguments = ("--keys", str(keys.path), "--shared-state", url)
    with (
        start_gateway(tmp_path) as inner,
        start_worker(tmp_path, inner, "scripted:far?text=hi"),
        start_gateway(tmp_path, *arguments, "--upstream", f"far={inner.url}/v1") as left,
        start_gateway(tmp_path, *arguments, "--upstream", f"far={inner.url}/v1") as right,
    ):
        statuses = [ask(gateway, slow).status_code for gateway in (left, right) * 6]
        assert (statuses[:6], statuses[7:]) == ([200] * 6, [429] * 5), "at most one flows in meanwhile"
        refused = ask(right, slow)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "6 requests a minute" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert [ask(gateway, quick).status_code for gateway in (left, right) * 10] == [200] * 20
        shown = httpx.get(f"{left.url}/metrics", headers={"x-api-key": metrics}, trust_env=False).text
        assert "chaccu_shared_state_up 1.0" in shown
        assert "chaccu_shared_state_failures_total 0.0" in shown


def test_it_may_refuse_where_nothing_answers(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    shown, _ = keys.create("limited", limits=Limits(concurrent=2))
    free, _ = keys.create("free")
    nowhere = f"redis://:a-secret@127.0.0.1:{pick_port()}"
    arguments = ("--keys", str(keys.path), "--shared-state", nowhere, "--shared-state-down", "refuse")
    with (
        start_gateway(tmp_path) as inner,
        start_worker(tmp_path, inner, "scripted:far?text=hi"),
        start_gateway(tmp_path, *arguments, "--upstream", f"far={inner.url}/v1") as gateway,
    ):
        refused = ask(gateway, shown)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "limits_unavailable")
        assert ask(gateway, free).status_code == 200
        assert "does not answer" in gateway.log
        assert "a-secret" not in gateway.log
