"""Every command explains itself, and the help is quick."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from chaccu.cli.main import app

ROOT = typer.main.get_command(app)
COLD_START_S = 0.3


def list_commands(command: Any, name: str = "chaccu") -> Iterator[tuple[str, Any]]:
    """Every command and group below `command`, by its full name."""
    yield name, command
    for child_name, child in getattr(command, "commands", {}).items():
        yield from list_commands(child, f"{name} {child_name}")


COMMANDS = dict(list_commands(ROOT))
LEAVES = {name: command for name, command in COMMANDS.items() if not getattr(command, "commands", {})}


def test_the_walk_finds_the_commands() -> None:
    assert {"chaccu doctor", "chaccu rank", "chaccu serve", "chaccu format list", "chaccu data clean"} <= LEAVES.keys()
    assert not [name for name, command in COMMANDS.items() if command.hidden]


@pytest.mark.parametrize("name", COMMANDS)
def test_it_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert len((command.help or "").split()) >= 3, f"{name} needs a sentence of help"
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name} does not explain {parameter.name}"


@pytest.mark.parametrize("name", LEAVES)
def test_it_has_an_example_of_itself(name: str) -> None:
    epilog = LEAVES[name].epilog or ""
    assert epilog.startswith("Example: "), f"{name} needs an epilog with an Example"
    assert name in epilog


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_printed(name: str) -> None:
    result = CliRunner().invoke(app, [*name.split()[1:], "--help"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    if name in LEAVES:
        assert "Example: " in result.stdout


def test_help_starts_cold_within_the_limit() -> None:
    command = [sys.executable, "-m", "chaccu.cli.main", "--help"]
    took_s = []
    for _ in range(5):
        began_s = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        took_s.append(time.perf_counter() - began_s)
    assert min(took_s) < COLD_START_S, f"best of {[round(one, 3) for one in took_s]}"
