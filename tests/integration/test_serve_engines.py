"""Workers whose engine is another program, behind a gateway: the program dies, the worker dies, the client sees one answer."""

from __future__ import annotations

import json
import time
from pathlib import Path

import openai
import pytest

from chaccu.engine.scripted import build_byte_backend
from chaccu.testing.fake_completions import FakeCompletions, write_fake_vllm
from chaccu.testing.processes import start_command, start_gateway, start_worker, wait_until

TEXT = "one two three four five six seven eight"
SPEC = f"scripted:parrot?text={TEXT}&tokens_per_s=60"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    build_byte_backend().save(str(folder / "tokenizer.json"))
    return folder


def ask(url: str, model: str) -> tuple[str, int]:
    """The streamed answer and its completion tokens."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Count."}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return text, next(chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_answer_goes_on_when_vllm_dies_and_nothing_outlives_a_killed_worker(tmp_path: Path, model: Path) -> None:
    program = write_fake_vllm(tmp_path, SPEC)
    pids_file, died = tmp_path / "pids", tmp_path / "died"
    options = ["--engine", "vllm", "--vllm-python", str(program), "--format", "chatml", "--", "--pids", str(pids_file)]
    with (
        start_gateway(tmp_path) as gateway,
        start_worker(tmp_path, gateway, str(model), *options, "--die-once", str(died)) as worker,
    ):
        first = json.loads(pids_file.read_text())
        # vLLM dies after three words; the worker leaves, starts it again and comes back, and the answer goes on.
        assert ask(gateway.url, "tiny") == (TEXT, len(TEXT.split()))
        assert died.exists()
        assert "has lost its engine and leaves" in worker.log
        second = json.loads(pids_file.read_text())
        assert first != second
        assert [is_alive(pid) for pid in first + second] == [False, False, True, True]
        worker.kill()
        deadline_s = time.monotonic() + 5
        while any(map(is_alive, second)):
            assert time.monotonic() < deadline_s, "vLLM outlives its worker"
            time.sleep(0.02)


def test_a_worker_whose_vllm_cannot_start_says_why_and_ends(tmp_path: Path, model: Path) -> None:
    program = write_fake_vllm(tmp_path, SPEC)
    arguments = ["worker", "--model", str(model), "--gateway", "http://127.0.0.1:9", "--engine", "vllm", "--format", "chatml"]
    worker = start_command(tmp_path, [*arguments, "--vllm-python", str(program), "--", "--fail-at-start"])
    assert worker.wait(20) == 1
    assert "chaccu: vLLM ended with exit code 1 before it was ready" in worker.log
    assert "no kernel image" in worker.log
    worker = start_command(tmp_path, [*arguments[:-4], "--model", "scripted:a", "--", "--fail-at-start"])
    assert worker.wait(20) == 2
    assert "is a flag for vLLM, and the engine is scripted" in worker.log


def test_a_worker_beside_a_server_leaves_with_it_and_comes_back(tmp_path: Path) -> None:
    with start_gateway(tmp_path, "--rejoin-wait", "0.2") as gateway:
        with FakeCompletions(SPEC, takes_ids=False) as server:
            worker = start_worker(tmp_path, gateway, "parrot", "--url", server.url, "--format", "gemma-3")
            assert ask(gateway.url, "parrot") == (TEXT, len(TEXT.split()))
            assert "<start_of_turn>user\nCount." in server.requests[-1]["prompt"]
        with worker:
            with pytest.raises(openai.APIStatusError) as caught:
                ask(gateway.url, "parrot")
            assert caught.value.status_code == 503
            wait_until(lambda: "next try in" in worker.log, worker, timeout_s=10)
            port = int(server.url.split(":")[2].partition("/")[0])
            with FakeCompletions(SPEC, takes_ids=False, port=port):
                wait_until(lambda: worker.log.count("worker ready") == 2, worker, timeout_s=20)
                assert ask(gateway.url, "parrot") == (TEXT, len(TEXT.split()))
