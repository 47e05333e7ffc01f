"""What a folder or file of weights is, told from its headers: nothing of a model is loaded.

It knows artifacts with a manifest, Hugging Face folders without one, adapters, deltas and GGUF files. Invariants: sizes, dtypes
and shapes come from the files' headers and not from what a config claims; a file that is cut off is an error. torch is not
imported (`tensor_stats` is for values).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from chaccu.artifact import LOCK_NAME, MANIFEST_NAME, Manifest, read_manifest, sha256_file, storage_errors, verify_files
from chaccu.conversation import TextTokenizer
from chaccu.errors import WeightsError
from chaccu.hub import MODEL_FILES, find_model_folder
from chaccu.weights.ancestry import Ancestor, find_ancestors
from chaccu.weights.card_header import CARD, read_card_header
from chaccu.weights.safetensors_header import read_header

# Beside a weight in fewer bits lie what it is unpacked with: bitsandbytes' states, the scales of torchao and of fp8.
_COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", "_scale", "_scale_inv", "_zero_point")
_NF4_STATE = ".quant_state."
_ADAPTER = "adapter_model.safetensors"
_LOSSES = ("loss_before", "loss_after", "best_loss", "best_step", "steps")


class TensorRow(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor: dtype by the name that its format has, shape with the slowest axis first. `parameters`: elements that it stands
    for, none where it only says how another is unpacked."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    parameters: int
    file: str


class DtypeCount(msgspec.Struct, frozen=True, kw_only=True):
    """All tensors of one dtype."""

    tensors: int
    parameters: int
    size_bytes: int


class FileRow(msgspec.Struct, frozen=True, kw_only=True):
    """A file; `sha256` as the manifest states it or as it was hashed, None where neither is so."""

    name: str
    size_bytes: int
    sha256: str | None


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. `kind`: the manifest's, else "model", "adapter" or "gguf". `verified`: every file has the manifest's
    hash; None: not asked for, or nothing to compare with. `chat_template`: whether one lies beside the tokenizer."""

    path: str
    kind: str
    name: str
    architecture: str | None
    parameters: int
    size_bytes: int
    dtypes: dict[str, DtypeCount]
    files: list[FileRow]
    license: str | None
    tokenizer_sha256: str | None
    chat_format: str | None
    chat_template: bool
    adapter: dict[str, Any] | None
    verified: bool | None
    losses: dict[str, Any]
    parents: tuple[Ancestor, ...]
    manifest: Manifest | None
    tensors: list[TensorRow]


