"""`running_postgres`: a PostgreSQL of its own for tests, from Debian's package.

Invariants: it listens on loopback alone, at a port that the kernel picked, with its data in a temporary folder; it runs as an
unprivileged user where the tests run as root; it is ended by its process id, and its data go with it.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaccu.errors import ServeError

_START_S = 30.0
_STOP_S = 10.0
_POLL_S = 0.05
_USERS = ("postgres", "nobody")


def find_postgres() -> Path | None:
    """The folder of the newest installed PostgreSQL's programs."""
    found = [folder for folder in Path("/usr/lib/postgresql").glob("*/bin") if (folder / "postgres").exists()]
    return max(found, key=lambda folder: float(folder.parent.name), default=None)


class Postgres:
    """The server with its data in `folder`; `start` and `stop` as often as needed, always at the same `url`."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._data = folder / "data"
        self._log = folder / "log"
        self._user = next((name for name in _USERS if _has_user(name)), None) if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(folder, self._user)
        with socket.socket() as picked:
            picked.bind(("127.0.0.1", 0))
            self._port = picked.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        arguments = ["-D", str(self._data), "-U", "chaccu", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run([str(self._programs / "initdb"), *arguments], check=True, capture_output=True, user=self._user, cwd="/")
        self.url = f"postgresql+psycopg://chaccu:secret@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Returns once it takes connections. Raises `ServeError` when it does not."""
        settings = [f"port={self._port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._data, *(text for setting in settings for text in ("-c", setting))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                user=self._user,
                cwd="/",
                process_group=0,
            )
        deadline_s = time.monotonic() + _START_S
        ready = [str(self._programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self._port)]
        while subprocess.run(ready, check=False).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise ServeError(f"a test's PostgreSQL did not start; it said:\n{self._log.read_text()}")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End it, with its connections."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


@contextmanager
def running_postgres(programs: Path) -> Iterator[Postgres]:
    """A server that runs, and is gone after the block."""
    # Not in a test's own folder, which its user might not reach.
    with tempfile.TemporaryDirectory(prefix="chaccu-postgres-") as folder:
        server = Postgres(programs, Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.stop()


def _has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
