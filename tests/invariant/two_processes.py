"""Two processes of one run, started as a launcher would start them."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence


def run_two(command: Sequence[str]) -> list[bytes]:
    """Run `command` as process 0 and as process 1 of two, on loopback and without a GPU; what each wrote to stdout."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(
            [*command],
            env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join((out + err).decode() for out, err in said)
    return [out for out, _ in said]
