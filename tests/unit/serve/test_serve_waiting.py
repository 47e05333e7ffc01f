"""Queues: who is answered, who waits, who is turned away; on a clock of their own."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.workers.back_pressure import BackPressure
from chaccu.serve.gateway.workers.registry import WorkerRegistry
from chaccu.serve.gateway.workers.remote_worker import RemoteWorker
from chaccu.serve.gateway.workers.waiting import ModelQueue, QueueFullError, Waiter
from chaccu.serve.link import Generate, ModelOffer, Piece, Sampling


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def build_queue(size: int = 10, wait_s: float = 30.0) -> tuple[ModelQueue, Clock]:
    clock = Clock()
    return ModelQueue(size=size, wait_s=wait_s, clock=clock), clock


def enter(queue: ModelQueue, keys: str, room: int, log: list[str] | None = None) -> list[Waiter]:
    return [queue.enter(key, room, lambda key=key: None if log is None else log.append(key)) for key in keys]


def test_what_there_is_room_for_begins_at_once_and_the_rest_waits() -> None:
    queue, _ = build_queue()
    states = [waiter.state for waiter in enter(queue, "aaab", 2)]
    assert states == ["under way", "under way", "waiting", "waiting"]
    assert (queue.under_way, queue.waiting) == (2, 2)


def test_keys_take_turns_and_a_keys_own_come_in_order() -> None:
    queue, _ = build_queue(size=100)
    woken: list[str] = []
    running = enter(queue, "x", 1)
    waiters = enter(queue, "aaaabbc", 1, woken)
    while running:
        queue.leave(running.pop(), 1)
        running = [waiter for waiter in waiters if waiter.state == "under way"]
    assert woken == list("abcabaa")
    assert (queue.under_way, queue.waiting) == (0, 0)


def test_more_room_lets_on_as_many_and_less_takes_nobody_back() -> None:
    queue, _ = build_queue()
    first, *rest = enter(queue, "abcd", 1)
    queue.fill(3)
    assert [waiter.state for waiter in rest] == ["under way", "under way", "waiting"]
    queue.leave(first, 1)
    assert rest[-1].state == "waiting"
    assert queue.under_way == 2


def test_one_that_leaves_the_queue_frees_its_place_and_its_turn() -> None:
    queue, _ = build_queue(size=2)
    running, gone, last = enter(queue, "xab", 1)
    queue.leave(gone, 1)
    assert (gone.state, queue.waiting) == ("refused", 1)
    queue.leave(running, 1)
    assert (last.state, queue.under_way) == ("under way", 1)


def test_a_full_queue_turns_away_but_the_heaviest_key_makes_room_for_others() -> None:
    queue, _ = build_queue(size=4)
    woken: list[str] = []
    enter(queue, "x", 1)
    waiters = enter(queue, "aaaa", 1, woken)
    with pytest.raises(QueueFullError, match="4 requests wait already"):
        queue.enter("a", 1, lambda: None)
    enter(queue, "bb", 1)
    assert [waiter.state for waiter in waiters] == ["waiting", "waiting", "refused", "refused"]
    assert woken == ["a", "a"]
    with pytest.raises(QueueFullError):
        queue.enter("b", 1, lambda: None)
    assert queue.waiting == 4


def test_a_queue_of_no_size_turns_away_what_cannot_begin() -> None:
    queue, _ = build_queue(size=0)
    enter(queue, "a", 1)
    with pytest.raises(QueueFullError):
        queue.enter("b", 1, lambda: None)


def test_one_whose_time_is_up_is_not_begun() -> None:
    queue, clock = build_queue(wait_s=30)
    running, late = enter(queue, "ab", 1)
    clock.now_s += 20
    (later,) = enter(queue, "c", 1)
    clock.now_s += 10
    queue.leave(running, 1)
    assert (late.state, later.state, queue.under_way) == ("refused", "under way", 1)


def test_when_to_come_again_follows_how_fast_requests_end() -> None:
    queue, clock = build_queue(size=1000, wait_s=450)
    assert queue.retry_after_s() == 60
    running = enter(queue, "a", 1)
    waiters = enter(queue, "a" * 400, 1)
    for _ in range(200):
        clock.now_s += 0.5
        queue.leave(running.pop(), 1)
        running = [waiter for waiter in waiters if waiter.state == "under way"]
    assert queue.waiting == 200
    assert queue.retry_after_s() == 60
    for waiter in waiters[-181:]:
        queue.leave(waiter, 1)
    assert queue.waiting == 19
    assert queue.retry_after_s() == pytest.approx(20 / 2, rel=0.1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans()), max_size=60))
def test_nobody_waits_while_there_is_room_and_nothing_is_lost(steps: list[tuple[str, int, bool]]) -> None:
    queue, _ = build_queue(size=5)
    room = 2
    waiters: list[Waiter] = []
    for key, choice, comes in steps:
        if comes:
            try:
                waiters.append(queue.enter(key, room, lambda: None))
            except QueueFullError:
                assert queue.waiting == 5
        elif live := [waiter for waiter in waiters if waiter.state != "refused"]:
            queue.leave(live[choice % len(live)], room)
        states = [waiter.state for waiter in waiters]
        assert states.count("under way") == queue.under_way <= room
        assert states.count("waiting") == queue.waiting <= 5
        assert not queue.waiting or queue.under_way == room


def build_worker(clock: Clock, name: str, slots: int = 1) -> RemoteWorker:
    offer = ModelOffer(name="m", engine="scripted", context_tokens=100, slots=slots, chat_format="chatml")
    return RemoteWorker(name, (offer,), clock)


class TestBackPressure:
    async def test_a_worker_that_joins_lets_the_waiting_on(self) -> None:
        clock = Clock()
        registry = WorkerRegistry(clock)
        queues = BackPressure(registry, size=5, wait_s=5, clock=clock)
        registry.add(build_worker(clock, "one"))
        begun: list[int] = []
        done = asyncio.Event()

        async def ask(number: int) -> None:
            async with queues.turn("m", ""):
                begun.append(number)
                await done.wait()

        tasks = [asyncio.create_task(ask(number)) for number in range(3)]
        await asyncio.sleep(0)
        assert (begun, queues.waiting()) == ([0], {"m": 2})
        registry.add(build_worker(clock, "two"))
        await asyncio.sleep(0.01)
        assert begun == [0, 1]
        tasks[2].cancel()
        done.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert queues.waiting() == {"m": 0}

    async def test_who_waits_in_vain_is_told_when_to_come_again(self) -> None:
        clock = Clock()
        registry = WorkerRegistry(clock)
        queues = BackPressure(registry, size=1, wait_s=0.02, clock=clock)
        worker = build_worker(clock, "one")
        registry.add(worker)
        async with queues.turn("m", "a"):
            for text, _ in itertools.product(["waited 0.02 s"], range(2)):
                with pytest.raises(ApiError, match=text) as refused:
                    async with queues.turn("m", "a"):
                        pass
                assert (refused.value.status, refused.value.code) == (429, "queue_full")
                assert int(refused.value.headers["retry-after"]) >= 1
            registry.remove(worker)
            with pytest.raises(ApiError, match="No worker serves 'm'") as gone:
                async with queues.turn("m", "a"):
                    pass
            assert gone.value.status == 503

    async def test_names_of_one_worker_share_its_slots(self) -> None:
        clock = Clock()
        registry = WorkerRegistry(clock)
        queues = BackPressure(registry, size=50, wait_s=5, clock=clock)
        names = ("m", "law")
        offer = ModelOffer(name="m", engine="scripted", context_tokens=100, slots=4, chat_format="chatml")
        worker = RemoteWorker("one", tuple(msgspec.structs.replace(offer, name=name) for name in names), clock)
        registry.add(worker)
        begun: list[tuple[str, int]] = []

        async def ask(name: str) -> None:
            async with queues.turn(name, ""):
                answer = worker.open(Generate(request=0, model=name, sampling=Sampling()), 1.0, changed := asyncio.Event())
                begun.append((name, worker.frames.get_nowait().request))
                while not answer.poll():
                    await changed.wait()

        async def end(name: str) -> None:
            number = next(number for one, number in begun if one == name)
            begun.remove((name, number))
            worker.take_output([Piece(number, end="stop")])
            await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(ask(name)) for name in ["m"] * 10 + ["law"] * 10]
        await asyncio.sleep(0.01)
        # The first had them all; the other got its part in any case.
        assert Counter(name for name, _ in begun) == {"m": 4, "law": 2}
        for _ in range(6):
            await end("m")
            counts = Counter(name for name, _ in begun)
            assert min(counts["m"], counts["law"]) >= 2
        assert counts.total() <= 5
        while any(name == "m" for name, _ in begun):
            await end("m")
        # What one leaves is the other's.
        assert Counter(name for name, _ in begun) == {"law": 4}
        while begun:
            await end("law")
        await asyncio.gather(*tasks)

    async def test_who_waits_for_a_model_that_is_withdrawn_is_told_at_once(self) -> None:
        clock = Clock()
        registry = WorkerRegistry(clock)
        queues = BackPressure(registry, size=5, wait_s=30, clock=clock)
        worker = build_worker(clock, "one")
        registry.add(worker)

        async def ask() -> None:
            async with queues.turn("m", ""):
                raise AssertionError

        async with queues.turn("m", ""):
            waits = asyncio.create_task(ask())
            await asyncio.sleep(0)
            registry.change_offers(worker, (msgspec.structs.replace(worker.offers["m"], name="other"),))
            with pytest.raises(ApiError, match="'m' does not exist") as gone:
                await asyncio.wait_for(waits, 1)
        assert gone.value.status == 404
        assert queues.waiting() == {"m": 0}
