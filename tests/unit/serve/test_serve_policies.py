"""Routing and rates: pure policies, on a clock of their own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaccu.serve.gateway.rate import RateMeter
from chaccu.serve.gateway.routing import WorkerLoad, choose_worker


def load(outstanding: int, slots: int = 4, last: float = 0.0, draining: bool = False) -> WorkerLoad:
    return WorkerLoad(slots=slots, outstanding=outstanding, last_given_s=last, draining=draining)


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ([], None),
        ([load(0, draining=True)], None),
        ([load(3), load(1)], 1),
        ([load(3, slots=16), load(1, slots=2)], 0),
        ([load(1, last=5.0), load(1, last=3.0)], 1),
        ([load(0, draining=True), load(9)], 1),
    ],
)
def test_the_least_expected_wait_is_chosen(loads: list[WorkerLoad], chosen: int | None) -> None:
    assert choose_worker(loads) == chosen


@given(slots=st.lists(st.integers(1, 16), min_size=1, max_size=5), requests=st.integers(1, 60))
def test_requests_spread_by_slots(slots: list[int], requests: int) -> None:
    given_out = [0] * len(slots)
    for now in range(requests):
        chosen = choose_worker([load(n, s, last=now) for n, s in zip(given_out, slots, strict=True)])
        assert chosen is not None
        given_out[chosen] += 1
    # No worker could have been spared work by giving one request to another.
    assert all(
        mine / s <= (other + 1) / o
        for mine, s in zip(given_out, slots, strict=True)
        for other, o in zip(given_out, slots, strict=True)
    )


def test_a_rate_is_right_from_the_start_and_fades() -> None:
    now = 0.0
    meter = RateMeter(lambda: now, window_s=5.0)
    for _ in range(100):
        now += 0.1
        meter.add(3)
        if now > 0.5:
            assert meter.per_second() == pytest.approx(30, rel=0.15)
    now += 50
    assert meter.per_second() < 0.01
