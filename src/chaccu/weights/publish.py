"""An artifact's folder made ready for a model hub: which files go, under which card, and what stops them.

Invariants: the files are the manifest's, by hash; nothing that goes names a place on this machine or quotes a held-out
question; a licence is stated; what is made from a base whose licence asks for a notice goes with NOTICE and that licence's
text. Files go as they are but for `manifest.json`, which loses a training's sample answers and paths. No host is asked
(`hub_upload` does that).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from chaccu.artifact import (
    LOCK_NAME,
    MANIFEST_NAME,
    Manifest,
    manifest_sha256,
    read_manifest,
    storage_errors,
    verify_files,
    weights_sha256,
)
from chaccu.errors import UsageError, WeightsError
from chaccu.weights.ancestry import Ancestor, find_ancestors, flatten_ancestors
from chaccu.weights.card_header import CARD, read_card_header
from chaccu.weights.data_statement import DatasetFacts, DataStatement, state_data
from chaccu.weights.fetch import PackagedModel, find_packaged_origin
from chaccu.weights.model_card import PublishedFacts, render_notice, render_published_card
from chaccu.weights.portable_paths import refuse_machine_paths_in, shorten_paths, shorten_settings
from chaccu.weights.release import CONFIG, HUB_NAME, LEFT_OUT, NOTICE, find_terms

KINDS = ("base", "model", "adapter", "gguf", "delta")
# Licences, by the hub's names, that ask whoever passes a model on for a notice and a copy of their text.
_ASK_FOR_NOTICE = ("gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4")
_TEXTS = frozenset({".json", ".md", ".txt", ".jinja", ".yaml", ".yml", ".jsonl", ""})
# A tokenizer's tokens and merges are words of the world, paths among them.
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "merges.txt"})
# A training's log has the answers to held-out questions.
_LOGS = "logs"


class PublishOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What goes with the folder. `license`: where its manifest names none; `base_name`: the base's hub id; `terms`: a file
    with the base's licence; `data`, `statement`: as of a release; `datasets`: hub ids for the card."""

    license: str | None = None
    base_name: str | None = None
    terms: Path | None = None
    data: Sequence[Path] = ()
    statement: Path | None = None
    datasets: Sequence[str] = ()


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """What goes to `repo`: the folder's own files, by name, and texts made for it, which take the place of files of
    their name."""

    repo: str
    folder: Path
    files: dict[str, int]
    texts: dict[str, str]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of all that goes, by name."""
        return dict(sorted({**self.files, **{name: len(text.encode()) for name, text in self.texts.items()}}.items()))

    @property
    def card(self) -> str:
        """The model card."""
        return self.texts[CARD] if CARD in self.texts else (self.folder / CARD).read_text(encoding="utf-8")


def prepare_publication(folder: Path, repo: str, options: PublishOptions) -> Publication:
    """What would go from `folder` to `repo` (owner/name).

    Raises `ArtifactError` for files that are not the manifest's, `UsageError` for what has to be named (licence, base, terms),
    `WeightsError` for what must not go: other files, an adapter that was not released, paths of this machine.
    """
    if "/" not in repo or not HUB_NAME.fullmatch(repo):
        raise UsageError(f"{repo!r} is no name of a repository.", remedy="--repo OWNER/NAME, such as --repo me/tiny-chat")
    manifest = read_manifest(folder, kind=KINDS)
    _refuse_other_files(folder, manifest)
    verify_files(folder, manifest.files)
    ancestors = flatten_ancestors(find_ancestors(folder, manifest))
    origins = [manifest, *(read_manifest(Path(one.folder)) for one in ancestors if one.folder)]
    packaged = _find_packaged(origins)
    if packaged is not None and options.base_name not in (None, packaged.origin):
        packaged = None
    base_name = _find_base_name(folder, manifest, options, packaged)
    own_card = read_card_header(folder) if (folder / CARD).is_file() else None
    if options.license and manifest.license not in (None, options.license):
        raise UsageError(
            f"{folder} is under {manifest.license}, as its manifest says, and not under {options.license}.",
            remedy="leave --license out",
        )
    license_name = options.license or manifest.license or (own_card or {}).get("license")
    if not license_name:
        raise UsageError(f"nothing says under which licence {folder} is.", remedy="--license, such as --license apache-2.0")
    texts, terms_file = _write_terms(repo, manifest, str(license_name), base_name, packaged, options)
    sent = _make_portable(manifest, base_name)
    if sent != manifest:
        sent = msgspec.structs.replace(sent, parents={**sent.parents, "source": manifest_sha256(folder)})
        texts[MANIFEST_NAME] = msgspec.json.format(msgspec.json.encode(sent), indent=2).decode() + "\n"
    if own_card is None:
        terms = packaged.terms if packaged and options.terms is None else None
        card = _describe(repo, sent, ancestors, [_make_portable(one, base_name) for one in origins], base_name, options)
        header = {"license": license_name, **card.header}
        card = msgspec.structs.replace(card, header=header, terms=terms if terms_file else None, terms_file=terms_file)
        texts[CARD] = render_published_card(card)
    else:
        _check_own_card(folder, own_card, options)
    present = [*sent.files, MANIFEST_NAME, *([CARD] if own_card is not None else [])]
    files = {name: (folder / name).stat().st_size for name in present if name not in texts}
    _refuse_places(folder, files, texts, origins)
    return Publication(repo=repo, folder=folder, files=files, texts=texts)


def _refuse_other_files(folder: Path, manifest: Manifest) -> None:
    known = {*manifest.files, MANIFEST_NAME, LOCK_NAME, CARD}
    with storage_errors(folder):
        found = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    other = [name for name in found if name not in known]
    if other:
        raise WeightsError(
            f"{folder} holds {', '.join(other[:3])}{' and more' if len(other) > 3 else ''}, which its manifest does not name.",
            remedy="move what is no part of it elsewhere, or run the command that made this folder again",
        )


def _find_packaged(origins: Sequence[Manifest]) -> PackagedModel | None:
    """The packaged model that one of them was made from, if any."""
    for manifest in origins:
        recorded: Mapping[str, str] = manifest.facts.get("base_weights") or {}
        found = find_packaged_origin({**recorded, **manifest.inputs, **weights_sha256(manifest)})
        if found is not None:
            return found
    return None


def _find_base_name(folder: Path, manifest: Manifest, options: PublishOptions, packaged: PackagedModel | None) -> str | None:
    """The base's hub id, where it is known. A bare name in the facts may be a folder's."""
    recorded = manifest.facts.get("base_name")
    known = recorded if isinstance(recorded, str) and "/" in recorded else None
    name = options.base_name or known or (packaged.origin if packaged else None)
    if name is not None and not HUB_NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no public name of a model.", remedy="a hub id, such as google/gemma-3-270m")
    if name is None and manifest.kind in ("adapter", "delta"):
        raise UsageError(
            f"the {manifest.kind} in {folder} is of no use without its base, whose public name is not known.",
            remedy="--base-name with its hub id, such as google/gemma-3-270m",
        )
    if CONFIG in manifest.files:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if said != name:
            raise WeightsError(
                f"{folder / CONFIG} calls its base {said}, and others know it as {name}.",
                remedy="publish what chaccu weights release writes of it, which has the public name",
            )
    return name


def _write_terms(
    repo: str,
    manifest: Manifest,
    license_name: str,
    base_name: str | None,
    packaged: PackagedModel | None,
    options: PublishOptions,
) -> tuple[dict[str, str], str | None]:
    """NOTICE and the base's terms, by file name, where the folder is to have them and does not; and the terms' name."""
    asked = packaged is not None or options.terms is not None or license_name in _ASK_FOR_NOTICE
    if NOTICE in manifest.files and options.terms is not None:
        raise UsageError(f"{manifest.name} has its {NOTICE} and terms already.", remedy="leave --terms out")
    if NOTICE in manifest.files or not asked:
        return {}, None
    base = base_name or f"the model that {manifest.name} was made from"
    file, text = find_terms(options.terms, packaged, base)
    notice = render_notice(
        base,
        terms=packaged.terms if packaged and options.terms is None else None,
        terms_file=file,
        changed=f"The files of {repo} are a modification of {{base}}, made with Chaccu.",
    )
    return {file: text, NOTICE: notice}, file


def _make_portable(manifest: Manifest, base_name: str | None) -> Manifest:
    """Without the logs and sample answers of a training, and with the portable names of its paths; as it is where it has
    none."""
    paths = shorten_paths(manifest.inputs)
    settings = manifest.settings
    if "data" in settings:  # a recipe
        model = str(settings["model"])
        settings = {**shorten_settings(settings, paths), "output": manifest.name}
        settings["model"] = base_name or shorten_paths([model])[model]
    return msgspec.structs.replace(
        manifest,
        inputs={paths[path]: sha256 for path, sha256 in manifest.inputs.items()},
        settings=settings,
        facts={key: value for key, value in manifest.facts.items() if key not in LEFT_OUT},
        files={name: entry for name, entry in manifest.files.items() if PurePosixPath(name).parts[0] != _LOGS},
    )


def _check_own_card(folder: Path, header: Mapping[str, Any], options: PublishOptions) -> None:
    if options.data or options.statement or options.datasets:
        raise UsageError(
            f"{folder / CARD} is the card; what --data, --data-statement and --dataset tell would stand nowhere.",
            remedy="leave them out",
        )
    if not header.get("license") or header["license"] != (options.license or header["license"]):
        raise UsageError(
            f"the header of {folder / CARD} names {header.get('license') or 'no licence'}.",
            remedy="release the adapter again from a base whose manifest names its licence, or publish under the card's",
        )


def _describe(
    repo: str,
    manifest: Manifest,
    ancestors: Sequence[Ancestor],
    origins: Sequence[Manifest],
    base_name: str | None,
    options: PublishOptions,
) -> PublishedFacts:
    """What the card tells; `origins`: the manifest and those of its ancestors that were found."""
    training = next((one for one in origins if "trained_tokens" in one.facts), None)
    data = _state_data(training, options)
    relation, library, what = _classify(manifest)
    header: dict[str, Any] = {}
    if base_name:
        header["base_model"] = base_name
        if relation:
            header["base_model_relation"] = relation
    if library:
        header["library_name"] = library
    header |= {"pipeline_tag": "text-generation", "tags": ["chat", "chaccu", manifest.kind]}
    if options.datasets:
        header["datasets"] = list(options.datasets)
    if languages := _languages(data):
        header["language"] = languages
    return PublishedFacts(
        repo=repo, name=repo.rpartition("/")[2], what=what, manifest=manifest, header=header, base_name=base_name,
        ancestors=ancestors, training=training, data=data, terms=None, terms_file=None,
    )  # fmt: skip


def _state_data(training: Manifest | None, options: PublishOptions) -> DataStatement | None:
    """The ledgers of the training's data: out of `--data`, or as a release recorded them."""
    if options.data:
        if training is None:
            raise UsageError(
                "no training is known that --data could have been the data of.",
                remedy="leave it out, or put the folder of the training beside this one",
            )
        return state_data(options.data, training.inputs, options.statement)
    texts = []
    if options.statement is not None:
        with storage_errors(options.statement):
            texts = [options.statement.read_text(encoding="utf-8").strip()]
    recorded = training.facts.get("data") if training is not None else None
    if not recorded and not texts:
        return None
    return DataStatement(datasets=msgspec.convert(recorded or [], list[DatasetFacts]), identities=[], texts=texts)


