"""`GatewayMetrics`: what the gateway counts, in Prometheus' text form.

What vLLM counts too has vLLM's name and labels, so that its dashboards and scalers work; what it does not count begins with
`chaccu_`.

Invariant: the only label a client can choose is a model's name, and unknown ones are counted together, so no request can grow
the set of series. Keys are counted by their ids, and only those that exist.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from chaccu.serve.gateway.access.shared_limits import SharedLimits
from chaccu.serve.gateway.records.conversation_log import ConversationLog
from chaccu.serve.gateway.upstreams.upstream import UpstreamRelay
from chaccu.serve.gateway.workers.race import AnswerEvent
from chaccu.serve.gateway.workers.registry import WorkerRegistry

_FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ANSWER_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_FIRST_ERROR = 400

_ANSWER_EVENTS: dict[AnswerEvent, str] = {
    "continued": "Answers that another worker or upstream went on with, after one was lost or hung.",
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
        ProcessCollector(registry=self._registry)
        self.requests = Counter("chaccu_requests", "Requests answered.", ["model", "status"], registry=self._registry)
        self._events: dict[AnswerEvent, Counter] = {
            event: Counter(f"chaccu_{event}", text, ["model"], registry=self._registry)
            for event, text in _ANSWER_EVENTS.items()
        }
        self._prompt_tokens = self._vllm_counter("prompt_tokens", "Tokens of prompts that workers have answered.")
        self._generation_tokens = self._vllm_counter("generation_tokens", "Tokens that workers have generated.")
        self._successes = self._vllm_counter(
            "request_success", "Answers of workers by what ended them; abort: the client left.", "finished_reason"
        )
        self._first_text_s = self._vllm_histogram(
            "time_to_first_token_seconds", "From a request to the first text of its answer.", _FIRST_TOKEN_BUCKETS_S
        )
        self._answer_s = self._vllm_histogram(
            "e2e_request_latency_seconds", "From a request to the end of its answer, where that is no error.", _ANSWER_BUCKETS_S
        )
        self._queue_s = self._vllm_histogram(
            "request_queue_time_seconds", "In the queue before a worker.", _FIRST_TOKEN_BUCKETS_S
        )
        self._waiting = self._vllm_gauge("num_requests_waiting", "Requests in the queue.")
        self._running = self._vllm_gauge("num_requests_running", "Requests that workers and upstreams have.")
        self._key_requests = Counter(
            "chaccu_key_requests", "Requests of an API key.", ["key", "status"], registry=self._registry
        )
        self._key_tokens = Counter("chaccu_key_tokens", "Tokens of an API key.", ["key", "kind"], registry=self._registry)
        self._workers = Gauge("chaccu_workers", "Workers that serve now.", ["model"], registry=self._registry)
        self._connections = Gauge("chaccu_open_connections", "Open connections of clients.", registry=self._registry)
        # Finding a series by its labels costs more than counting does.
        self._requests_of = functools.cache(self.requests.labels)
        self._first_texts_of = functools.cache(self._first_text_s.labels)
        self._answers_of = functools.cache(self._answer_s.labels)
        self._key_requests_of = functools.cache(self._key_requests.labels)

    def watch_upstreams(self, upstreams: UpstreamRelay) -> None:
        """Show what `upstreams` count."""
        self._registry.register(_UpstreamCounts(upstreams))

    def watch_shared_limits(self, shared: SharedLimits) -> None:
        """Show what `shared` counts."""
        self._registry.register(_SharedCounts(shared))

    def count_request(self, model: str, status: int, seconds: float) -> None:
        """A request for `model` has been answered, or its client left, after `seconds`."""
        self._requests_of(model, status).inc()
        if status < _FIRST_ERROR:
            self._answers_of(model).observe(seconds)

    def count_event(self, model: str, event: AnswerEvent) -> None:
        """It has taken more than one worker to answer a request for `model`."""
        self._events[event].labels(model).inc()

    def count_answer(self, model: str, reason: str, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """A worker's answer has ended, with this finish reason or `abort`."""
        self._successes.labels(model, reason).inc()
        self._prompt_tokens.labels(model).inc(prompt_tokens)
        self._generation_tokens.labels(model).inc(completion_tokens)

    def time_first_text(self, model: str, seconds: float) -> None:
        """The first text of an answer came `seconds` after its request."""
        self._first_texts_of(model).observe(seconds)

    def time_queue(self, model: str, seconds: float) -> None:
        """A request has had its turn after `seconds`."""
        self._queue_s.labels(model).observe(seconds)

    def count_key(self, key_id: str, status: int, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """A request with this key has ended."""
        self._key_requests_of(key_id, status).inc()
        if prompt_tokens or completion_tokens:
            self._key_tokens.labels(key_id, "prompt").inc(prompt_tokens)
            self._key_tokens.labels(key_id, "completion").inc(completion_tokens)

    def render(
        self,
        workers: WorkerRegistry,
        waiting: Mapping[str, int] = MappingProxyType({}),
        relayed: Mapping[str, int] = MappingProxyType({}),
        connections: int = 0,
    ) -> bytes:
        """The text that Prometheus reads; `waiting`: requests in the queues, `relayed`: those that upstreams have, by model."""
        self._connections.set(connections)
        for gauge in (self._waiting, self._workers, self._running):
            gauge.clear()
        for model, count in relayed.items():
            self._running.labels(model).set(count)
        for status in workers.statuses():
            self._workers.labels(status.model).inc(0 if status.state in ("suspended", "lost") else 1)
            self._running.labels(status.model).inc(0 if status.state == "lost" else status.outstanding)
            # A model that nobody has waited for has a queue too: what scales workers by it must find it.
            self._waiting.labels(status.model).set(0)
        for model, count in waiting.items():
            self._waiting.labels(model).set(count)
        return generate_latest(self._registry)

    def _vllm_counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"vllm:{name}", text, ["model_name", *labels], registry=self._registry)

    def _vllm_gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, ["model_name"], registry=self._registry)

    def _vllm_histogram(self, name: str, text: str, buckets_s: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, ["model_name"], registry=self._registry, buckets=buckets_s)


