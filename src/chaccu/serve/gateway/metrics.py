"""`GatewayMetrics`: what the gateway counts, in Prometheus' text form.

Invariant: the only label a client can choose is a model's name, and unknown ones are counted together, so no request can grow
the set of series. Keys are counted by their ids, and only those that exist.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from chaccu.serve.gateway.conversation_log import ConversationLog
from chaccu.serve.gateway.race import AnswerEvent
from chaccu.serve.gateway.registry import WorkerRegistry

_FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


_ANSWER_EVENTS: dict[AnswerEvent, str] = {
    "continued": "Answers that another worker went on with, after one was lost or hung.",
    "retried": "Answers that another worker went on with, after an engine failed.",
    "paused": "Answers that were stopped for a while, because their client did not read them.",
    "hedged": "Answers that a second worker was asked for, because the first text took long.",
    "hedge_won": "Answers of which the second worker had the first text.",
}


class GatewayMetrics:
    """Counters of one gateway and of its `log`, if it has one; nothing is shared between two in one process."""

    def __init__(self, log: ConversationLog | None = None) -> None:
        self._registry = CollectorRegistry()
        if log is not None:
            self._registry.register(_LogCounts(log))
        self.requests = Counter("chaccu_requests", "Requests answered.", ["model", "status"], registry=self._registry)
        self.tokens = Counter("chaccu_generated_tokens", "Tokens generated.", ["model"], registry=self._registry)
        self._events: dict[AnswerEvent, Counter] = {
            event: Counter(f"chaccu_{event}", text, ["model"], registry=self._registry)
            for event, text in _ANSWER_EVENTS.items()
        }
        self.first_text_s = Histogram(
            "chaccu_first_text_seconds",
            "Time from a request to the first text of its answer.",
            ["model"],
            registry=self._registry,
            buckets=_FIRST_TOKEN_BUCKETS_S,
        )
        self._key_requests = Counter(
            "chaccu_key_requests", "Requests of an API key.", ["key", "status"], registry=self._registry
        )
        self._key_tokens = Counter("chaccu_key_tokens", "Tokens of an API key.", ["key", "kind"], registry=self._registry)
        self._waiting = Gauge("chaccu_waiting_requests", "Requests in the queue.", ["model"], registry=self._registry)
        self._workers = Gauge("chaccu_workers", "Workers that serve now.", ["model"], registry=self._registry)
        self._outstanding = Gauge(
            "chaccu_outstanding_requests", "Requests that workers have.", ["model"], registry=self._registry
        )
        # Finding a series by its labels costs more than counting does.
        self._requests_of = functools.cache(self.requests.labels)
        self._tokens_of = functools.cache(self.tokens.labels)
        self._first_texts_of = functools.cache(self.first_text_s.labels)
        self._key_requests_of = functools.cache(self._key_requests.labels)

    def count_request(self, model: str, status: int) -> None:
        """A request for `model` has been answered."""
        self._requests_of(model, status).inc()

    def count_event(self, model: str, event: AnswerEvent) -> None:
        """It has taken more than one worker to answer a request for `model`."""
        self._events[event].labels(model).inc()

    def count_answer(self, model: str, completion_tokens: int) -> None:
        """A worker's answer is complete."""
        self._tokens_of(model).inc(completion_tokens)

    def time_first_text(self, model: str, seconds: float) -> None:
        """The first text of an answer came `seconds` after its request."""
        self._first_texts_of(model).observe(seconds)

    def count_key(self, key_id: str, status: int, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """A request with this key has ended."""
        self._key_requests_of(key_id, status).inc()
        if prompt_tokens or completion_tokens:
            self._key_tokens.labels(key_id, "prompt").inc(prompt_tokens)
            self._key_tokens.labels(key_id, "completion").inc(completion_tokens)

    def render(self, workers: WorkerRegistry, waiting: Mapping[str, int] = MappingProxyType({})) -> bytes:
        """The text that Prometheus reads; `waiting`: requests in the queues, by model."""
        for model, count in waiting.items():
            self._waiting.labels(model).set(count)
        self._workers.clear()
        self._outstanding.clear()
        for status in workers.statuses():
            self._workers.labels(status.model).inc(0 if status.state in ("suspended", "lost") else 1)
            self._outstanding.labels(status.model).inc(0 if status.state == "lost" else status.outstanding)
        return generate_latest(self._registry)


class _LogCounts(Collector):
    """What the conversation log counts."""

    def __init__(self, log: ConversationLog) -> None:
        self._log = log

    def collect(self) -> Iterator[CounterMetricFamily]:
        counts = CounterMetricFamily("chaccu_logged_answers", "Answers for the conversation log.", labels=["result"])
        counts.add_metric(["written"], self._log.written)
        counts.add_metric(["lost"], self._log.lost)
        yield counts
