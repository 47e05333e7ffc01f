"""Where an artifact came from, as far as its parents can be found: they are named by the SHA-256 of their manifests, and looked
for in the folders beside it.

Invariant: only a folder whose manifest has the named hash counts as the parent, whatever it is called.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from chaccu.artifact import MANIFEST_NAME, Manifest, manifest_sha256, read_manifest


class Ancestor(msgspec.Struct, frozen=True, kw_only=True):
    """A parent by `role` and by the SHA-256 of its manifest; `folder`, `kind` and `name` where it was found. `parents`: its
    own."""

    role: str
    sha256: str
    kind: str | None = None
    name: str | None = None
    folder: str | None = None
    parents: tuple[Ancestor, ...] = ()


def find_ancestors(folder: Path, manifest: Manifest) -> tuple[Ancestor, ...]:
    """The parents of the artifact in `folder`, each with its own. Raises `ArtifactError` for a damaged manifest beside it."""
    return _find(folder.absolute(), manifest, {})


def flatten_ancestors(ancestors: tuple[Ancestor, ...]) -> list[Ancestor]:
    """Parents first, then theirs."""
    return [*ancestors, *(one for ancestor in ancestors for one in flatten_ancestors(ancestor.parents))]


def _find(folder: Path, manifest: Manifest, hashes: dict[Path, dict[str, Path]]) -> tuple[Ancestor, ...]:
    """`hashes`: what lies in a folder of artifacts, by the manifests' hashes, once it has been looked at."""
    found = []
    for role, sha256 in manifest.parents.items():
        place = _list_artifacts(folder.parent, hashes).get(sha256)
        if place is None:
            found.append(Ancestor(role=role, sha256=sha256))
            continue
        parent = read_manifest(place)
        # A manifest cannot hold its own hash, so that this ends.
        above = _find(place, parent, hashes)
        found.append(Ancestor(role=role, sha256=sha256, kind=parent.kind, name=parent.name, folder=str(place), parents=above))
    return tuple(found)


def _list_artifacts(folder: Path, hashes: dict[Path, dict[str, Path]]) -> dict[str, Path]:
    if folder not in hashes:
        places = [path.parent for path in sorted(folder.glob(f"*/{MANIFEST_NAME}")) if not path.parent.name.startswith(".")]
        hashes[folder] = {manifest_sha256(place): place for place in places}
    return hashes[folder]