def inspect_weights(name: str, *, verify: bool = False) -> Inspection:
    """What `name` is: a folder, a GGUF file, or a model of the hub, whose safetensors are fetched.

    `verify`: hash every file. Raises `WeightsError` for what holds no weights and no manifest or is damaged, `ArtifactError`
    when a file is not the manifest's, `StorageError`.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        path = find_model_folder(name, error=WeightsError, files=(*MODEL_FILES, CARD))
    folder = path if path.is_dir() else path.parent
    manifest = read_manifest(path) if path.is_dir() and (path / MANIFEST_NAME).is_file() else None
    if manifest is not None and verify:
        verify_files(path, manifest.files)
    files = _list_files(path, manifest, verify)
    config = _read_json(path / "config.json")
    adapter = _read_json(path / "adapter_config.json")
    tensors = _list_tensors(path)
    ggufs = [folder / one.name for one in files if one.name.endswith(".gguf")]
    if manifest is None and not tensors:
        raise WeightsError(
            f"{path} holds no {MANIFEST_NAME} and no weights in safetensors or GGUF.",
            remedy=f"chaccu weights repair {path}" if any(folder.glob("*.bin")) else "name a model's folder or a GGUF file",
        )
    values = _read_gguf(ggufs[0]) if ggufs else {}
    return Inspection(
        path=str(path),
        kind=manifest.kind if manifest else "model" if config else "adapter" if adapter else "gguf" if ggufs else "model",
        name=manifest.name if manifest else values.get("general.name") or path.absolute().stem,
        architecture=_architecture(config) or values.get("general.architecture"),
        parameters=sum(one.parameters for one in tensors),
        size_bytes=sum(one.size_bytes for one in files),
        dtypes=_count_dtypes(tensors),
        files=files,
        license=(manifest.license if manifest else None) or _license(path, values),
        tokenizer_sha256=_tokenizer(path, manifest),
        chat_format=manifest.chat_format if manifest else None,
        chat_template=_has_template(path) or "tokenizer.chat_template" in values,
        adapter=_describe_adapter(adapter) if adapter else None,
        verified=True if manifest is not None and verify else None,
        losses={key: manifest.facts[key] for key in _LOSSES if key in manifest.facts} if manifest else {},
        parents=find_ancestors(path, manifest) if manifest else (),
        manifest=manifest,
        tensors=tensors,
    )


def _list_files(path: Path, manifest: Manifest | None, verify: bool) -> list[FileRow]:
    with storage_errors(path):
        found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    base = path.parent if path.is_file() else path
    rows = []
    for file in found:
        name = file.relative_to(base).as_posix()
        if name in (MANIFEST_NAME, LOCK_NAME) or name.startswith("."):
            continue
        entry = manifest.files.get(name) if manifest else None
        sha256 = entry.sha256 if entry else sha256_file(file) if verify else None
        rows.append(FileRow(name=name, size_bytes=file.stat().st_size, sha256=sha256))
    return rows


def _list_tensors(path: Path) -> list[TensorRow]:
    if path.is_file():
        return _gguf_tensors(path)
    rows: list[TensorRow] = []
    homes: dict[str, str] = {}
    for file in sorted(path.glob("*.safetensors")):
        if file.name == _ADAPTER and (path / "config.json").is_file():
            continue  # beside a whole model it is none of its weights
        _, entries = read_header(file)
        twice = next((entry.name for entry in entries if entry.name in homes), None)
        if twice is not None:
            raise WeightsError(
                f"{twice} is both in {path / homes[twice]} and in {file.name}.", remedy=f"chaccu weights repair {path}"
            )
        homes |= {entry.name: file.name for entry in entries}
        names = {entry.name for entry in entries}
        for entry in entries:
            count = math.prod(entry.shape)
            if _NF4_STATE in entry.name or entry.name.endswith(_COMPANIONS):
                count = 0
            elif f"{entry.name}.absmax" in names and f"{entry.name}.quant_map" in names and _is_four_bit(entry.name, names):
                count *= 2  # two of four bits in a byte
            row = TensorRow(
                name=entry.name, dtype=entry.dtype, shape=entry.shape, size_bytes=entry.size_bytes, parameters=count,
                file=file.name,
            )  # fmt: skip
            rows.append(row)
    return rows + [row for file in sorted(path.glob("*.gguf")) for row in _gguf_tensors(file)]


def _is_four_bit(name: str, names: set[str]) -> bool:
    return any(f"{name}{_NF4_STATE}bitsandbytes__{kind}" in names for kind in ("nf4", "fp4"))


def _gguf_tensors(path: Path) -> list[TensorRow]:
    import gguf

    from chaccu.weights.gguf_file import GgufFile

    file = GgufFile(path)
    rows = [
        TensorRow(
            name=entry.name,
            dtype=gguf.GGMLQuantizationType(entry.type_id).name,
            shape=entry.shape,
            size_bytes=entry.size_bytes,
            parameters=math.prod(entry.shape),
            file=path.name,
        )
        for entry in file.tensors.values()
    ]
    file.close()
    return rows


def _read_gguf(path: Path) -> dict[str, Any]:
    """Those of a GGUF file's values that are told here."""
    from chaccu.weights.gguf_file import GgufFile

    keys = ("general.name", "general.architecture", "general.license", "tokenizer.chat_template")
    file = GgufFile(path)
    values = {key: file.get(key) for key in keys if key in file.keys}
    file.close()
    return values


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing where there is no such file."""
    if not path.is_file():
        return {}
    with storage_errors(path):
        data = path.read_bytes()
    try:
        value = json.loads(data)
    except ValueError as error:
        raise WeightsError(f"{path} is damaged ({error}).", remedy=f"chaccu weights repair {path.parent}") from error
    return value if isinstance(value, dict) else {}


def _architecture(config: dict[str, Any]) -> str | None:
    names = config.get("architectures") or [config.get("model_type")]
    return str(names[0]) if names[0] else None


def _count_dtypes(tensors: list[TensorRow]) -> dict[str, DtypeCount]:
    counts: dict[str, DtypeCount] = {}
    for dtype in sorted({one.dtype for one in tensors}):
        rows = [one for one in tensors if one.dtype == dtype]
        counts[dtype] = DtypeCount(
            tensors=len(rows),
            parameters=sum(one.parameters for one in rows),
            size_bytes=sum(one.size_bytes for one in rows),
        )
    return counts


def _license(path: Path, values: dict[str, Any]) -> str | None:
    said = read_card_header(path).get("license") or values.get("general.license")
    return str(said) if said else None


def _tokenizer(path: Path, manifest: Manifest | None) -> str | None:
    if manifest is not None:
        return manifest.tokenizer_sha256
    return TextTokenizer.load(path).sha256 if (path / "tokenizer.json").is_file() else None


def _has_template(path: Path) -> bool:
    return (path / "chat_template.jinja").is_file() or bool(_read_json(path / "tokenizer_config.json").get("chat_template"))


def _describe_adapter(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "base": config.get("base_model_name_or_path"),
        "type": config.get("peft_type"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
    }
