"""`LogWriter`: what gateways and workers tell their operators, as lines of text or JSON on stderr.

Invariants: nobody who has something to say waits for the terminal or the disk: a thread writes, what waits for it is bounded,
and what finds no room is counted and said once there is some. One line an entry, whatever is in it. What goes in is the
caller's business: no secrets and no people's words.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import msgspec

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

# The process's own, whatever stands for it in Python.
_STDERR = 2
_MAX_WAITING = 10_000
# So that a busy gateway's thread wakes for many lines, not for each.
_GATHER_S = 0.05
_CLOSE_S = 2.0
# Above every level: what a command itself says is always written.
_ALWAYS = logging.CRITICAL + 1


class _Entry(msgspec.Struct, frozen=True):
    """`fields` say what there is to say where `message` is only its kind."""

    time_s: float
    level: int
    message: str
    fields: msgspec.Struct | None = None


class LogWriter:
    """Writes what is of `level` (a name of `LEVELS`) or above, as `text` or `json`, to the file `descriptor`, while its block
    runs; within it the log records of all modules go here too.
    """

    def __init__(self, log_format: str = "text", level: str = "warning", *, descriptor: int = _STDERR) -> None:
        self.level = LEVELS[level]
        self.dropped = 0
        self._encode = _encode_json if log_format == "json" else _encode_text
        self._descriptor = descriptor
        self._waiting: queue.SimpleQueue[_Entry | logging.LogRecord | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="log writer", daemon=True)
        self._handler = _Handler(self)
        self._former_level = logging.WARNING

    def __enter__(self) -> LogWriter:
        root = logging.getLogger()
        self._former_level = root.level
        # Of what libraries do below a warning, operators want nothing.
        root.setLevel(max(self.level, logging.WARNING))
        root.addHandler(self._handler)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        root = logging.getLogger()
        root.removeHandler(self._handler)
        root.setLevel(self._former_level)
        self._waiting.put(None)
        self._thread.join(_CLOSE_S)

    def say(self, message: str) -> None:
        """What the command itself has to say, whatever the level."""
        self.put(_Entry(time.time(), _ALWAYS, message))

    def tell(self, level: int, message: str, fields: msgspec.Struct) -> None:
        """`fields` of something that has happened, of the kind `message`."""
        if level >= self.level:
            self.put(_Entry(time.time(), level, message, fields))

    def put(self, entry: _Entry | logging.LogRecord) -> None:
        """Have an entry written; returns at once."""
        if self._waiting.qsize() >= _MAX_WAITING:
            self.dropped += 1
        else:
            self._waiting.put(entry)

    def _run(self) -> None:
        said = 0
        while (entry := self._waiting.get()) is not None:
            if isinstance(entry, _Entry) and entry.fields is not None:
                time.sleep(_GATHER_S)
            lines = [self._line(entry)]
            ended = False
            while not ended and not self._waiting.empty():
                following = self._waiting.get()
                ended = following is None
                if following is not None:
                    lines.append(self._line(following))
            dropped = self.dropped
            if dropped > said:
                lost = f"{dropped - said:,} log lines found no room and are lost"
                lines.append(self._line(_Entry(time.time(), logging.WARNING, lost)))
                said = dropped
            self._write(b"".join(lines), len(lines))
            if ended:
                return

    def _line(self, entry: _Entry | logging.LogRecord) -> bytes:
        try:
            return self._encode(entry)
        except Exception as error:
            # Whatever is wrong with one entry, the thread goes on with the next.
            return self._encode(_Entry(time.time(), logging.ERROR, f"a log line cannot be written: {type(error).__name__}"))

    def _write(self, data: bytes, lines: int) -> None:
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            # Nobody reads it, or the disk is full, and there is nowhere else to say so; serving goes on.
            self.dropped += lines


class _Handler(logging.Handler):
    """Passes log records on; they become text in the writer's thread."""

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        self._writer.put(record)


def _encode_json(entry: _Entry | logging.LogRecord) -> bytes:
    """`{"time": …, "level": …, "message": …, …}`."""
    if isinstance(entry, _Entry):
        fields: dict[str, Any] = {"time": _stamp(entry.time_s), "level": _level_name(entry.level), "message": entry.message}
        fields |= {} if entry.fields is None else msgspec.to_builtins(entry.fields)
    else:
        fields = {"time": _stamp(entry.created), "level": _level_name(entry.levelno), "message": entry.getMessage()}
        fields["logger"] = entry.name
        if entry.exc_info:
            fields["exception"] = "".join(traceback.format_exception(*entry.exc_info))
    return msgspec.json.encode(fields) + b"\n"


def _encode_text(entry: _Entry | logging.LogRecord) -> bytes:
    """What a command says as it is; else time, level and what happened, its fields as `name=value`."""
    if isinstance(entry, _Entry):
        if entry.level == _ALWAYS:
            return f"{entry.message}\n".encode(errors="replace")
        fields = {} if entry.fields is None else msgspec.to_builtins(entry.fields)
        said = " ".join([entry.message, *(f"{name}={_show(value)}" for name, value in fields.items())])
        return f"{_stamp(entry.time_s)} {_level_name(entry.level)} {said}\n".encode(errors="replace")
    said = entry.getMessage()
    if entry.exc_info:
        said += "\n" + "".join(traceback.format_exception(*entry.exc_info)).rstrip("\n")
    # The lines of a traceback stay one entry: those that follow are indented.
    indented = said.replace("\n", "\n    ")
    return f"{_stamp(entry.created)} {_level_name(entry.levelno)} {indented}\n".encode(errors="replace")


def _show(value: Any) -> str:
    """A value without spaces or control characters, or in quotes."""
    if not isinstance(value, str):
        return str(value)
    return value if value.isprintable() and value and not set(value) & set(' "=') else json.dumps(value)


def _stamp(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _level_name(level: int) -> str:
    return "info" if level == _ALWAYS else logging.getLevelName(level).lower()
