"""`chaccu chat` as scripts use it, its commands, and its wrong uses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from chaccu.cli import chat
from chaccu.cli.terminal_chat import TerminalChat
from chaccu.client import Sampling, WorkerLostError
from chaccu.errors import StorageError, UsageError
from chaccu.testing.fake_openai import FakeModel, FakeOpenAI


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI({"tuned": FakeModel(answer=lambda messages: f"You said {messages[-1]['content']}.")}) as fake:
        yield fake


def run(server: FakeOpenAI, lines: str, *options: str) -> tuple[str, str, BaseException | None]:
    """stdout, stderr and the error of `chaccu chat` with `lines` on its stdin."""
    app = typer.Typer(rich_markup_mode=None)
    chat.register(app)
    result = CliRunner().invoke(app, ["--url", server.url, *options], input=lines)
    return result.stdout, result.stderr, result.exception


def test_each_line_is_answered_with_what_went_before(server: FakeOpenAI) -> None:
    out, _, error = run(server, "one\n\ntwo\n", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "5")
    assert error is None
    assert out == "You said one.\nYou said two.\n"
    assert [message["content"] for message in server.requests[-1]["messages"]] == ["Be brief.", "one", "You said one.", "two"]
    assert (server.requests[-1]["temperature"], server.requests[-1]["max_tokens"]) == (0.0, 5)


def test_commands_change_what_is_sent(server: FakeOpenAI, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = ["one", "/retry", "/system Be kind.", f"/save '{saved}'", f"/save {saved}", "/reset", "two", "/quit", "three"]
    out, said, error = run(server, "\n".join(lines))
    assert error is None
    assert out == "You said one.\nYou said one.\nYou said two.\n"
    assert len(server.requests[1]["messages"]) == 1
    assert [message["content"] for message in server.requests[2]["messages"]] == ["Be kind.", "two"]
    written = json.loads(saved.read_text())
    assert written["system"] == "Be kind."
    assert [message["role"] for message in written["messages"]] == ["user", "assistant"]
    assert f"saved 2 messages to {saved}" in said


def test_many_lines_and_slashes_are_messages(server: FakeOpenAI) -> None:
    run(server, '"""\nfirst\n\nsecond\n"""\n/etc/hosts is a file\n//help\n')
    assert [body["messages"][-1]["content"] for body in server.requests] == [
        "first\n\nsecond",
        "/etc/hosts is a file",
        "/help",
    ]


def test_control_characters_do_not_reach_the_terminal(server: FakeOpenAI) -> None:
    server.models = {"tuned": FakeModel(answer="a\x1b[2J\x07b\tc\x9b")}
    assert run(server, "x\n")[0] == "a[2Jb\tc\n"


def test_a_failure_ends_a_script_and_keeps_what_came(server: FakeOpenAI) -> None:
    server.models = {"tuned": FakeModel(answer="one two three", failure="worker_lost", fail_after=2)}
    out, _, error = run(server, "x\ny\n")
    assert out == "one two\n"
    assert type(error) is WorkerLostError
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("lines", "options", "kind", "words"),
    [
        ("/rest\n", (), UsageError, "did you mean 'reset'"),
        ("/retry\n", (), UsageError, "nothing was asked yet"),
        ("/save\n", (), UsageError, "takes one file name"),
        ("x\n", ("--model", "tund"), UsageError, "did you mean 'tuned'"),
        ("x\n", ("elsewhere",), UsageError, "both MODEL"),
    ],
)
def test_wrong_use_is_one_message(
    server: FakeOpenAI, lines: str, options: tuple[str, ...], kind: type[Exception], words: str
) -> None:
    _, _, error = run(server, lines, *options)
    assert type(error) is kind
    assert words in str(error)


def test_a_file_that_exists_is_not_overwritten(server: FakeOpenAI, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text("mine")
    _, _, error = run(server, f"x\n/save {tmp_path}/talk.json\n")
    assert type(error) is StorageError
    assert (tmp_path / "talk.json").read_text() == "mine"


def test_several_models_or_none_need_a_word(server: FakeOpenAI) -> None:
    server.models = {"base": FakeModel(), "tuned": FakeModel()}
    _, _, error = run(server, "x\n")
    assert "serves 2 models" in str(error)
    assert "base, tuned" in str(error)
    server.models = {}
    with (
        TerminalChat(server.url, api_key=None, model=None, system=None, sampling=Sampling()) as talk,
        pytest.raises(UsageError, match="serves no model now"),
    ):
        talk.run()
