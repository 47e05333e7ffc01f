"""An adapter made ready to be passed on: a folder with weights, manifest, model card and the notices that its base asks for.

Invariants: the folder appears whole or not at all; the base is the one that the adapter was trained on, and has every weight
that the adapter changes, in its shape; nothing in the folder names a place on this machine, and no conversation of the data is
quoted; what the card states comes from manifests. The tokenizer stays out: the base has it, and merging compares its hash.

Ignored: uploading. `publish` takes such a folder as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from chaccu.artifact import (
    MANIFEST_NAME,
    Manifest,
    atomic_folder,
    manifest_sha256,
    read_manifest,
    storage_errors,
    verify_files,
    write_json,
    write_manifest,
)
from chaccu.errors import UsageError, WeightsError
from chaccu.lineage import check_base, find_tokenizer_sha256, identify_weights
from chaccu.weights.adapter import Adapter
from chaccu.weights.card_header import CARD
from chaccu.weights.checkpoint import Checkpoint
from chaccu.weights.data_statement import DataStatement, state_data
from chaccu.weights.fetch import PACKAGED_MODELS, PackagedModel, find_packaged_origin, read_terms
from chaccu.weights.merge import weight_shapes
from chaccu.weights.model_card import render_card, render_notice
from chaccu.weights.portable_paths import refuse_machine_paths, shorten_paths, shorten_settings

WEIGHTS, CONFIG, NOTICE = "adapter_model.safetensors", "adapter_config.json", "NOTICE"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LOG = "logs/train_log.jsonl"
# Facts of a training that stay behind: the steps, which are many, and answers to questions out of held-out conversations.
LEFT_OUT = ("log", "samples", "output", "reused")


class ReleaseOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What goes with the adapter. `data`: dataset folders and identity files; `base_name`: the base's public name (None: that
    of the packaged model that it came from); `terms`: a file with the base's licence (None: that of the packaged model);
    `statement`: Markdown about the data in place of what ships; `max_bytes`: of the whole folder."""

    data: Sequence[Path]
    base_name: str | None = None
    terms: Path | None = None
    statement: Path | None = None
    max_bytes: int | None = None


def release_adapter(adapter: Path, base: Path, out: Path, options: ReleaseOptions) -> Manifest:
    """Write the release of `adapter`, trained on `base`, to `out`; returns its manifest.

    Raises `WeightsError` for an adapter that does not fit, data that is not its own, a folder beyond `max_bytes` or a path of
    this machine in it; `ArtifactError` for damaged files, `UsageError` for what has to be named.
    """
    origin = read_manifest(adapter, kind="adapter")
    verify_files(adapter, {name: origin.files[name] for name in (WEIGHTS, CONFIG, _LOG) if name in origin.files})
    check_base(base, adapter)
    opened = Adapter(adapter)
    opened.check_finite()
    opened.check_fits(weight_shapes(Checkpoint(base)), base)
    packaged = find_packaged_origin(identify_weights(base))
    if packaged is not None and options.base_name not in (None, packaged.origin):
        packaged = None
    base_name = _base_name(options, packaged, base)
    statement = state_data(options.data, origin.inputs, options.statement)
    manifest = _manifest(origin, adapter, base, out.name, base_name, statement)
    terms_file, terms_text = find_terms(options.terms, packaged, base_name)
    terms = packaged.terms if packaged is not None and options.terms is None else None
    with atomic_folder(out) as folder:
        (folder / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes())
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        write_json(folder / CONFIG, {**config, "base_model_name_or_path": base_name})
        (folder / terms_file).write_text(terms_text, encoding="utf-8")
        (folder / NOTICE).write_text(render_notice(base_name, terms=terms, terms_file=terms_file), encoding="utf-8")
        card = render_card(
            manifest,
            statement,
            terms=terms,
            terms_file=terms_file,
            package=next((name for name, model in PACKAGED_MODELS.items() if model is packaged), None),
            weights_bytes=(folder / WEIGHTS).stat().st_size,
        )
        (folder / CARD).write_text(card, encoding="utf-8")
        written = write_manifest(folder, manifest)
        named = [Path(path) for path in (*origin.inputs, origin.settings["model"], origin.settings["output"])]
        refuse_machine_paths(folder, [adapter, base, out, *options.data, *named])
        _check_size(folder, options.max_bytes)
        return written


def _base_name(options: ReleaseOptions, packaged: PackagedModel | None, base: Path) -> str:
    name = options.base_name or (packaged.origin if packaged else None)
    if name is None:
        raise UsageError(
            f"the public name of {base} is not known.", remedy="--base-name with its hub id, such as google/gemma-3-270m"
        )
    if not HUB_NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no public name of a model.", remedy="a hub id, such as google/gemma-3-270m")
    return name


def _manifest(origin: Manifest, adapter: Path, base: Path, name: str, base_name: str, statement: DataStatement) -> Manifest:
    """The training's manifest without what belongs to its machine, with what the base is known by elsewhere."""
    if origin.chat_format is None:
        raise WeightsError(f"the manifest of {adapter} names no chat format.", remedy="train it with chaccu train")
    paths = shorten_paths(origin.inputs)
    settings = {**shorten_settings(origin.settings, paths), "model": base_name, "output": name}
    facts: dict[str, Any] = {key: value for key, value in origin.facts.items() if key not in LEFT_OUT}
    facts |= {
        "base_name": base_name,
        "base_weights": identify_weights(base),
        "evaluations": _read_evaluations(adapter / _LOG),
        "data": msgspec.to_builtins(statement.datasets),
        "identity_conversations": sum(one.conversations for one in statement.identities),
    }
    return msgspec.structs.replace(
        origin,
        name=name,
        license=origin.license or _license(base),
        tokenizer_sha256=find_tokenizer_sha256(base),
        parents={**origin.parents, "adapter": manifest_sha256(adapter)},
        inputs={paths[path]: sha256 for path, sha256 in origin.inputs.items()},
        settings=settings,
        facts=facts,
        files={},
    )


def _license(base: Path) -> str | None:
    """The licence that the base's manifest names, if there is one."""
    return read_manifest(base).license if (base / MANIFEST_NAME).is_file() else None


def _read_evaluations(log: Path) -> list[dict[str, Any]]:
    """Held-out losses of a run by step, out of its log; none where the run kept no log."""
    if not log.is_file():
        return []
    with storage_errors(log):
        records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [{"step": one["step"], "loss": one["loss"]} for one in records if one["kind"] == "eval"]


def find_terms(given: Path | None, packaged: PackagedModel | None, base_name: str) -> tuple[str, str]:
    """Name and text of the file with the base's terms."""
    if given is not None:
        with storage_errors(given):
            return given.name, given.read_text(encoding="utf-8")
    if packaged is None:
        raise UsageError(
            f"the terms of {base_name} are not known, and they go along with what is made from it.",
            remedy="--terms FILE, with the text of its licence",
        )
    return f"{packaged.terms.title.upper().replace(' ', '_')}.md", read_terms(packaged)


def _check_size(folder: Path, max_bytes: int | None) -> None:
    size = sum(file.stat().st_size for file in folder.iterdir())
    weights = (folder / WEIGHTS).stat().st_size
    if max_bytes is not None and size > max_bytes:
        raise WeightsError(
            f"the release has {size:,} bytes, {weights:,} of them weights; the limit is {max_bytes:,}.",
            remedy="train with a lower lora.rank, or raise --max-bytes",
        )
