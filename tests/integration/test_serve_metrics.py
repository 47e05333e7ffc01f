"""What a real gateway's `/metrics` holds, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaccu.testing.fake_openai import FakeModel, FakeOpenAI
from chaccu.testing.processes import start_gateway, start_worker

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "chaccu.json"
NAME = re.compile(r"\b(?:vllm:|chaccu_|process_)\w+")


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """After two answers of a worker, one cut by its length, and one of an upstream."""
    folder = tmp_path_factory.mktemp("metrics")
    with FakeOpenAI({"up": FakeModel()}) as upstream:
        arguments = ("--upstream", f"up={upstream.url}/v1", "--log-conversations", str(folder / "log"))
        with (
            start_gateway(folder, *arguments) as gateway,
            start_worker(folder, gateway, "scripted:mine?text=one%20two%20three"),
        ):
            for fields in ({"model": "mine"}, {"model": "mine", "max_tokens": 2}, {"model": "up"}):
                body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], **fields}).encode()
                urllib.request.urlopen(f"{gateway.url}/v1/chat/completions", body, timeout=10).read()
            yield urllib.request.urlopen(f"{gateway.url}/metrics", timeout=10).read().decode()


def test_what_vllm_counts_has_its_names(metrics: str) -> None:
    for sample in (
        'vllm:request_success_total{finished_reason="stop",model_name="mine"} 1.0',
        'vllm:request_success_total{finished_reason="length",model_name="mine"} 1.0',
        'vllm:time_to_first_token_seconds_count{model_name="mine"} 2.0',
        'vllm:time_to_first_token_seconds_count{model_name="up"} 1.0',
        'vllm:e2e_request_latency_seconds_count{model_name="mine"} 2.0',
        'vllm:e2e_request_latency_seconds_count{model_name="up"} 1.0',
        'vllm:request_queue_time_seconds_count{model_name="mine"} 2.0',
        'vllm:num_requests_running{model_name="mine"} 0.0',
        'vllm:num_requests_running{model_name="up"} 0.0',
        'vllm:num_requests_waiting{model_name="mine"} 0.0',
        'chaccu_requests_total{model="up",status="200"} 1.0',
    ):
        assert f"\n{sample}\n" in metrics
    assert re.search(r'\nvllm:generation_tokens_total\{model_name="mine"\} [1-9]', metrics)
    assert re.search(r'\nvllm:prompt_tokens_total\{model_name="mine"\} [1-9]', metrics)
    # The one that asks; the worker's is none of a client.
    assert "\nchaccu_open_connections 1.0\n" in metrics


def test_the_dashboard_asks_for_what_there_is(metrics: str) -> None:
    there_is = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", metrics, re.MULTILINE):
        there_is |= {name + end for end in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked += [variable["query"] for variable in dashboard["templating"]["list"]]
    names = {name for query in asked for name in NAME.findall(query)}
    assert len(names) > 15
    assert names - there_is == set()
