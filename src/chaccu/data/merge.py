"""`data merge`: several datasets into one, without conversations that are there twice and without a source on both sides.

Training files go to training and validation files to validation; a plain JSONL file is training. A source conversation that
is validation in one of them is validation in the result, so that nothing held out is trained on. Every conversation that is
left out or changes sides is in the result's ledger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec

from chaccu.artifact import (
    MANIFEST_NAME,
    Manifest,
    atomic_folder,
    library_versions,
    manifest_sha256,
    sha256_file,
    write_manifest,
)
from chaccu.conversation import Conversation
from chaccu.data.clean import KIND
from chaccu.data.ledger import LedgerRow, LedgerWriter
from chaccu.data.partition import TRAIN_NAME, VALIDATION_NAME
from chaccu.data.records import bare_source, count_chars, list_files, read_conversations
from chaccu.data.steps.exact_duplicates import ExactDuplicates
from chaccu.errors import UsageError

_STEP = "merge"


class MergeReport(msgspec.Struct, frozen=True):
    """`read` = `kept` + `duplicates`; `moved` of those kept changed to validation; `rows` by file."""

    read: int
    kept: int
    duplicates: int
    moved: int
    rows: dict[str, int]


def merge_datasets(paths: Sequence[Path], out: Path) -> MergeReport:
    """Merge dataset folders and JSONL files into the folder `out`.

    Raises `UsageError` for fewer than two inputs or an `out` that is no dataset, `StorageError` and `DataError` when an
    input cannot be read.
    """
    if len(paths) < 2:
        raise UsageError("there is only one input to merge.", remedy="name two datasets or more")
    if out.exists() and not (out / MANIFEST_NAME).is_file():
        raise UsageError(f"{out} is there already and is no dataset.", remedy="name a new folder with --out")
    files = [(file, file.name == VALIDATION_NAME) for path in paths for file in list_files(path)]
    held_out = {bare_source(conversation.source) for file, held in files if held for conversation in read_conversations(file)}
    held_out.discard("")
    with atomic_folder(out) as folder:
        with (
            LedgerWriter(folder) as ledger,
            (folder / TRAIN_NAME).open("wb") as train,
            (folder / VALIDATION_NAME).open("wb") as validation,
        ):
            rows = _write(files, held_out, ledger, {TRAIN_NAME: train, VALIDATION_NAME: validation})
        counts = ledger.counts
        counts.check()
        moved = sum(counts.changed.get(_STEP, {}).values())
        report = MergeReport(counts.read, counts.kept, counts.total_dropped, moved, rows)
        manifest = Manifest(
            kind=KIND,
            name=out.name,
            parents={f"dataset-{number}": manifest_sha256(path) for number, path in enumerate(paths, 1) if _is_dataset(path)},
            inputs={str(file): sha256_file(file) for file, _ in files},
            versions=library_versions("msgspec", "polars"),
            facts=msgspec.to_builtins(report),
        )
        write_manifest(folder, manifest)
    return report


def _write(
    files: Sequence[tuple[Path, bool]], held_out: set[str], ledger: LedgerWriter, outputs: dict[str, IO[bytes]]
) -> dict[str, int]:
    """Every conversation to its side, or to the ledger; returns the rows by file."""
    step = ExactDuplicates()
    index = step.open_index()
    rows = dict.fromkeys(outputs, 0)
    for conversation, origin, held in _read(files):
        ledger.counts.read += 1
        chars = count_chars(conversation)
        reason = index.admit(step.digest(conversation))
        if reason is not None:
            ledger.add(LedgerRow(conversation.id, origin, _STEP, "dropped", reason, chars, 0))
            continue
        ledger.counts.kept += 1
        if not held and bare_source(conversation.source) in held_out:
            ledger.add(LedgerRow(conversation.id, origin, _STEP, "changed", "source is held out elsewhere", chars, chars))
            held = True
        name = VALIDATION_NAME if held else TRAIN_NAME
        outputs[name].write(msgspec.json.encode(conversation) + b"\n")
        rows[name] += 1
    return rows


def _read(files: Sequence[tuple[Path, bool]]) -> Iterator[tuple[Conversation, str, bool]]:
    """What is held out comes first, so that of two equal conversations that one stays."""
    for file, held in sorted(files, key=lambda entry: not entry[1]):
        for conversation in read_conversations(file):
            yield conversation, str(file), held


def _is_dataset(path: Path) -> bool:
    return (path / MANIFEST_NAME).is_file()
