"""API keys: made, kept as hashes in one file, and looked up.

A key is `sk-chaccu-ID-SECRET`: the id (public, for lists, logs and metrics) and 256 random bits. The file holds BLAKE2b hashes.
A fast hash is right here: slow ones such as scrypt make up for passwords that can be guessed, and 256 random bits cannot, while
every request pays for the hash.

Invariants: a key is known to its owner alone once it has been shown; the file appears whole or not at all, and two writers do
not lose each other's keys; a reader sees a change within `_LOOK_AGAIN_S`, and one that it cannot read leaves the former keys in
force. It ignores what keys are for.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from chaccu.artifact import atomic_file, storage_errors
from chaccu.errors import StorageError, UsageError, did_you_mean
from chaccu.file_lock import lock_file
from chaccu.serve.gateway.access.limits import Limits

Scope = Literal["chat", "worker", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_PREFIX = "sk-chaccu-"
_ID_BYTES = 4
_SECRET_BYTES = 32
_HASH_BYTES = 32
_FILE_MODE = 0o600
_LOOK_AGAIN_S = 1.0
_log = logging.getLogger(__name__)


class Key(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One key as it is kept. `models`: the only models it is good for, none for all. `revoked`: when it ended, empty while it
    is good. Times are UTC."""

    id: str
    name: str
    hash: str
    scopes: tuple[Scope, ...]
    created: str
    models: tuple[str, ...] = ()
    revoked: str = ""
    limits: Limits = Limits()

    def may_use(self, model: str) -> bool:
        """Whether the key is good for `model`."""
        return not self.models or model in self.models


class _Keys(msgspec.Struct, frozen=True, kw_only=True):
    version: Literal[1] = 1
    keys: list[Key] = []


class KeyFile:
    """The keys in one file, for the commands that change it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Key]:
        """All keys, revoked ones too. Raises `StorageError` when the file is missing or damaged."""
        with storage_errors(self.path):
            data = self.path.read_bytes()
        try:
            return msgspec.json.decode(data, type=_Keys).keys
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StorageError(
                f"{self.path} holds no keys: {error}.", remedy="name a file that chaccu keys create wrote"
            ) from error

    def create(
        self, name: str, scopes: Sequence[str] = ("chat",), models: Sequence[str] = (), limits: Limits | None = None
    ) -> tuple[str, Key]:
        """A new key, which is shown this once, and what is kept of it. The file is made when there is none.

        Raises `UsageError` for an unknown scope, no scope, or a name that is none.
        """
        checked = _check_scopes(scopes)
        if not name.isprintable() or not 0 < len(name) <= 100:
            raise UsageError(f"{name!r:.120} is no name for a key.", remedy="1 to 100 printable characters")
        with self._locked():
            known = self.read() if self.path.exists() else []
            key_id = _new_id({key.id for key in known})
            shown = f"{_PREFIX}{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"
            key = Key(
                id=key_id,
                name=name,
                hash=hash_key(shown),
                scopes=checked,
                created=_now(),
                models=tuple(models),
                limits=limits or Limits(),
            )
            self._write([*known, key])
        return shown, key

    def revoke(self, key_id: str) -> Key:
        """End the key with this id; ending one that has ended changes nothing. Raises `UsageError` when there is none."""
        with self._locked():
            known = self.read()
            found = next((key for key in known if key.id == key_id), None)
            if found is None:
                raise UsageError(
                    f"{self.path} has no key {key_id!r}.",
                    remedy=did_you_mean(key_id, [key.id for key in known] or ["(no key)"]),
                )
            if found.revoked:
                return found
            ended = msgspec.structs.replace(found, revoked=_now())
            self._write([ended if key is found else key for key in known])
        return ended

    def _write(self, keys: list[Key]) -> None:
        with atomic_file(self.path) as file:
            os.fchmod(file.fileno(), _FILE_MODE)
            file.write(msgspec.json.format(msgspec.json.encode(_Keys(keys=keys)), indent=2) + b"\n")

    def _locked(self) -> AbstractContextManager[None]:
        """Alone among all writers of the file, in any process."""
        return lock_file(self.path.with_name(f".{self.path.name}.lock"), mode=_FILE_MODE)


class KeyRing:
    """The keys of a file as a gateway holds them: a look-up costs one hash, and once a second a look at the file's state."""

    def __init__(self, file: KeyFile, clock: Callable[[], float]) -> None:
        """Raises `StorageError` when the file is missing or damaged."""
        self._file = file
        self._clock = clock
        self._by_hash: dict[str, Key] = {}
        self._by_id: dict[str, Key] = {}
        self._state = self._stat()
        self._take(file.read())
        self._look_s = clock() + _LOOK_AGAIN_S

    def find(self, shown: str) -> Key | None:
        """The good key that was shown, None when there is no such."""
        self._look()
        return self._by_hash.get(hash_key(shown))

    def is_good(self, key_id: str) -> bool:
        """Whether the key with this id has not been revoked."""
        self._look()
        return key_id in self._by_id

    def look_now(self) -> None:
        """Take over what the file holds now."""
        self._look_s = self._clock()
        self._look()

    def _look(self) -> None:
        if self._clock() < self._look_s:
            return
        self._look_s = self._clock() + _LOOK_AGAIN_S
        state = self._stat()
        if state == self._state:
            return
        self._state = state
        try:
            self._take(self._file.read())
        except StorageError as error:
            _log.warning("the keys stay as they were: %s", error.message)

    def _take(self, keys: list[Key]) -> None:
        good = [key for key in keys if not key.revoked]
        self._by_hash = {key.hash: key for key in good}
        self._by_id = {key.id: key for key in good}

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = self._file.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def describe_key(key: Key) -> dict[str, Any]:
    """What may be shown of a key."""
    return {
        "id": key.id,
        "name": key.name,
        "scopes": list(key.scopes),
        "models": list(key.models),
        "limits": msgspec.to_builtins(key.limits),
        "created": key.created,
        "revoked": key.revoked or None,
    }


def hash_key(shown: str) -> str:
    """What is kept of a key: BLAKE2b (RFC 7693) of its UTF-8 bytes, in hex."""
    return hashlib.blake2b(shown.encode("utf-8", "surrogateescape"), digest_size=_HASH_BYTES).hexdigest()


def _check_scopes(scopes: Sequence[str]) -> tuple[Scope, ...]:
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        what = f"there is no scope {unknown[0]!r}" if unknown else "a key needs a scope"
        raise UsageError(f"{what}.", remedy=f"--scope with one of {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in scopes)


def _new_id(taken: set[str]) -> str:
    while (key_id := secrets.token_hex(_ID_BYTES)) in taken:
        pass
    return key_id


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
