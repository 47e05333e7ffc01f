from __future__ import annotations

import pytest

from chaccu.client import AccessDeniedError, AnswerTimeoutError, ChatError, LimitReachedError, ServerFailedError
from chaccu.judge.retry import RetryPolicy

POLICY = RetryPolicy(tries=4, first_wait_s=1.0, longest_wait_s=3.0, patience_s=100.0)


def test_waits_double_up_to_the_longest_and_end() -> None:
    error = ServerFailedError("down")
    assert [POLICY.wait_s(error, tried, 1.0) for tried in (1, 2, 3, 4)] == [1.0, 2.0, 3.0, None]


def test_jitter_takes_up_to_half_of_a_wait() -> None:
    assert [POLICY.wait_s(AnswerTimeoutError("silent"), 2, draw) for draw in (0.0, 0.5, 1.0)] == [1.0, 1.5, 2.0]


@pytest.mark.parametrize(("asked_s", "waits"), [(7.0, 7.5), (0.0, 0.5), (100.0, 100.5), (101.0, None)])
def test_what_the_server_asks_for_is_the_least_wait(asked_s: float, waits: float | None) -> None:
    assert POLICY.wait_s(LimitReachedError("slow down", retry_after_s=asked_s), 1, 0.5) == waits


@pytest.mark.parametrize("error", [AccessDeniedError("no key"), ChatError("something")])
def test_what_does_not_pass_is_not_sent_again(error: ChatError) -> None:
    assert POLICY.wait_s(error, 1, 0.5) is None
