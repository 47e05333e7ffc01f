"""The commands as a user meets them: good starts, wrong starts, ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import openai
import pytest

from chaccu.testing.processes import list_workers, start_command, start_gateway, start_serve, start_worker, wait_until


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in listed.split()]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_serve_runs_gateway_and_workers_and_ctrl_c_ends_them_all(tmp_path: Path) -> None:
    with start_serve(tmp_path, "scripted:one", "scripted:two?text=yes", "--name", "first", "--name", "second") as serve:
        client = openai.OpenAI(base_url=f"{serve.url}/v1", api_key="none")
        assert {model.id for model in client.models.list()} == {"first", "second"}
        asked = [{"role": "user", "content": "well?"}]
        assert client.chat.completions.create(model="second", messages=asked).choices[0].message.content == "yes"
        children = children_of(serve.pid)
        assert len(children) == 3
        began = time.monotonic()
        serve.signal(signal.SIGINT)
        assert serve.wait() == 130
        assert time.monotonic() - began < 2, "nothing was under way"
        assert not any(is_running(child) for child in children)
        assert not list(tmp_path.glob("*.url"))


def test_serve_starts_a_dead_worker_again(tmp_path: Path) -> None:
    with start_serve(tmp_path, "scripted:one") as serve:
        (worker,) = [child for child in children_of(serve.pid) if f"-{child}-" in str(list_workers(serve))]
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: {w["state"] for w in list_workers(serve)} == {"ready", "lost"}, serve, timeout_s=10)
        assert "starting it again" in serve.log


@pytest.mark.parametrize("command", [["serve"], ["worker", "--gateway", "http://127.0.0.1:1", "--model"]])
def test_a_model_that_is_not_there_is_one_error(tmp_path: Path, command: list[str]) -> None:
    service = start_command(tmp_path, [*command, str(tmp_path / "nowhere")])
    assert service.wait() == 1
    assert service.log == f"chaccu: there is no model at {tmp_path / 'nowhere'}.\n  try: check the path\n"


@pytest.mark.parametrize("command", [["gateway"], ["serve", "scripted:a"]])
def test_a_busy_port_is_one_error(tmp_path: Path, command: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        service = start_command(tmp_path, [*command, "--port", port])
        assert service.wait() == 1
        assert service.log.startswith(f"chaccu: port {port} on 127.0.0.1 is in use.\n  try: --port with another number")
        assert "Traceback" not in service.log


def test_a_gateway_starts_quickly_and_ends_in_order(tmp_path: Path) -> None:
    began = time.monotonic()
    with start_gateway(tmp_path) as gateway:
        assert time.monotonic() - began < 3
        assert gateway.log == f"gateway ready at {gateway.url}\n"
        assert gateway.stop() == 0
    assert not list(tmp_path.glob("*.url"))


def test_a_worker_needs_the_join_token(tmp_path: Path) -> None:
    with start_gateway(tmp_path, "--join-token", "open sesame") as gateway:
        stranger = start_command(
            tmp_path, ["worker", "--model", "scripted:a", "--gateway", gateway.url, "--join-token", "guess"]
        )
        assert stranger.wait() == 1
        assert "its join token is not the gateway's" in stranger.log
        assert list_workers(gateway) == []
        with start_worker(tmp_path, gateway, "scripted:a", "--join-token", "open sesame"):
            assert [worker["model"] for worker in list_workers(gateway)] == ["a"]


def test_an_open_gateway_without_keys_or_without_a_token_is_refused(tmp_path: Path) -> None:
    service = start_command(tmp_path, ["gateway", "--host", "0.0.0.0", "--port", "0"])
    assert service.wait() == 2
    assert "--keys" in service.log
    service = start_command(tmp_path, ["gateway", "--host", "0.0.0.0", "--port", "0", "--open"])
    assert service.wait() == 2
    assert "CHACCU_JOIN_TOKEN" in service.log


def test_a_worker_that_waits_for_its_gateway_ends_on_ctrl_c(tmp_path: Path) -> None:
    service = start_command(tmp_path, ["worker", "--model", "scripted:a", "--gateway", "http://127.0.0.1:9"])
    wait_until(lambda: "not reachable" in service.log, service, timeout_s=20)
    service.signal(signal.SIGINT)
    assert service.wait() == 130
    assert "Traceback" not in service.log