class _LogCounts(Collector):
    """What the conversation log counts."""

    def __init__(self, log: ConversationLog) -> None:
        self._log = log

    def collect(self) -> Iterator[CounterMetricFamily]:
        counts = CounterMetricFamily("chaccu_logged_answers", "Answers for the conversation log.", labels=["result"])
        counts.add_metric(["written"], self._log.written)
        counts.add_metric(["lost"], self._log.lost)
        yield counts


class _UpstreamCounts(Collector):
    """What the upstreams count."""

    def __init__(self, upstreams: UpstreamRelay) -> None:
        self._upstreams = upstreams

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        labels = ["model", "upstream"]
        requests = CounterMetricFamily("chaccu_upstream_requests", "Requests given to an upstream.", labels=labels)
        failures = CounterMetricFamily("chaccu_upstream_failures", "Requests that it failed.", labels=labels)
        continued = CounterMetricFamily("chaccu_upstream_continued", "Answers of others it went on with.", labels=labels)
        ready = GaugeMetricFamily("chaccu_upstream_ready", "1 while it is used, 0 while it is left out.", labels=labels)
        outstanding = GaugeMetricFamily("chaccu_upstream_outstanding_requests", "Requests that it has.", labels=labels)
        for status in self._upstreams.statuses():
            who = [status.model, status.upstream]
            requests.add_metric(who, status.requests)
            failures.add_metric(who, status.failures)
            continued.add_metric(who, status.continued)
            ready.add_metric(who, 1 if status.state == "ready" else 0)
            outstanding.add_metric(who, status.outstanding)
        yield from (requests, failures, continued, ready, outstanding)


class _SharedCounts(Collector):
    """How the state fares that gateways share."""

    def __init__(self, shared: SharedLimits) -> None:
        self._shared = shared

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        shared = self._shared
        yield CounterMetricFamily("chaccu_shared_state_exchanges", "Answers of the shared state.", value=shared.exchanges)
        yield CounterMetricFamily("chaccu_shared_state_failures", "Times that it did not answer.", value=shared.failures)
        yield GaugeMetricFamily("chaccu_shared_state_up", "1 while it answers, 0 while it does not.", value=int(shared.is_up))
