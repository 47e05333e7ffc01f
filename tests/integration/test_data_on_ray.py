"""`data clean --on ray` on a local cluster of two workers: the output of the local run, and nothing left running."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from chaccu.data.clean import clean_conversations
from chaccu.data.config import load_config
from chaccu.data.on_ray import judge_on_ray
from chaccu.errors import DataError

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")]

WORDS = ("snow", "tent", "stove", "rope", "boot", "glacier", "morning", "valley", "herd", "wool", "shear", "river", "stone")
# The list's path is relative to where the command runs.
CONFIG = """reader: auto
steps:
  - roles: {}
  - html: {}
  - refusals: {lists: [mine.yaml], rules: []}
  - length: {}
  - exact_duplicates: {}
  - near_duplicates: {}
"""
LIST = "rules:\n  - {name: speaks of a glacier boot, phrases: [glacier boot], of: answers, where: anywhere}\n"


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6,000 records (seven chunks) with faults of several kinds, duplicates far apart, and a cut at the end."""
    draw = random.Random(7)
    records: list[object] = []
    for number in range(6000):
        answer = " ".join(draw.choices(WORDS, k=40))
        if number % 9 == 0:
            answer = f"<p>{answer}</p><ul><li>{draw.choice(WORDS)}</li></ul>"
        turns = [
            {"from": "human", "value": f"Tell me of {' '.join(draw.choices(WORDS, k=6))}."},
            {"from": "gpt", "value": answer},
        ]
        records.append({"id": f"c{number}_0", "conversations": turns[1:] if number % 50 == 0 else turns})
    records[5000:5100] = [{"id": f"again{place}_0", "conversations": records[place]["conversations"]} for place in range(100)]  # type: ignore[index]
    records[17] = "no record"
    file = tmp_path_factory.mktemp("dump") / "dump.json"
    file.write_text(json.dumps(records)[:-40], encoding="utf-8")
    (file.parent / "clean.yaml").write_text(CONFIG, encoding="utf-8")
    (file.parent / "mine.yaml").write_text(LIST, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def expected(dump: Path) -> Iterator[dict[str, bytes]]:
    """The files of the local run; what runs in this process runs beside the dump."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(dump.parent)
        report = clean_conversations([str(dump)], Path("local/data"), load_config(Path("clean.yaml")))
        assert report.cuts
        assert set(report.dropped) == {"read", "roles", "refusals", "exact_duplicates"}
        yield read_folder(Path("local/data"))


def read_folder(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def start_clean(dump: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "chaccu.cli.main", "data", "clean", str(dump), "--config", "clean.yaml"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    options = ["--out", str(out), "--on", "ray", "--workers", "2"]
    return subprocess.Popen(
        [*command, *options], cwd=dump.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_judging(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All that the command started, once Ray's workers are there."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        names = [child.name() for child in family if child.is_running()]
        if any(name.startswith("ray::_judge") for name in names):
            return family
        time.sleep(0.05)
    raise AssertionError(f"no worker of Ray was seen: {process.communicate()}")


def list_alive(family: list[psutil.Process], within_s: float) -> list[str]:
    """The names of what is not gone within a time."""
    _, alive = psutil.wait_procs(family, timeout=within_s)
    return [process.name() for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_the_output_is_that_of_the_local_run(dump: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    process = start_clean(dump, tmp_path / "data")
    family = wait_for_judging(process)
    for child in family:
        for connection in child.net_connections(kind="inet") if child.is_running() else ():
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip.removeprefix("::ffff:") in ("127.0.0.1", "::1"), child.name()
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert read_folder(tmp_path / "data") == expected
    assert list_alive(family, within_s=10) == []


def test_ctrl_c_leaves_nothing(dump: Path, tmp_path: Path) -> None:
    process = start_clean(dump, tmp_path / "data")
    family = wait_for_judging(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list_alive(family, within_s=10) == []
    assert list(tmp_path.iterdir()) == []


def test_kill_leaves_no_cluster_and_no_worker(dump: Path, tmp_path: Path) -> None:
    process = start_clean(dump, tmp_path / "data")
    family = wait_for_judging(process)
    process.kill()
    process.wait(timeout=10)
    # Ray's agents look whether their node is alive with a patience of their own.
    rest = [child for child in family if child.is_running() and "Agent" not in child.name()]
    assert list_alive(rest, within_s=30) == []
    for agent in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            agent.kill()
    assert not (tmp_path / "data").exists()


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as one that uses Ray already."""
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_connection_that_is_there_is_used_and_stays(
    dump: Path, expected: dict[str, bytes], tmp_path: Path, connected: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    config = load_config(Path("clean.yaml"))
    clean_conversations([str(dump)], tmp_path / "data", config, judging=judge_on_ray(2))
    assert read_folder(tmp_path / "data") == expected
    monkeypatch.setattr("chaccu.data.on_ray.library_versions", lambda *names: {"chaccu": "0.0"})
    with pytest.raises(DataError, match=r"on node .+: chaccu is .+ there and 0\.0 here"):
        clean_conversations([str(dump)], tmp_path / "other", config, judging=judge_on_ray(2))
    assert not (tmp_path / "other").exists()
    assert ray.is_initialized()
