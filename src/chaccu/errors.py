"""The one error tree.

Every message a user can meet gives the value that was wrong, the limit it broke and the remedy. Nothing in Chaccu signals
failure by a sentinel value: what fails raises one of these, and the command line turns it into one message on stderr
and an exit code (`exit_code`: 1 failed, 2 wrong use).
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import Any


class ChaccuError(Exception):
    """Base of everything Chaccu raises on purpose.

    `message` says what is wrong, with the value and the limit; `remedy` says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  try: {self.remedy}" if self.remedy else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is, whatever its `__init__` wants: errors come back from worker processes pickled."""
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[ChaccuError], args: tuple[Any, ...], state: dict[str, Any]) -> ChaccuError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class UsageError(ChaccuError):
    """The command or call itself is wrong: an unknown name, a bad option value."""

    exit_code = 2


class ChildFailedError(ChaccuError):
    """A command that this one runs has failed and has printed why: the command line adds nothing but the exit code."""


class StorageError(ChaccuError):
    """A file or folder cannot be read or written: missing, no permission, no space left."""


class ArtifactError(ChaccuError):
    """An artifact or its manifest is missing, damaged or not of the expected kind."""


class ConversationError(ChaccuError):
    """A conversation breaks the rules of its type (roles, order, empty)."""


class FormatError(ChaccuError):
    """A chat format is unknown, malformed or cannot render this conversation."""


class TokenizerError(ChaccuError):
    """A tokenizer cannot be loaded or cannot keep token identity with a format."""


class DataError(ChaccuError):
    """Input data cannot be read, or nothing usable is left of it."""


class RecipeError(UsageError):
    """A recipe key is unknown or its value is out of range."""


class TrainError(ChaccuError):
    """Training cannot start or go on."""


class WeightsError(ChaccuError):
    """Weights are missing, damaged or cannot be converted."""


class EngineError(ChaccuError):
    """An engine cannot be loaded or failed while generating."""


class ServeError(ChaccuError):
    """The gateway or a worker cannot start or cannot serve."""


class MissingDependencyError(ChaccuError):
    """An optional library is not installed; the remedy names the command that adds it."""

    def __init__(self, library: str, *, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs {library}, which is not installed.",
            remedy=f"pip install 'chaccu[{extra}]'",
        )


def explain_listening(error: OSError, host: str, port: int) -> ServeError:
    """Why no socket could be opened at `host`:`port`."""
    if error.errno == errno.EADDRINUSE:
        return ServeError(f"port {port} on {host} is in use.", remedy="--port with another number (0 lets the system pick)")
    if error.errno == errno.EACCES:
        return ServeError(f"port {port} is reserved for the system.", remedy="--port with a number above 1023")
    return ServeError(f"cannot listen on {host}:{port}: {error.strerror or error}.", remedy="--host or --port")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the nearest known ones, or all of them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "one of: " + ", ".join(names)
