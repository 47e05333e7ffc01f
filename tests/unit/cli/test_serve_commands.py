"""The serve commands' help and wrong uses, without starting anything."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from chaccu.cli import serve
from chaccu.errors import ChaccuError, EngineError, MissingDependencyError, UsageError

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
        (["worker", "--model", "scripted:a", "--gateway", "h", "--adapter", "x"], UsageError, "'x' names no adapter"),
        (["worker", "--model", "scripted:a", "--gateway", "h", "--adapter", "a=/x"], UsageError, "be served as 'a'"),
        (["worker", "--model", "scripted:a", "--gateway", "h", "--adapter", "x=/x"], UsageError, "scripted loads no adapters"),
        (["worker", "--model", "scripted:a", "--gateway", "h", "--allow-load", "."], UsageError, "scripted loads no adapters"),
        (["serve", "scripted:a", "scripted:b", "--adapter", "x=/x"], UsageError, "over which one?"),
        (["serve", "scripted:a", "--adapter", "x=no/such"], EngineError, "no/such holds no LoRA adapter"),
        (["gateway", "--upstream", "nothing"], UsageError, "is no upstream"),
        (["gateway", "--otlp", "localhost:4318"], UsageError, "is no URL of a collector"),
    ],
)
def test_wrong_uses_are_clear_errors(arguments: list[str], error: type[ChaccuError], text: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, error)
    assert text in str(result.exception)


@pytest.mark.parametrize("command", [["gateway"], ["worker", "--model", "scripted:a", "--gateway", "h"]])
def test_spans_need_their_library(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    result = CliRunner().invoke(app, [*command, "--otlp", "http://127.0.0.1:9"])
    assert isinstance(result.exception, MissingDependencyError)
    assert "pip install 'chaccu[otel]'" in str(result.exception)


def test_without_a_collector_nothing_of_opentelemetry_is_imported() -> None:
    rooms = "chaccu.serve.gateway, chaccu.serve.worker, chaccu.serve.tracing"
    found = f"import sys, {rooms}; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    assert subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True).stdout.strip() == "[]"
