"""Routing, rates, prefixes: pure policies, on a clock of their own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaccu.serve.gateway.workers.breaker import Breaker
from chaccu.serve.gateway.workers.hedging import Hedging
from chaccu.serve.gateway.workers.prefix_table import PrefixTable, hash_prefix
from chaccu.serve.gateway.workers.pulse import TICKS, Pulse
from chaccu.serve.gateway.workers.rate import AnswerLengths, RateMeter, SpeedMeter
from chaccu.serve.gateway.workers.routing import WorkerLoad, choose_worker, expected_wait_s


def load(outstanding: int, slots: int = 4, last: float = 0.0, due: float | None = None, **fields: object) -> WorkerLoad:
    due_tokens = float(outstanding if due is None else due)
    return WorkerLoad(slots=slots, outstanding=outstanding, last_given_s=last, due_tokens=due_tokens, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loads", "chosen"),
    [
        ([], None),
        ([load(0, is_open=False)], None),
        ([load(3), load(1)], 1),
        ([load(3, slots=16), load(1, slots=2)], 0),
        ([load(1, last=5.0), load(1, last=3.0)], 1),
        ([load(0, is_open=False), load(9)], 1),
        # A fast one gets more, a free one before a full one, however fast.
        ([load(3, speed=10.0), load(0, speed=1.0)], 0),
        ([load(4, speed=99.0), load(3, speed=1.0)], 1),
        # What is due counts, not how many ask.
        ([load(1, due=500), load(3, due=30)], 1),
        ([load(2, weight=3.0), load(1)], 0),
        ([load(3, priority=1), load(0)], 0),
        ([load(4, priority=1), load(0)], 1),
        ([load(0, is_resting=True), load(9)], 1),
        ([load(0, is_resting=True)], 0),
        # The one that has read the beginning, while its wait is within its share of twice the least.
        ([load(0), load(1, cached=1.0)], 1),
        ([load(0), load(2, cached=1.0)], 0),
        ([load(0), load(1, cached=0.5)], 0),
        ([load(0), load(0, last=9.0, cached=0.1)], 1),
        ([load(1), load(2, cached=0.6), load(2, cached=0.9)], 2),
        ([load(0), load(4, cached=1.0, speed=99.0)], 0),
    ],
)
def test_the_least_expected_wait_is_chosen(loads: list[WorkerLoad], chosen: int | None) -> None:
    assert choose_worker(loads) == chosen


@given(slots=st.lists(st.integers(1, 16), min_size=1, max_size=5), requests=st.integers(1, 60))
def test_requests_spread_by_slots(slots: list[int], requests: int) -> None:
    requests = min(requests, sum(slots))
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


some_loads = st.builds(
    WorkerLoad,
    slots=st.integers(1, 8),
    outstanding=st.integers(0, 10),
    last_given_s=st.floats(0, 100),
    due_tokens=st.floats(0, 1e4),
    speed=st.floats(0.1, 1e3),
    weight=st.floats(0.1, 10),
    priority=st.integers(-1, 1),
    cached=st.sampled_from([0.0, 0.3, 1.0]),
    is_open=st.booleans(),
    is_resting=st.booleans(),
)


@given(loads=st.lists(some_loads, max_size=6), tokens=st.floats(1, 1e4))
def test_no_choice_overloads_a_worker(loads: list[WorkerLoad], tokens: float) -> None:
    index = choose_worker(loads, tokens)
    able = [one for one in loads if one.is_open]
    assert (index is None) == (not able)
    if index is None:
        return
    chosen = loads[index]
    assert chosen.is_open
    able = [one for one in able if not one.is_resting] or able
    assert chosen in able
    free = [one for one in able if one.outstanding < one.slots]
    assert chosen.outstanding < chosen.slots or not free
    peers = [one for one in free or able if one.priority >= chosen.priority]
    assert max(one.priority for one in peers) == chosen.priority
    least_s = min(expected_wait_s(one, tokens) for one in peers)
    assert expected_wait_s(chosen, tokens) <= least_s * (1 + chosen.cached)


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


@given(requests=st.integers(1, 64), tokens_per_s=st.floats(1, 1e4), idle_s=st.floats(0, 1e6))
def test_the_speed_of_a_request_is_the_same_however_many_there_are_and_outlasts_idling(
    requests: int, tokens_per_s: float, idle_s: float
) -> None:
    now = 0.0
    meter = SpeedMeter(lambda: now)
    assert (meter.measured(), meter.estimate(7.0)) == (None, 7.0)
    meter.set_active(requests)
    for _ in range(100):
        now += 1.0
        meter.add(requests * tokens_per_s)  # type: ignore[arg-type]
    meter.set_active(0)
    now += idle_s
    assert meter.measured() == pytest.approx(tokens_per_s, rel=0.06)
    assert meter.estimate(tokens_per_s) == pytest.approx(tokens_per_s, rel=0.06)


def test_a_speed_follows_what_changed() -> None:
    now = 0.0
    meter = SpeedMeter(lambda: now)
    meter.set_active(2)
    for tokens in [40] * 60 + [4] * 60:
        now += 1.0
        meter.add(tokens)
    assert meter.measured() == pytest.approx(2.0, rel=0.1)


def test_answers_to_come_are_as_long_as_those_before_and_no_longer_than_they_may_be() -> None:
    lengths = AnswerLengths(unknown=256.0)
    assert (lengths.expected("m", None), lengths.expected("m", 10), lengths.expected("m", 0)) == (256, 10, 1)
    for _ in range(100):
        lengths.add("m", 40)
    assert lengths.expected("m", None) == pytest.approx(40)
    assert lengths.expected("other", None) == 256


turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=3000)), min_size=1, max_size=5)


@given(first=turns, more=turns)
def test_a_conversation_that_goes_on_is_known_where_it_was_answered(
    first: list[tuple[str, str]], more: list[tuple[str, str]]
) -> None:
    table = PrefixTable()
    table.add(hash_prefix("m", first), "here")
    longer = hash_prefix("m", [*first, *more])
    assert longer == hash_prefix("m", more, before=hash_prefix("m", first))
    share = table.cached(longer, {"here", "there"})["here"]
    chars = [sum(1 + len(text) for _, text in part) for part in (first, [*first, *more])]
    assert share >= chars[0] / chars[1] * 0.999
    assert table.cached(hash_prefix("m", first), {"here", "there"}) == {"here": 1.0}
    assert table.cached(longer, {"there"}) == {}
    assert table.cached(hash_prefix("other", first), {"here"}) == {}


def test_a_message_ends_where_it_ends() -> None:
    table = PrefixTable()
    table.add(hash_prefix("m", [("user", "ab"), ("assistant", "c")]), "here")
    assert table.cached(hash_prefix("m", [("user", "a"), ("assistant", "bc")]), {"here"}) == {}
    assert 0 < table.cached(hash_prefix("m", [("user", "ab"), ("assistant", "d")]), {"here"})["here"] < 1


def test_the_table_of_prefixes_is_bounded_and_forgets_what_is_out_of_use() -> None:
    table = PrefixTable(size=100)
    kept = hash_prefix("m", [("system", "be brief"), ("user", "x" * 5000)])
    for index in range(500):
        table.add(hash_prefix("m", [("user", f"{index}")]), f"w{index % 3}")
        table.add(kept, f"w{index % 20}")
    assert len(table) == 100
    assert len(table.cached(kept, {f"w{index}" for index in range(20)})) == 8
    assert table.cached(hash_prefix("m", [("user", "3")]), {"w0"}) == {}
    assert len(hash_prefix("m", [("user", "x" * 4_000_000)]).hashes) == 256


@given(heard=st.lists(st.booleans(), max_size=30), busy=st.booleans())
def test_a_stall_is_seen_within_the_limit_and_never_before_the_last_tick_of_it(heard: list[bool], busy: bool) -> None:
    pulse = Pulse()
    silent, stalled = TICKS + 1, False
    for was_heard in heard:
        if was_heard:
            pulse.hear()
            silent, stalled = 0, False
        silent += 1
        # It was heard at some time within the first tick.
        if pulse.tick(busy) == "stalled":
            assert (busy, stalled, silent >= TICKS) == (True, False, True)
            stalled = True
        assert stalled or not busy or silent < TICKS or TICKS + 1 <= silent <= 2 * TICKS


def test_a_worker_is_asked_only_while_it_has_requests_and_says_nothing() -> None:
    pulse = Pulse()
    assert [pulse.tick(False) for _ in range(9)] == ["quiet"] * 9
    assert [pulse.tick(True) for _ in range(6)] == ["ask", "quiet", "quiet", "stalled", "quiet", "quiet"]
    pulse.hear()
    assert [pulse.tick(True) for _ in range(2)] == ["quiet", "ask"]
    for _ in range(9):
        pulse.hear()
        assert pulse.tick(True) == "quiet"


def test_a_worker_that_fails_rests_longer_each_time_until_a_trial_is_answered() -> None:
    now = 0.0
    breaker = Breaker(lambda: now)
    breaker.fail()
    breaker.fail()
    breaker.succeed()
    for _ in range(2):
        breaker.fail()
    assert breaker.takes(4) == 4
    rests = []
    for _ in range(8):
        breaker.fail()
        breaker.fail()  # what was under way when the rest began makes it no longer
        began = now
        while breaker.takes(4) == 0:
            now += 0.5
        rests.append(now - began)
        assert breaker.takes(4) == 1
        breaker.begin()
        assert breaker.takes(4) == 0
    assert rests == [1, 2, 4, 8, 16, 32, 60, 60]
    breaker.abandon()
    assert breaker.takes(4) == 1
    breaker.begin()
    breaker.succeed()
    assert breaker.takes(4) == 4


@given(steps=st.lists(st.sampled_from(["begin", "succeed", "fail", "abandon", "wait"]), max_size=60))
def test_a_breaker_takes_all_or_one_or_nothing_and_opens_only_after_failures_in_a_row(steps: list[str]) -> None:
    now, failures = 0.0, 0
    breaker = Breaker(lambda: now)
    for step in steps:
        if step == "wait":
            now += 0.7
        else:
            getattr(breaker, step)()
        failures = failures + 1 if step == "fail" else 0 if step == "succeed" else failures
        assert breaker.takes(4) in ((4,) if failures < 3 else (0, 1))
    breaker.abandon()
    now += 60
    assert breaker.takes(4) >= 1


@given(waits=st.lists(st.tuples(st.floats(0.001, 9), st.booleans()), max_size=300))
def test_no_more_than_a_twentieth_is_asked_twice(waits: list[tuple[float, bool]]) -> None:
    now = 0.0
    hedging = Hedging(lambda: now)
    hedged = 0
    for asked, (seconds, other_is_free) in enumerate(waits, 1):
        wait = hedging.begin("m")
        assert wait.after_s is None or (asked > 20 and wait.after_s >= 1.0)
        if wait.after_s is not None and seconds > wait.after_s and wait.may_hedge and other_is_free:
            wait.hedge()
            hedged += 1
        now += seconds
        wait.end()
        assert hedged <= asked / 20


def test_a_second_worker_is_asked_when_nineteen_of_twenty_had_begun() -> None:
    now = 0.0
    hedging = Hedging(lambda: now, least_s=0.1)
    for index in range(200):
        wait = hedging.begin("m")
        now += index % 100 / 100
        wait.end()
    assert hedging.begin("m").after_s == pytest.approx(0.95, abs=0.01)
    assert hedging.begin("other").after_s is None
