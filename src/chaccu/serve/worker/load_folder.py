"""`find_allowed`: the folder that a gateway names, if this worker was allowed at its start to load from there.

Invariants: nothing outside the allowed folder is opened, whatever links and dots a path holds; what is refused for its place is
refused in the same words whether it is there or not. It ignores what the folder holds.
"""

from __future__ import annotations

from pathlib import Path

from chaccu.errors import UsageError


def find_allowed(allowed: Path | None, path: str) -> Path:
    """`path`, which is relative to `allowed` or lies below it. Raises `UsageError` when it does not, or holds what does not."""
    if allowed is None:
        raise UsageError("this worker loads nothing while it runs.", remedy="start it with --allow-load DIR")
    root = allowed.resolve()
    try:
        folder = (root / path).resolve()
        # A link in it may lead elsewhere.
        places = [folder, *(file.resolve() for file in folder.iterdir())] if root in folder.parents else []
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"there is no folder {path!r:.300}.", remedy="name one below the worker's --allow-load") from error
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, a loop of links
        raise UsageError(f"{path!r:.300} is no folder that can be read.", remedy="check its name") from error
    if not places or any(root not in place.parents for place in places):
        raise UsageError(
            f"{path!r:.300} does not lie, with all that it holds, below the folder that this worker may load from.",
            remedy="name a folder below the worker's --allow-load",
        )
    return folder
