"""vLLM as a child, by a stand-in: its start, its command line, its end with everything that it has started."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from chaccu.engine import (
    EngineLostError,
    EngineOptions,
    GenerationRequest,
    ModelSource,
    WatchedEngine,
    registry,
    resolve_model,
    vllm,
)
from chaccu.engine.guarded_child import GuardedChild
from chaccu.engine.scripted import build_byte_backend
from chaccu.engine.vllm import VllmEngine, find_vllm
from chaccu.errors import EngineError, MissingDependencyError
from chaccu.testing.fake_completions import write_fake_vllm


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    build_byte_backend().save(str(folder / "tokenizer.json"))
    return resolve_model(str(folder), chat_format="chatml")


def is_alive(pid: int) -> bool:
    """Zombies are not: whoever adopts an orphan may be slow to collect it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pids: list[int], timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline_s, f"alive after {timeout_s} s: {pids}"
        time.sleep(0.02)


async def load(source: ModelSource, program: Path, *arguments: str, **options: Any) -> VllmEngine:
    chosen = EngineOptions(program=str(program), arguments=arguments, **options)
    return await asyncio.to_thread(VllmEngine.load, source, chosen)


async def answer(engine: VllmEngine, adapter: str | None = None) -> str:
    request = GenerationRequest(id="r", prompt_ids=[65, 66, 67], max_tokens=40, adapter=adapter)
    return "".join([delta.text async for delta in engine.generate(request)])


async def test_a_child_that_dies_at_its_start_is_one_error_with_its_last_words(tmp_path: Path, source: ModelSource) -> None:
    program = write_fake_vllm(tmp_path, "scripted:a")
    with pytest.raises(EngineError, match=r"ended with exit code 1 before it was ready.*no kernel image for this device"):
        await load(source, program, "--fail-at-start")


async def test_flags_go_on_to_vllm_as_they_are(tmp_path: Path, source: ModelSource, caplog: pytest.LogCaptureFixture) -> None:
    program = write_fake_vllm(tmp_path, "scripted:a")
    with pytest.raises(EngineError, match="unrecognized arguments: --tensor-parallel-size 2"):
        await load(source, program, "--tensor-parallel-size", "2", context_tokens=99, slots=3)
    # What it says is seen while it starts.
    assert "--tensor-parallel-size" in caplog.text


async def test_its_own_adapters_are_known_and_asked_by_name(tmp_path: Path, source: ModelSource) -> None:
    program = write_fake_vllm(tmp_path, "scripted:a?text=yes")
    engine = await load(source, program, "--enable-lora", "--lora-modules", "law=/adapters/law", "prose=/adapters/prose")
    try:
        assert engine.info.adapters == ("law", "prose")
        assert await answer(engine, "law") == await answer(engine) == "yes"
        with pytest.raises(EngineError, match="the model poems does not exist"):
            await answer(engine, "poems")
    finally:
        await engine.close()


async def test_closing_ends_it_with_all_that_it_has_started(tmp_path: Path, source: ModelSource) -> None:
    program, pids_file = write_fake_vllm(tmp_path, "scripted:a?text=well"), tmp_path / "pids"
    engine = await load(source, program, "--pids", str(pids_file))
    assert isinstance(engine, WatchedEngine)
    engine.check()
    assert await answer(engine) == "well"
    pids = json.loads(pids_file.read_text())
    assert all(map(is_alive, pids))
    await engine.close()
    wait_until_dead(pids)


async def test_a_child_that_dies_in_mid_answer_is_a_lost_engine(tmp_path: Path, source: ModelSource) -> None:
    program, pids_file = write_fake_vllm(tmp_path, "scripted:a?tokens=30&tokens_per_s=200"), tmp_path / "pids"
    engine = await load(source, program, "--die-once", str(tmp_path / "died"), "--pids", str(pids_file))
    with pytest.raises(EngineLostError, match="connection to vLLM broke"):
        await answer(engine)
    wait_until_dead(json.loads(pids_file.read_text()))
    await asyncio.sleep(0.1)
    with pytest.raises(EngineLostError, match="exit code 9"):
        engine.check()
    await engine.close()


def test_a_child_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    # It ignores SIGTERM, and has a child of its own: only SIGKILL of the group ends them.
    stubborn = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(os.getpid(), child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = (
        "import sys, time\n"
        "from chaccu.engine import guarded_child\n"
        "guarded_child._GRACE_S = 0.2\n"
        f"guarded_child.GuardedChild([sys.executable, '-c', {stubborn!r}], {{}})\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        pids = [int(text) for text in process.stderr.readline().split()]
        assert all(map(is_alive, pids))
        process.kill()
    wait_until_dead(pids)


def test_a_child_that_cannot_be_started_says_so() -> None:
    child = GuardedChild(["/nowhere/vllm"], {})
    while child.exit_code is None:
        time.sleep(0.02)
    assert "/nowhere/vllm cannot be started: No such file" in child.last_words()
    child.close()


def test_the_program_is_a_python_or_an_executable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = write_fake_vllm(tmp_path, "scripted:a")
    monkeypatch.setenv("PATH", os.defpath)
    assert find_vllm() is None
    assert find_vllm(str(tmp_path / "none")) is None
    assert find_vllm(str(program)) == [str(program)]
    assert find_vllm(sys.executable) == [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_vllm() == [str(program)]


def test_auto_says_why_it_takes_vllm_or_does_not(tmp_path: Path, source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setattr(registry, "_has_cuda_gpu", lambda: False)
    assert registry.choose_engine(source)[1].endswith("there is no CUDA GPU for vllm")
    monkeypatch.setattr(registry, "_has_cuda_gpu", lambda: True)
    assert registry.choose_engine(source) == (
        "transformers",
        "it holds config.json with safetensors; vLLM is not installed",
    )
    program = write_fake_vllm(tmp_path, "scripted:a")
    chosen, reason = registry.choose_engine(source, program=str(program))
    assert (chosen, "vLLM" in reason) == ("vllm", True)
    with pytest.raises(MissingDependencyError, match="--vllm-python"):
        vllm.VllmEngine.load(source, EngineOptions())
    remote = resolve_model("m", chat_format="chatml", url="http://127.0.0.1:1/v1")
    assert registry.choose_engine(remote) == ("openai", "a server has the model")
    with pytest.raises(EngineError, match="needs --url"):
        registry.choose_engine(source, "openai")
