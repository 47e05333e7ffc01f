"""Paths of a training as they may be shown elsewhere: relative ones as the recipe has them, others by their last name.

Invariant: equal paths become equal names and different ones different names, so what refers to a file still does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from chaccu.errors import WeightsError

_TEXT = (".json", ".md", ".txt", "")


def shorten_paths(paths: Iterable[str]) -> dict[str, str]:
    """Each path's portable name; the second of a name gets a number."""
    names: dict[str, str] = {}
    for path in dict.fromkeys(paths):
        name = path if _is_portable(path) else PurePath(path).name
        stem, dot, ending = name.rpartition(".")
        number = 2
        while name in names.values():
            name = f"{stem}-{number}.{ending}" if dot else f"{ending}-{number}"
            number += 1
        names[path] = name
    return names


def shorten_settings(settings: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A recipe's values with the paths of its data by their portable names."""
    changed = dict(settings)
    for key in ("data", "validation"):
        changed[key] = [{**source, "path": names.get(source["path"], source["path"])} for source in settings.get(key, [])]
    return changed


def refuse_machine_paths(folder: Path, paths: Sequence[Path]) -> None:
    """Raise `WeightsError` when a text file of `folder` names one of `paths`, or what they lie in, as this machine has them."""
    texts = ((file.name, file.read_text(encoding="utf-8")) for file in sorted(folder.iterdir()) if file.suffix in _TEXT)
    refuse_machine_paths_in(texts, paths)


def refuse_machine_paths_in(texts: Iterable[tuple[str, str]], paths: Sequence[Path]) -> None:
    """As `refuse_machine_paths`, of texts by the names of their files."""
    places = {str(place) for path in (*paths, Path.home(), Path.cwd()) for place in (path.absolute(), path.resolve())}
    places |= {str(Path(place).parent) for place in places}
    shortest_first = sorted((place for place in places if len(Path(place).parts) > 1), key=len)
    pattern = re.compile(r"(?<![\w.:/-])(?:" + "|".join(map(re.escape, shortest_first)) + r")(?![\w-])")
    for name, text in texts:
        found = pattern.search(text)
        if found:
            raise WeightsError(
                f"{name} would name {found[0]}, which is a place on this machine.",
                remedy="give relative paths in the recipe, and names without a path in what is written by hand",
            )


def _is_portable(path: str) -> bool:
    pure = PurePath(path)
    return not (pure.is_absolute() or ".." in pure.parts or path.startswith("~"))
