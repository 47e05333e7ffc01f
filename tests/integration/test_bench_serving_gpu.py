"""The GPU serving bench on a processor: a real gateway and real workers before a tiny model, and a stand-in for vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chaccu.testing.fake_completions import write_fake_vllm

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench_serving_gpu.py"


def run(*words: str, out: Path) -> subprocess.CompletedProcess[str]:
    sizes = ["--shapes", "tiny", "--prompt-tokens", "24", "--max-tokens", "16", "--limit-s", "60"]
    command = [sys.executable, str(BENCH), *sizes, "--out", str(out), "--commit", "abc1234", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_engines_are_measured_bare_and_behind_the_gateway(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("torch", reason="torch is not installed")
    vllm = write_fake_vllm(tmp_path, "scripted:parrot?tokens=64")
    out = tmp_path / "out.json"
    ended = run("--engines", "transformers", "vllm", "--vllm-python", str(vllm), "--clients", "1", "3", out=out)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert [(one["engine"], one["way"], one["clients"], one["tokens"]) for one in runs] == [
        (engine, way, clients, questions * 16)
        for engine in ("transformers", "vllm")
        for way in ("bare", "gateway")
        for clients, questions in ((1, 4), (3, 6))
    ]
    for one in runs:
        assert 0 < one["ttft_p50_ms"] <= one["ttft_p99_ms"] <= 1000 * one["seconds"]
        assert one["tokens_per_s"] == pytest.approx(one["tokens"] / one["seconds"], rel=0.05)
        assert (one["shape"], one["commit"], one["versions"]["transformers"] is None) == ("tiny", "abc1234", False)
    assert len([line for line in ended.stdout.splitlines() if line.startswith("| tiny | ")]) == len(runs)


def test_a_part_that_fails_is_noted_and_gives_way_to_figures(tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out.json"
    (scratch / "tiny").mkdir(parents=True)  # a model that is none
    failing = write_fake_vllm(tmp_path, "scripted:parrot?tokens=4")  # answers that end too early
    ended = run("--engines", "vllm", "--vllm-python", str(failing), "--clients", "1", "--scratch", str(scratch), out=out)
    assert ended.returncode == 1
    bare, gateway = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert (bare["way"], gateway["way"]) == ("bare", "gateway")
    assert "1 answers of 8 tokens had 4 in all" in bare["last_lines"][0]
    assert "config.json" in "".join(gateway["last_lines"])
    assert str(tmp_path) not in json.dumps([bare, gateway])
    whole = write_fake_vllm(tmp_path, "scripted:parrot?tokens=64")
    run("--engines", "vllm", "--vllm-python", str(whole), "--clients", "1", "--scratch", str(scratch), out=out)
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert [(one["way"], "failed" in one) for one in runs] == [("bare", False), ("gateway", True)]
