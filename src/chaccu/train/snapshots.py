"""Snapshots: the model as it is in the middle of a run, as whole artifacts under `<output>.snapshots/step-000100`.

Invariants: a snapshot appears whole or not at all; the last few stay. Those of an earlier run of the same output go first, and
only when new ones take their place, so a run that is begun again loses nothing at once.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaccu.artifact import storage_errors

_NAME = re.compile(r"step-(\d{6,})")


class Snapshots:
    """Those of one run."""

    def __init__(self, output: Path, *, limit: int | None, save: Callable[[Path, dict[str, Any]], None]) -> None:
        """`save` writes the model as an artifact with these facts to a path, atomically; `limit`: how many stay
        (None: another process sees to that)."""
        self._folder = output.with_name(f"{output.name}.snapshots")
        self._limit = limit
        self._save = save
        self._made: list[Path] = []

    def write(self, step: int, facts: dict[str, Any]) -> None:
        """Save the model after `step` steps, then remove the oldest beyond the limit. Raises `StorageError`."""
        path = self._folder / f"step-{step:06}"
        self._save(path, facts)
        self._made.append(path)
        if self._limit is None:
            return
        with storage_errors(self._folder):
            for old in [*self._earlier(), *self._made][: -self._limit]:
                shutil.rmtree(old)
                if old in self._made:
                    self._made.remove(old)

    def _earlier(self) -> list[Path]:
        """What earlier runs have left, oldest first."""
        found = [(int(match[1]), entry) for entry in self._folder.iterdir() if (match := _NAME.fullmatch(entry.name))]
        return [entry for _, entry in sorted(found) if entry not in self._made]
