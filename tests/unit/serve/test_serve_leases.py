"""Leases of shared limits, against a model of what Redis does, on a clock of their own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaccu.errors import UsageError
from chaccu.serve.gateway.access.leased_meter import Asked, LeasedMeter, LeaseState, Lent, WhenDown
from chaccu.serve.gateway.access.limits import Limits
from chaccu.serve.gateway.access.shared_limits import check_url
from chaccu.serve.gateway.config import GatewayConfig, check_config
from chaccu.serve.gateway.errors import ApiError


class Books:
    """What all gateways share, as the script keeps it."""

    def __init__(self, limits: Limits) -> None:
        self.now_s = 1000.0
        self.limits = limits
        self.levels = [float(limits.requests_per_minute or 0), float(limits.tokens_per_minute or 0)]
        self.held: dict[LeasedMeter, int] = {}

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        for index, full in enumerate((self.limits.requests_per_minute or 0, self.limits.tokens_per_minute or 0)):
            self.levels[index] = min(full, self.levels[index] + full * seconds / 60)

    def tell(self, meter: LeasedMeter, asked: Asked) -> None:
        full = [self.limits.requests_per_minute or 0, self.limits.tokens_per_minute or 0]
        back = [asked.requests_back, asked.tokens_back]
        self.levels = [min(full[index], self.levels[index] + back[index]) for index in (0, 1)]
        others = sum(held for one, held in self.held.items() if one is not meter)
        if asked.is_certain or meter not in self.held:
            self.held[meter] = asked.slots_held
        slots = (self.limits.concurrent or 0) - others - self.held[meter]
        wanted, more, lent = [asked.requests, asked.tokens], [asked.requests_more, asked.tokens_more], [0.0, 0.0]
        took = 0
        enough = all(not full[index] or self.levels[index] + 1e-6 >= wanted[index] for index in (0, 1))
        if enough and (self.limits.concurrent is None or not asked.slots or slots >= asked.slots):
            for index in (0, 1):
                if full[index]:
                    lent[index] = wanted[index] + max(0.0, min(more[index], self.levels[index] - wanted[index]))
                    self.levels[index] -= lent[index]
            if self.limits.concurrent is not None:
                took = asked.slots + max(0, min(asked.slots_more, slots - asked.slots))
        self.held[meter] += took
        meter.take_lease(
            Lent(
                requests=lent[0],
                tokens=lent[1],
                slots=took,
                slots_elsewhere=others,
                requests_level=self.levels[0],
                tokens_level=self.levels[1],
            )
        )


def meters_of(books: Books, count: int, when_down: WhenDown = "local") -> tuple[list[LeasedMeter], LeaseState]:
    state = LeaseState(when_down)
    return [LeasedMeter(books.limits, books.clock, state, lambda meter: None) for _ in range(count)], state


def begin(books: Books, meter: LeasedMeter, tokens: int) -> int | None:
    """A request begins, with what it has to ask for; None when it is refused."""
    if not meter.decides_now(tokens):
        books.tell(meter, meter.ask(tokens, is_first=True))
    try:
        return meter.begin(tokens)
    except ApiError:
        return None


@given(
    limits=st.builds(
        Limits,
        requests_per_minute=st.none() | st.integers(1, 3000),
        tokens_per_minute=st.none() | st.integers(1, 30_000),
        concurrent=st.none() | st.integers(1, 40),
    ),
    steps=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["begin", "end", "settle", "wait"]), st.integers(1, 500)), max_size=80
    ),
)
def test_three_gateways_give_no_more_than_the_limits(limits: Limits, steps: list[tuple[int, str, int]]) -> None:
    books = Books(limits)
    meters, _ = meters_of(books, 3)
    requests, tokens = 0, 0
    open_requests: list[list[int]] = [[], [], []]
    for index, what, amount in steps:
        meter = meters[index]
        if what == "begin":
            reserved = begin(books, meter, amount)
            if reserved is not None:
                requests, tokens = requests + 1, tokens + reserved
                open_requests[index].append(reserved)
        elif what == "end" and open_requests[index]:
            reserved = open_requests[index].pop()
            meter.end(reserved, reserved)
        elif what == "settle":
            books.tell(meter, meter.settle())
        else:
            books.sleep(amount / 100)
        passed_min = (books.now_s - 1000) / 60
        if limits.requests_per_minute is not None:
            assert requests <= limits.requests_per_minute * (1 + passed_min) + 1e-3
        if limits.tokens_per_minute is not None:
            assert tokens <= limits.tokens_per_minute * (1 + passed_min) + 1e-3 * len(steps)
        if limits.concurrent is not None:
            assert sum(map(len, open_requests)) <= limits.concurrent


@pytest.mark.parametrize(
    ("limits", "idle_wait_s"),
    [(Limits(requests_per_minute=6000), 0.0), (Limits(tokens_per_minute=60_000), 0.0), (Limits(concurrent=64), 0.0)],
)
def test_most_requests_are_decided_without_asking(limits: Limits, idle_wait_s: float) -> None:
    books = Books(limits)
    (meter,), _ = meters_of(books, 1)
    assert begin(books, meter, 10) is not None
    assert sum(meter.decides_now(10) and begin(books, meter, 10) is not None for _ in range(3)) == 3


def test_one_gateway_after_the_other_can_use_all_of_it() -> None:
    books = Books(Limits(requests_per_minute=600))
    (left, right), _ = meters_of(books, 2)
    assert begin(books, left, 1) is not None
    assert sum(begin(books, right, 1) is not None for _ in range(700)) == 600 - 11, "a second's worth is on the left"
    books.sleep(1.5)
    books.tell(left, left.settle())
    assert sum(begin(books, right, 1) is not None for _ in range(700)) == 25, "it came back, and 1.5 s flowed in"


def test_a_debt_is_paid_by_all() -> None:
    books = Books(Limits(tokens_per_minute=600))
    (left, right), _ = meters_of(books, 2)
    reserved = begin(books, left, 100)
    assert reserved == 100
    left.end(reserved, 900)
    books.tell(left, left.settle())
    assert begin(books, right, 10) is None
    books.sleep(60 * 310 / 600)
    books.tell(left, left.settle(is_last=True))
    assert begin(books, right, 10) == 10


def test_slots_of_another_gateway_count() -> None:
    books = Books(Limits(concurrent=2))
    (left, right), _ = meters_of(books, 2)
    assert begin(books, left, 1) is not None
    assert begin(books, left, 1) is not None
    assert begin(books, right, 1) is None
    assert right.lacks_a_slot
    with pytest.raises(ApiError, match="2 requests of this key are under way; its limit is 2"):
        right.begin(1)
    left.end(0, None)
    books.tell(left, left.settle())
    assert begin(books, right, 1) is not None


def test_without_shared_state_a_gateway_goes_on_alone_or_refuses() -> None:
    books = Books(Limits(requests_per_minute=10, concurrent=5))
    (meter,), state = meters_of(books, 1)
    assert [begin(books, meter, 1) is not None for _ in range(4)] == [True] * 4
    state.is_up = False
    meter.lose_lease()
    assert meter.decides_now(1)
    assert begin(books, meter, 1) is not None
    assert begin(books, meter, 1) is None, "five are under way"
    for _ in range(5):
        meter.end(0, None)
    assert sum(begin(books, meter, 1) is not None for _ in range(5)) == 5
    assert begin(books, meter, 1) is None, "ten a minute, with those from before"

    strict = LeasedMeter(books.limits, books.clock, LeaseState("refuse"), lambda meter: None)
    strict._state.is_up = False
    with pytest.raises(ApiError, match="cannot be checked now") as refused:
        strict.begin(1)
    assert (refused.value.status, refused.value.code) == (503, "limits_unavailable")
    free = LeasedMeter(Limits(), books.clock, strict._state, lambda meter: None)
    assert free.begin(1) == 0, "a key without limits needs nothing"


def test_urls() -> None:
    assert check_url("valkey://here:1/2") == "redis://here:1/2"
    with pytest.raises(UsageError, match="no URL of Redis") as wrong:
        check_url("http://user:secret@here")
    assert "secret" not in str(wrong.value)
    with pytest.raises(UsageError, match="there are none"):
        check_config(GatewayConfig(shared_state="redis://here"))
