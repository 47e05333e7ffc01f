"""The adapter that ships in the repository: where it lies, and whether it is whole.

It is no part of the installed package: a checkout has it under `releases/`.
"""

from __future__ import annotations

from pathlib import Path

import chaccu
from chaccu.artifact import MANIFEST_NAME, Manifest, read_manifest, verify_files
from chaccu.errors import WeightsError
from chaccu.weights.fetch import find_packaged_origin

RELEASE = "gemma-3-270m-chaccu-lora"


def find_release(named: Path | None = None) -> Path:
    """The folder `named`, or the released adapter below the current folder, or of the checkout that this package runs from.

    Raises `WeightsError` when there is none.
    """
    checkout = Path(chaccu.__file__).parents[2]
    places = [named] if named is not None else [Path("releases") / RELEASE, checkout / "releases" / RELEASE]
    for place in places:
        if (place / MANIFEST_NAME).is_file():
            return place
    if named is not None:
        raise WeightsError(
            f"there is no released adapter in {named}.", remedy="name a folder that chaccu weights release wrote"
        )
    raise WeightsError(
        f"there is no released adapter: neither {places[0]} here nor {places[1]} holds one; an installed package has none.",
        remedy="run it in a checkout of Chaccu, or name its folder with --adapter; without --released the demo trains its own",
    )


def check_release(folder: Path) -> Manifest:
    """The release's manifest. Raises `ArtifactError` when a file is damaged, `WeightsError` when its base is not the demo's."""
    manifest = read_manifest(folder, kind="adapter")
    verify_files(folder, manifest.files)
    if find_packaged_origin(manifest.facts.get("base_weights") or {}) is None:
        raise WeightsError(
            f"{folder} is an adapter of {manifest.facts.get('base_name') or 'a base'} that the demo does not have.",
            remedy="merge it into its base with chaccu weights merge, and serve that with chaccu serve",
        )
    return manifest
