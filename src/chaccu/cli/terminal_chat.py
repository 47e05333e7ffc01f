"""`TerminalChat`: messages from stdin, answers to stdout as they are written, everything else to stderr.

Invariants: an answer that failed leaves the conversation as it was, so that /retry asks the same again; an answer that was
stopped stays as far as it came. Control characters that a model writes do not reach the terminal. History is that of this run.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec

from chaccu.artifact import write_json
from chaccu.client import ChatClient, Sampling
from chaccu.conversation import Conversation, Message
from chaccu.errors import ChaccuError, StorageError, UsageError, did_you_mean

_FENCE = '"""'
_CONTROLS = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}
_HELP = """\
/retry            ask the last message again
/reset            forget the conversation (the system prompt stays)
/system [TEXT]    set the system prompt; without TEXT remove it
/model [NAME]     talk to another model of the server; without NAME list them
/save FILE        write the conversation as JSON
/quit             end (so does Ctrl-D)
A line of three quotes begins and ends a message of many lines; //text sends /text. Ctrl-C stops an answer."""


class TerminalChat:
    """One conversation with one server. Use it as a context manager; `run` returns when the person leaves."""

    def __init__(self, url: str, *, api_key: str | None, model: str | None, system: str | None, sampling: Sampling) -> None:
        """Raises `UsageError` when `url` is none."""
        self._client = ChatClient(url, api_key)
        self._runner = asyncio.Runner()
        self._wanted = model
        self._model = ""
        self._sampling = sampling
        self._conversation = Conversation(messages=(), system=system or None)
        self._asked: str | None = None
        self._saved: set[Path] = set()
        self._interactive = sys.stdin.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "retry": self._retry,
            "reset": self._reset,
            "system": self._set_system,
            "model": self._choose_model,
            "save": self._save,
            "help": lambda rest: _say(_HELP),
        }

    def __enter__(self) -> TerminalChat:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._runner.run(self._client.close())
        finally:
            self._runner.close()

    def run(self) -> None:
        """Talk until /quit or the end of stdin.

        Raises `ChatError` when the server has no model to talk to, `UsageError` when it has several and none was named; without
        a terminal also the first error of an answer.
        """
        self._model = self._pick(self._wanted)
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives `input` line editing, and keeps a pasted text together
            _say(f"{self._model} at {self._client.base_url}  (/help, /quit)")
        while (text := self._read()) is not None:
            try:
                self._do(text)
            except ChaccuError as error:
                if not self._interactive:
                    raise
                _say(f"! {error}")

    def _do(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ") if text.startswith("/") else ("", "", "")
        if not text.strip():
            return
        if text.startswith("//") or not name.isalpha():
            self._ask(text.removeprefix("/") if text.startswith("//") else text)
        elif name in self._commands:
            self._commands[name](rest.strip())
        else:
            raise UsageError(f"there is no command /{name}.", remedy=did_you_mean(name, [*self._commands, "quit"]))

    def _read(self) -> str | None:
        """The next message or command; None at the end."""
        lines: list[str] = []
        fenced = interrupted = False
        while True:
            try:
                line = input(("… " if fenced else "> ") if self._interactive else "")
            except EOFError:
                if self._interactive:
                    _say("")
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                if not self._interactive or (interrupted and not lines):
                    raise
                lines, fenced, interrupted = [], False, True
                _say("\n(Ctrl-C again or /quit ends)")
                continue
            if line.strip() == _FENCE:
                if fenced:
                    return "\n".join(lines)
                fenced = True
            elif fenced:
                lines.append(line)
            else:
                return None if line.strip() == "/quit" else line

    def _ask(self, text: str) -> None:
        self._asked = text
        asked = msgspec.structs.replace(
            self._conversation, messages=(*self._conversation.messages, Message("user", text), Message("assistant", None))
        )
        pieces: list[str] = []
        note = ""
        try:
            finish_reason = self._runner.run(self._stream(asked, pieces))
            if finish_reason == "length":
                note = "(cut at the token limit)"
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            note = "(stopped)"
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
        if note:
            _say(note)
        if pieces:
            self._conversation = _answered(asked, pieces)

    async def _stream(self, asked: Conversation, pieces: list[str]) -> str | None:
        finish_reason = None
        async with contextlib.aclosing(self._client.stream_chat(self._model, asked, self._sampling)) as deltas:
            async for delta in deltas:
                pieces.append(delta.text)
                sys.stdout.write(delta.text.translate(_CONTROLS))
                sys.stdout.flush()
                finish_reason = delta.finish_reason
        return finish_reason

    def _retry(self, rest: str) -> None:
        if self._asked is None:
            raise UsageError("nothing was asked yet.", remedy="write a message first")
        before, turns = self._conversation, self._conversation.messages
        if len(turns) >= 2 and turns[-2].content == self._asked:
            self._conversation = msgspec.structs.replace(before, messages=turns[:-2])
        try:
            self._ask(self._asked)
        except ChaccuError:
            self._conversation = before
            raise

    def _reset(self, rest: str) -> None:
        self._conversation = msgspec.structs.replace(self._conversation, messages=())
        self._asked = None
        _say("(a new conversation)")

    def _set_system(self, rest: str) -> None:
        self._conversation = msgspec.structs.replace(self._conversation, system=rest or None)
        _say("(system prompt set)" if rest else "(no system prompt)")

    def _choose_model(self, rest: str) -> None:
        if rest:
            self._model = self._pick(rest)
        else:
            _say("\n".join(f"{'*' if name == self._model else ' '} {name}" for name in self._runner.run(self._client.models())))

    def _save(self, rest: str) -> None:
        words = shlex.split(rest)
        if len(words) != 1:
            raise UsageError("/save takes one file name.", remedy="/save conversation.json")
        path = Path(words[0]).expanduser().absolute()
        if path.exists() and path not in self._saved:
            raise StorageError(f"{path} exists already.", remedy="save under another name")
        write_json(path, self._conversation)
        self._saved.add(path)
        _say(f"(saved {len(self._conversation.messages)} messages to {path})")

    def _pick(self, wanted: str | None) -> str:
        """The model to talk to. Raises `ChatError` or `UsageError` when there is no telling."""
        names = self._runner.run(self._client.models())
        if wanted is not None:
            if wanted not in names:
                remedy = did_you_mean(wanted, names) if names else "start a worker for it; the server offers no model now"
                raise UsageError(f"there is no model {wanted!r} at {self._client.base_url}.", remedy=remedy)
            return wanted
        if not names:
            raise UsageError(f"{self._client.base_url} serves no model now.", remedy="chaccu worker --model M --gateway URL")
        if len(names) > 1:
            raise UsageError(
                f"{self._client.base_url} serves {len(names)} models.", remedy=f"--model with one of: {', '.join(names)}"
            )
        return names[0]


def _answered(asked: Conversation, pieces: list[str]) -> Conversation:
    return msgspec.structs.replace(asked, messages=(*asked.messages[:-1], Message("assistant", "".join(pieces))))


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
