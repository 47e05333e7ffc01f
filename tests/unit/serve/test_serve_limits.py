"""Limits of keys, on a clock of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaccu.serve.gateway.access.keys import KeyFile
from chaccu.serve.gateway.access.limits import Limits, Meter, TokenBucket
from chaccu.serve.gateway.config import GatewayConfig
from chaccu.serve.gateway.errors import ApiError, bad_request
from chaccu.serve.gateway.http.admission import Admission, estimate_tokens
from chaccu.serve.gateway.http.metrics import GatewayMetrics
from chaccu.serve.gateway.workers.registry import WorkerRegistry


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@given(
    per_minute=st.integers(1, 100_000),
    steps=st.lists(st.tuples(st.floats(0, 100), st.integers(1, 200_000)), max_size=40),
)
def test_no_more_is_given_than_a_bucket_and_what_flowed_in(per_minute: int, steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    bucket = TokenBucket(per_minute, clock)
    taken = 0
    for pause_s, amount in steps:
        clock.now_s += pause_s
        if not bucket.wait_s(amount):
            bucket.take(min(amount, per_minute))
            taken += min(amount, per_minute)
        assert taken <= per_minute + (clock.now_s - 1000) * per_minute / 60 + 1e-3 * len(steps)
        wait_s = bucket.wait_s(amount)
        clock.now_s += wait_s
        assert not bucket.wait_s(amount), "the wait that is told is long enough"


def refusal(meter: Meter, tokens: int = 1) -> ApiError:
    before = meter.headers(), meter.under_way
    with pytest.raises(ApiError) as refused:
        meter.begin(tokens)
    assert (meter.headers(), meter.under_way) == before, "a refused request takes nothing"
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    return refused.value


def test_requests_a_minute() -> None:
    clock = Clock()
    meter = Meter(Limits(requests_per_minute=3), clock)
    for _ in range(3):
        meter.end(meter.begin(5), 5)
    error = refusal(meter)
    assert (error.kind, error.headers["retry-after"]) == ("requests", "20")
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    assert error.headers["x-ratelimit-reset-requests"] == "60.000s"
    clock.now_s += 20
    meter.end(meter.begin(5), 5)
    refusal(meter)


def test_tokens_are_put_right_at_the_end_and_debts_are_paid_first() -> None:
    clock = Clock()
    meter = Meter(Limits(tokens_per_minute=600), clock)
    reserved = meter.begin(100)
    assert dict(meter.headers())[b"x-ratelimit-remaining-tokens"] == b"500"
    meter.end(reserved, 20)
    assert dict(meter.headers())[b"x-ratelimit-remaining-tokens"] == b"580"
    meter.end(meter.begin(10), 780)
    error = refusal(meter)
    assert (error.kind, error.headers["retry-after"]) == ("tokens", "21")
    clock.now_s += 20.1
    meter.end(meter.begin(1), None)


def test_an_estimate_beyond_a_minute_waits_for_a_full_bucket_and_takes_no_more() -> None:
    clock = Clock()
    meter = Meter(Limits(tokens_per_minute=60), clock)
    assert meter.begin(10**9) == 60
    assert refusal(meter, 10**9).headers["retry-after"] == "60"
    clock.now_s += 60
    meter.begin(10**9)


def test_requests_at_once() -> None:
    meter = Meter(Limits(concurrent=2), Clock())
    assert meter.begin(1) == meter.begin(1) == 0
    assert "2 requests of this key are under way" in refusal(meter).message
    meter.end(0, 5)
    meter.begin(1)
    assert meter.headers() == []


def test_changed_limits_hold_at_once_and_keep_what_is_under_way() -> None:
    meter = Meter(Limits(), Clock())
    for _ in range(5):
        meter.begin(10)
    meter.change(Limits(concurrent=5))
    refusal(meter)
    meter.end(0, 10)
    meter.begin(1)


def test_estimates() -> None:
    assert [estimate_tokens(400, None), estimate_tokens(400, 50)] == [100, 150]


async def test_an_admitted_request_is_counted_until_it_is_closed_once(tmp_path: Path) -> None:
    clock, metrics = Clock(), GatewayMetrics()
    file = KeyFile(tmp_path / "keys.json")
    _, key = file.create("alice", models=["m"], limits=Limits(concurrent=1, tokens_per_minute=100))
    admission = Admission(GatewayConfig(keys=file.path), metrics, clock)
    with pytest.raises(ApiError, match="may not use"):
        admission.admit(key, "other", 10)
    admitted = admission.admit(key, "m", 10)
    with pytest.raises(ApiError, match="under way"):
        admission.admit(key, "m", 10)
    admitted.use(3, 4)
    admitted.close(200)
    admitted.close(200)
    with pytest.raises(ApiError, match="x"):
        async with admission.admitted(key, "m", 50):
            raise bad_request("x")
    async with admission.admitted(key, "m", 5) as third:
        assert dict(third.headers)[b"x-ratelimit-remaining-tokens"] == b"88"
    text = metrics.render(WorkerRegistry(clock)).decode()
    for status, count in (("200", 2), ("400", 1), ("429", 1)):
        assert f'chaccu_key_requests_total{{key="{key.id}",status="{status}"}} {count}.0' in text
    assert f'chaccu_key_tokens_total{{key="{key.id}",kind="completion"}} 4.0' in text


def test_without_keys_nothing_is_counted() -> None:
    admission = Admission(GatewayConfig(), GatewayMetrics(), Clock())
    for _ in range(1000):
        assert admission.admit(None, "m", 10**9).headers == []
