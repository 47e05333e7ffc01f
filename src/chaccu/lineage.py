"""Which base an adapter belongs to: the one whose weights and tokenizer it was trained over.

Merging asks here, and every engine that serves an adapter. Invariants: on the machine of the training the base's manifest is
compared; elsewhere, where other versions of the libraries may have unpacked the same weights, the weights themselves are, by
their SHA-256. A copy of the base in fewer bits counts as the base. An adapter that names a tokenizer is never put together with
another, whether it brings the files along or not.
"""

from __future__ import annotations

from pathlib import Path

from chaccu.artifact import MANIFEST_NAME, Manifest, manifest_sha256, read_manifest, sha256_file, weights_sha256
from chaccu.conversation import TextTokenizer
from chaccu.errors import WeightsError

_TOKENIZER = "tokenizer.json"


def check_base(base: Path, adapter: Path, *, gguf: Path | None = None) -> None:
    """Raise `WeightsError` unless `base` is what the manifest of `adapter` names; one without a manifest names nothing.

    `gguf`: the one file of the folder `base` that counts as its weights, where the folder itself says nothing of them.
    """
    if not (adapter / MANIFEST_NAME).is_file():
        return
    manifest = read_manifest(adapter, kind="adapter")
    recorded: dict[str, str] = manifest.facts.get("base_weights") or {}
    parent = manifest.parents.get("base")
    if not (_is_parent(base, parent) or _has_weights(base, recorded, gguf) or (parent is None and not recorded)):
        name = manifest.facts.get("base_name")
        raise WeightsError(
            f"{adapter} was trained on another base than {base}.",
            remedy=f"use it with {name}, which it was trained on" if name else "use it with the base it was trained on",
        )
    if manifest.tokenizer_sha256 is not None and (found := find_tokenizer_sha256(base)) != manifest.tokenizer_sha256:
        raise WeightsError(
            f"{adapter} was trained with another tokenizer than {base} has: {_short(manifest.tokenizer_sha256)} "
            f"and {_short(found)} are their SHA-256.",
            remedy="use it with the base it was trained on, and with the tokenizer.json that this has",
        )


def find_tokenizer_sha256(base: Path) -> str:
    """The identity of a base's tokenizer, as its manifest states it while the file is the manifest's."""
    file = base / _TOKENIZER
    if (base / MANIFEST_NAME).is_file() and file.is_file():
        manifest = read_manifest(base)
        entry = manifest.files.get(_TOKENIZER)
        if manifest.tokenizer_sha256 and entry and sha256_file(file) == entry.sha256:
            return manifest.tokenizer_sha256
    return TextTokenizer.load(base).sha256


def identify_weights(base: Path, *, gguf: Path | None = None) -> dict[str, str]:
    """SHA-256 by name of what a base's weights are or were unpacked from: as its manifest says, else of its files."""
    if (base / MANIFEST_NAME).is_file():
        manifest = read_manifest(base)
        return manifest.inputs if _is_unchanged_gguf(manifest) else weights_sha256(manifest)
    return {file.name: sha256_file(file) for file in ([gguf] if gguf is not None else sorted(base.glob("*.safetensors")))}


def _is_parent(base: Path, parent: str | None) -> bool:
    if parent is None or not (base / MANIFEST_NAME).is_file():
        return False
    manifest = read_manifest(base)
    if "source" in manifest.parents:  # of a copy in fewer bits: what was quantised, and what that was packed from
        return parent in (manifest_sha256(base), *manifest.parents.values())
    return parent == manifest_sha256(base) or (_is_unchanged_gguf(manifest) and parent == manifest.parents["base"])


def source_parents(folder: Path, manifest: Manifest) -> dict[str, str]:
    """The parents of a copy in fewer bits of what is in `folder`, which has this manifest; "base" is what that stands for."""
    parents = {"source": manifest_sha256(folder)}
    if "source" in manifest.parents:
        return parents | {"base": manifest.parents.get("base", manifest.parents["source"])}
    return parents | ({"base": manifest.parents["base"]} if _is_unchanged_gguf(manifest) else {})


def source_inputs(folder: Path, manifest: Manifest) -> dict[str, str]:
    """The inputs of a copy in fewer bits: the weights that it stands for, as other machines know them."""
    return dict(manifest.inputs) if "source" in manifest.parents else identify_weights(folder)


def _is_unchanged_gguf(manifest: Manifest) -> bool:
    """Whether it is a base as it was packed, not one with an adapter merged into it."""
    return manifest.kind == "gguf" and set(manifest.parents) == {"base"}


def _has_weights(base: Path, recorded: dict[str, str], gguf: Path | None) -> bool:
    """Unpacked from the same file, or the same in every file of weights."""
    if not recorded:
        return False
    made_of = read_manifest(base) if (base / MANIFEST_NAME).is_file() else None
    if made_of is not None and "source" in made_of.parents and _are_same(made_of.inputs, recorded):
        return True
    return _are_same(identify_weights(base, gguf=gguf), recorded)


def _are_same(found: dict[str, str], recorded: dict[str, str]) -> bool:
    names = {name for name in recorded if name.endswith(".safetensors")}
    packed = {sha256 for name, sha256 in recorded.items() if name not in names}
    if packed & set(found.values()):
        return True
    return bool(names) and all(found.get(name) == recorded[name] for name in names)


def _short(sha256: str) -> str:
    return f"{sha256[:12]}…"