def _classify(manifest: Manifest) -> tuple[str | None, str | None, str]:
    """Relation to the base and library, by the hub's names, and what it is in a sentence."""
    gguf = any(name.endswith(".gguf") for name in manifest.files)
    if manifest.kind == "adapter":
        what = "A LoRA adapter, to be used with its base."
        return "adapter", "llama.cpp" if gguf else "peft", what
    if manifest.kind == "delta":
        return "finetune", None, "A model as its difference from its base, which is needed to have it."
    if gguf:
        return "quantized", "llama.cpp", "A chat model as a GGUF file, for llama.cpp."
    if "type" in manifest.settings:
        return "quantized", "transformers", f"A chat model in fewer bits: {manifest.settings['type']}."
    return None if manifest.kind == "base" else "finetune", "transformers", "A chat model."


def _languages(data: DataStatement | None) -> list[str]:
    """ISO codes of what makes up a hundredth of a dataset or more."""
    found = [
        code
        for dataset in (data.datasets if data else [])
        for code, count in dataset.languages.items()
        if len(code) == 2 and 100 * count >= sum(dataset.languages.values())
    ]
    return list(dict.fromkeys(found))


def _refuse_places(folder: Path, files: Mapping[str, int], texts: Mapping[str, str], origins: Sequence[Manifest]) -> None:
    said = [*(path for one in origins for path in one.inputs)]
    said += [str(one.settings[key]) for one in origins if "data" in one.settings for key in ("model", "output")]
    named = [name for name in files if PurePosixPath(name).suffix in _TEXTS and PurePosixPath(name).name not in _VOCABULARIES]
    own = ((name, (folder / name).read_text(encoding="utf-8", errors="replace")) for name in named)
    refuse_machine_paths_in([*texts.items(), *own], [folder, *(Path(path) for path in said if Path(path).is_absolute())])
