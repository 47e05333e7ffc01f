"""The serve commands' help and wrong uses, without starting anything."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from chaccu.cli import serve
from chaccu.errors import ChaccuError, EngineError, UsageError

app = typer.Typer()
serve.register(app)


@pytest.mark.parametrize("command", ["serve", "gateway", "worker"])
def test_help_has_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: chaccu {command}" in result.output


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (["serve", "no/such/model"], EngineError, "there is no model at no/such/model"),
        (["serve", "scripted:a", "scripted:a"], UsageError, "two models would be served as 'a'"),
        (["serve", "scripted:a", "scripted:b", "--name", "x"], UsageError, "1 --name for 2 models"),
        (["serve", "scripted:a", "--format", "vicunna"], UsageError, "there is no chat format 'vicunna'"),
        (["worker", "--model", "scripted:a", "--gateway", "ftp://h"], UsageError, "is no gateway URL"),
        (
            ["worker", "--model", "scripted:a", "--gateway", "h", "--engine", "lamacpp"],
            UsageError,
            "there is no engine 'lamacpp'",
        ),
        (["worker", "--model", "scripted:a?tokens=x", "--gateway", "h"], UsageError, "wrong value"),
        (["gateway", "--upstream", "nothing"], UsageError, "is no upstream"),
    ],
)
def test_wrong_uses_are_clear_errors(arguments: list[str], error: type[ChaccuError], text: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, error)
    assert text in str(result.exception)
