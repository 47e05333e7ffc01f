"""What an adapter was trained on, for those who get the adapter and not the data: origins, counts, what was done about personal
data.

Invariants: a dataset is spoken of only if it holds the very files that the adapter's manifest names by hash; every file is
spoken of; counts come from the datasets' own manifests, and read = kept + dropped. No conversation of a person is quoted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path, PurePath
from typing import Any

import msgspec

from chaccu.artifact import Manifest, read_manifest, sha256_file, storage_errors
from chaccu.errors import WeightsError

_IDENTITY = "identity#"
_PERSONAL = ("email", "phone", "card", "secret", "ip")


class DatasetFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A dataset that `chaccu data clean` made. `origins`: what was read. `dropped`: conversations by step. `rows`:
    conversations by file, after splitting. `cut`: why the end of a source could not be read. `personal_data`: the kinds that
    were looked for, with what was done ("mask", "drop"), and `in_questions` whether there as well; `personal_finds`:
    conversations by finding."""

    origins: list[str]
    read: int
    kept: int
    dropped: dict[str, int] = {}
    rows: dict[str, int] = {}
    languages: dict[str, int] = {}
    cut: list[str] = []
    personal_data: dict[str, str] = {}
    personal_finds: dict[str, int] = {}
    in_questions: bool = False


class IdentityFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Conversations on who the model is, written by Chaccu; `question` and `answer`: the first."""

    conversations: int
    question: str
    answer: str


class DataStatement(msgspec.Struct, frozen=True, kw_only=True):
    """All data of a training; `texts`: what is to be said of it in words, Markdown."""

    datasets: list[DatasetFacts]
    identities: list[IdentityFacts]
    texts: list[str]


def state_data(sources: Sequence[Path], inputs: Mapping[str, str], text: Path | None = None) -> DataStatement:
    """What is to be said of the data whose files have the hashes of `inputs` (by path).

    `sources`: dataset folders, and files of `chaccu data identity`. `text`: a Markdown file in place of what ships about known
    origins. Raises `WeightsError` when a source is not what the adapter was trained on, when a file is in none, or when nothing
    is to be said of an origin in words.
    """
    left = dict(inputs)
    datasets, identities = [], []
    for source in sources:
        hashes = _hashes(source)
        found = [path for path, sha256 in left.items() if sha256 in hashes]
        if not found:
            raise WeightsError(
                f"{source} holds none of the files that the adapter was trained on: {', '.join(map(_name, inputs))}.",
                remedy="name the data that its recipe names, as it was then",
            )
        for path in found:
            del left[path]
        if source.is_dir():
            datasets.append(_dataset(read_manifest(source, kind="dataset")))
        else:
            identities.append(_identity(source))
    if left:
        raise WeightsError(
            f"nothing says where {', '.join(map(_name, left))} came from.",
            remedy="--data FOLDER, for each folder that chaccu data clean made, and --data FILE for chaccu data identity's",
        )
    return DataStatement(datasets=datasets, identities=identities, texts=_texts(datasets, text))


def _hashes(source: Path) -> set[str]:
    if source.is_dir():
        return {entry.sha256 for entry in read_manifest(source, kind="dataset").files.values()}
    return {sha256_file(source)}


def _dataset(manifest: Manifest) -> DatasetFacts:
    facts = manifest.facts
    dropped = {step: sum(reasons.values()) for step, reasons in facts.get("dropped", {}).items()}
    if facts["read"] != facts["kept"] + sum(dropped.values()):
        raise WeightsError(
            f"the dataset {manifest.name} read {facts['read']:,} conversations, kept {facts['kept']:,} and dropped "
            f"{sum(dropped.values()):,}, which is not the sum.",
            remedy="run chaccu data clean again",
        )
    # A step is one key with its settings.
    steps: dict[str, Any] = dict(item for step in manifest.settings.get("steps", []) for item in step.items())
    personal = steps.get("pii") or {}
    return DatasetFacts(
        origins=[_name(origin) for origin in manifest.inputs],
        read=facts["read"],
        kept=facts["kept"],
        dropped=dict(sorted(dropped.items(), key=lambda item: -item[1])),
        rows=facts.get("rows", {}),
        languages=facts.get("stats", {}).get("languages", {}),
        cut=[f"{_name(origin)} ends {cut['why']}" for origin, cut in facts.get("cuts", {}).items()],
        personal_data={kind: personal[kind] for kind in _PERSONAL if personal.get(kind, "off") != "off"},
        personal_finds=facts.get("changed", {}).get("pii", {}),
        in_questions=bool(personal.get("questions")),
    )


def _identity(file: Path) -> IdentityFacts:
    with storage_errors(file):
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        conversations = [json.loads(line) for line in lines]
        written = all(str(one["source"]).startswith(_IDENTITY) for one in conversations)
        question, answer = (conversations[0]["messages"][place]["content"] for place in (0, 1))
    except (ValueError, LookupError, TypeError) as error:
        raise WeightsError(
            f"{file} is no file of conversations: {error!r}.", remedy="name one of chaccu data identity"
        ) from error
    if not written:
        raise WeightsError(
            f"{file} was not written by chaccu data identity: nothing says where its conversations came from.",
            remedy="chaccu data clean makes a dataset of them, with a ledger; name its folder",
        )
    return IdentityFacts(conversations=len(conversations), question=question, answer=answer)


def _texts(datasets: Sequence[DatasetFacts], given: Path | None) -> list[str]:
    if given is not None:
        with storage_errors(given):
            return [given.read_text(encoding="utf-8").strip()]
    texts = []
    for origin in dict.fromkeys(origin for dataset in datasets for origin in dataset.origins):
        shipped = resources.files("chaccu.weights") / "statements" / f"{origin.removeprefix('package:')}.md"
        if not origin.startswith("package:") or not shipped.is_file():
            raise WeightsError(
                f"no statement about the data of {origin} ships with Chaccu.",
                remedy="write one and name it: --data-statement FILE.md (whose words these are, licence, risks)",
            )
        texts.append(shipped.read_text(encoding="utf-8").strip())
    return texts


def _name(path: str) -> str:
    """A file by its name alone, wherever it lay; a package as it is."""
    return path if path.startswith("package:") else PurePath(path).name
