"""A worker of several gateways: what each is told of the others, and which of them it stays with."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaccu.errors import ServeError, UsageError
from chaccu.serve.gateway.workers.prefix_table import Prefix
from chaccu.serve.gateway.workers.registry import WorkerRegistry
from chaccu.serve.gateway.workers.remote_worker import RemoteWorker
from chaccu.serve.gateway.workers.routing import slots_beside
from chaccu.serve.link import ModelOffer, Share
from chaccu.serve.worker.gateways import GatewayAddress, NamedGateway, parse_gateway
from chaccu.serve.worker.membership import Membership
from chaccu.serve.worker.sharing import GatewayShares


@given(slots=st.integers(1, 100), own=st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_slots_are_shared_without_leaving_a_gateway_out(slots: int, own: list[int]) -> None:
    mine = [slots_beside(slots, elsewhere=sum(own) - one, parties=len(own)) for one in own]
    assert all(1 <= share <= slots for share in mine)
    assert all(share >= slots // len(own) for share in mine)
    if len(own) == 1:
        assert mine == [slots]
    if sum(own) <= slots:
        assert all(one <= share for one, share in zip(own, mine, strict=True)), "what a gateway has, it may keep"


def test_each_gateway_learns_what_the_others_have() -> None:
    shares, told = GatewayShares(), [0, 0]

    def count(index: int) -> Callable[[], None]:
        return lambda: told.__setitem__(index, told[index] + 1)

    first = shares.join(count(0))
    assert first.share == Share(elsewhere=0, gateways=1)
    second = shares.join(count(1))
    first.begin()
    first.begin()
    second.begin()
    assert (first.share, second.share) == (Share(elsewhere=1, gateways=2), Share(elsewhere=2, gateways=2))
    before = list(told)
    first.end()
    assert (told[0] - before[0], told[1] - before[1]) == (0, 1), "a gateway knows its own requests"
    second.leave()
    assert first.share == Share(elsewhere=0, gateways=1)


def test_a_gateway_routes_around_what_others_have_and_goes_on_when_it_is_freed() -> None:
    registry = WorkerRegistry(lambda: 0.0)
    offer = ModelOffer(name="m", engine="scripted", context_tokens=100, slots=4, chat_format="chatml")
    busy, idle = (RemoteWorker(name, (offer,), lambda: 0.0) for name in ("busy", "idle"))
    looked: list[int] = []
    registry.on_more_room = lambda: looked.append(registry.room("m"))
    registry.add(busy)
    registry.add(idle)
    registry.note_share(busy, Share(elsewhere=3, gateways=2))
    assert registry.room("m") == 2 + 4
    assert registry.pick(Prefix("m", (), ()), tokens=10) is idle
    registry.note_share(busy, Share(elsewhere=4, gateways=2))
    assert registry.room("m") == 2 + 4
    registry.note_share(busy, Share())
    assert looked[-1] == 8
    assert [status.elsewhere for status in registry.statuses()] == [0, 0]


class Names:
    """A resolver, and the gateways that a `Membership` has joined."""

    def __init__(self, *hosts: str) -> None:
        self.hosts = list(hosts)
        self.joined: list[str] = []
        self.said: list[str] = []
        self.named: dict[str, Callable[[], bool]] = {}
        self.gone: dict[str, asyncio.Event] = {}
        self.refuses: set[str] = set()

    async def look_up(self) -> list[GatewayAddress]:
        if not self.hosts:
            raise socket.gaierror("no such name")
        return [GatewayAddress("ws://gateways/workers/join", host, host) for host in self.hosts]

    async def stay(self, address: GatewayAddress, is_named: Callable[[], bool]) -> None:
        if address.shown in self.refuses:
            raise ServeError("the gateway refused this worker: so.")
        self.joined.append(address.shown)
        self.named[address.shown] = is_named
        gone = self.gone[address.shown] = asyncio.Event()
        while is_named():
            await gone.wait()
            gone.clear()


@contextlib.asynccontextmanager
async def membership(names: Names, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(NamedGateway, "look_up", lambda self: names.look_up())
    gateways = [parse_gateway("dns+http://gateways:8000")]
    task = asyncio.create_task(Membership(gateways, names.stay, names.said.append, look_again_s=0.01).run(asyncio.Event()))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("not within 5 s")


async def test_a_name_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names()
    async with membership(names, monkeypatch):
        await until(lambda: bool(names.said))
        names.hosts = ["10.0.0.1"]
        await until(lambda: names.joined == ["10.0.0.1"])
        names.hosts = ["10.0.0.1", "10.0.0.2"]
        await until(lambda: names.joined == ["10.0.0.1", "10.0.0.2"])
        names.hosts = ["10.0.0.2"]
        await until(lambda: not names.named["10.0.0.1"]())
        assert names.named["10.0.0.2"]()
        # Its connection has not been cut; once it is gone nobody dials it, until the name has the address again.
        names.gone["10.0.0.1"].set()
        await asyncio.sleep(0.03)
        names.hosts = ["10.0.0.1", "10.0.0.2"]
        await until(lambda: names.joined == ["10.0.0.1", "10.0.0.2", "10.0.0.1"])
    assert [said for said in names.said if "not found" in said] == names.said[:1]


async def test_a_refusal_ends_the_worker_only_where_no_other_gateway_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names("10.0.0.1", "10.0.0.2")
    names.refuses = {"10.0.0.2"}
    async with membership(names, monkeypatch) as task:
        await until(lambda: bool(names.said))
        await asyncio.sleep(0.03)
        assert names.joined == ["10.0.0.1"]
        assert names.said == [
            "10.0.0.2: the gateway refused this worker: so. It is tried no more; the worker goes on with its other gateways"
        ]
        assert not task.done()
    alone = Names("10.0.0.1")
    alone.refuses = {"10.0.0.1"}
    async with membership(alone, monkeypatch) as task:
        with pytest.raises(ServeError, match="refused this worker"):
            await asyncio.wait_for(asyncio.shield(task), 5)


async def test_addresses_of_a_name() -> None:
    (address,) = await parse_gateway("dns+https://127.0.0.1:8443/under").look_up()
    assert (address.url, address.host) == ("wss://127.0.0.1:8443/under/workers/join", "127.0.0.1")
    assert (await parse_gateway("here:8000").look_up())[0].host is None
    with pytest.raises(UsageError, match="no gateway URL"):
        parse_gateway("dns+ftp://host")
