"""`clean_conversations`: raw dumps to a dataset folder: train.jsonl, validation.jsonl, ledger.parquet, report.html,
manifest.json.

Invariants: the folder appears whole or not at all. The same inputs, settings, seed and versions give the same bytes,
wherever and by how many workers records are judged. Counts reconcile, or the run fails. A folder that was made from the
same things already is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from chaccu.artifact import (
    MANIFEST_NAME,
    Manifest,
    atomic_folder,
    library_versions,
    read_manifest,
    verify_files,
    write_manifest,
)
from chaccu.data.config import CleanConfig, load_config
from chaccu.data.contest import Contest, Contestant
from chaccu.data.framing import Cut
from chaccu.data.intake import Intake, Progress, SourceCut
from chaccu.data.judging import Check, Judgement, Judging, Kept, Note, judge_chunks
from chaccu.data.ledger import Counts, LedgerRow, LedgerWriter
from chaccu.data.outcome import CorpusStep, Index
from chaccu.data.partition import TRAIN_NAME, VALIDATION_NAME, PartitionWriter
from chaccu.data.records import count_chars, read_conversations
from chaccu.data.report import Sample, Samples, write_report
from chaccu.data.show import MaskRun, mask_runs
from chaccu.data.sources import Source, find_sources, hash_source
from chaccu.data.stats import Stats
from chaccu.data.steps.forks import SHORTER_FORK, ForkDigest, Forks
from chaccu.data.steps.token_limit import TokenLimit
from chaccu.errors import ArtifactError, DataError, UsageError

KIND = "dataset"
_PREVIEW_OF, _PREVIEW_CHARS = 100, 1200
LIBRARIES = ("html-to-markdown", "msgspec", "phonenumberslite", "polars", "pycld2", "rensa", "selectolax", "tokenizers")


class CleanReport(msgspec.Struct, frozen=True):
    """What a run did. `read` = `kept` + the sum of `dropped`; `rows` counts written conversations by file (more than `kept`
    when long ones were split, fewer when parts were joined). `reused`: the folder was there already."""

    folder: str
    reused: bool
    read: int
    kept: int
    dropped: dict[str, dict[str, int]]
    changed: dict[str, dict[str, int]]
    rows: dict[str, int]
    stats: Stats
    cuts: dict[str, Cut]

    @property
    def total_dropped(self) -> int:
        return self.read - self.kept

    def warnings(self) -> list[str]:
        """One sentence for each source that broke off."""
        return [cut.describe(origin) for origin, cut in self.cuts.items()]


def clean_conversations(
    sources: Sequence[str],
    out: Path,
    config: CleanConfig | None = None,
    *,
    validation_share: float = 0.02,
    seed: int = 0,
    strict: bool = False,
    fresh: bool = False,
    workers: int = 1,
    judging: Judging | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> CleanReport:
    """Clean `sources` (paths, globs, `package:NAME`) into the folder `out`.

    `validation_share` is the share of source conversations in [0, 1); `strict` makes a source that breaks off an error;
    `fresh` builds again what is there already. With `workers` above 1 the calling program must be importable (`if __name__
    == "__main__"`). `judging` is another place to judge records in than `workers` processes of this machine, such as
    `chaccu.data.on_ray.judge_on_ray`; the output is the same.

    Raises `StorageError`, `RecipeError`, `UsageError` for what is wrong before it begins, `DataError` when a source cannot
    be read or nothing is left; then nothing is written.
    """
    config = config or load_config()
    if not 0 <= validation_share < 1:
        raise UsageError(f"the validation share is {validation_share}.", remedy="give a share from 0 to below 1, such as 0.02")
    found = find_sources(sources)
    manifest = Manifest(
        kind=KIND,
        name=out.name,
        tokenizer_sha256=tokenizer_sha256_of(config),
        inputs={source.origin: hash_source(source) for source in found},
        settings={**config.settings(), "validation_share": validation_share, "seed": seed},
        versions=library_versions(*LIBRARIES),
    )
    report = _find_existing(out, manifest, fresh=fresh)
    if report is not None:
        _refuse_cuts(report.cuts, strict=strict)
        return report
    with atomic_folder(out) as folder:
        judge = judging or partial(judge_chunks, workers=workers)
        return _Run(out, folder, found, config, manifest).build(validation_share, seed, judge, progress, strict=strict)


def _find_existing(out: Path, wanted: Manifest, *, fresh: bool) -> CleanReport | None:
    """The report of an equal dataset in `out`, or None when one is to be built there. Raises `UsageError` for a folder of
    another kind."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_NAME).is_file():
        raise UsageError(f"{out} is there already and is no dataset.", remedy="name a new folder with --out")
    try:
        manifest = read_manifest(out, kind=KIND)
    except ArtifactError as error:
        raise UsageError(error.message, remedy="name a new folder with --out") from error
    keys = ("inputs", "settings", "versions", "tokenizer_sha256")
    # Through JSON: what a manifest's file gives back has lists where settings may have tuples.
    same = all(_plain(getattr(manifest, key)) == _plain(getattr(wanted, key)) for key in keys)
    if fresh or not same:
        return None
    try:
        verify_files(out, manifest.files)
        return msgspec.convert({**manifest.facts, "folder": str(out), "reused": True}, CleanReport)
    except (ArtifactError, msgspec.ValidationError):
        return None


def _plain(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


def tokenizer_sha256_of(config: CleanConfig) -> str | None:
    """The hash of the tokenizer by which the configuration limits tokens, if it does."""
    return next((step.load_tokenizer().sha256 for step in config.steps if isinstance(step, TokenLimit)), None)


def _refuse_cuts(cuts: dict[str, Cut], *, strict: bool) -> None:
    if strict and cuts:
        told = " ".join(cut.describe(origin) for origin, cut in cuts.items())
        raise DataError(told, remedy="get the whole file, or leave out --strict to go on with what is whole")


class _Run:
    """One building of a dataset: the state that grows as judgements come in."""

    def __init__(self, out: Path, folder: Path, sources: Sequence[Source], config: CleanConfig, manifest: Manifest) -> None:
        self._out = out
        self._folder = folder
        self._sources = sources
        self._config = config
        self._manifest = manifest
        self._indexes: dict[int, Index] = {
            place: step.open_index() for place, step in enumerate(config.steps) if isinstance(step, CorpusStep)
        }
        forks = [place for place, step in enumerate(config.steps) if isinstance(step, Forks) and step.keep == "longest"]
        self._forks_place = forks[0] if forks else None
        self._contest = Contest(folder) if forks else None
        self._stats = Stats()
        self._samples = Samples()

    def build(
        self, share: float, seed: int, judge: Judging, progress: Callable[[Progress], None] | None, *, strict: bool
    ) -> CleanReport:
        intake = Intake(self._sources, self._config.reader, progress)
        with (
            LedgerWriter(self._folder) as ledger,
            PartitionWriter(self._folder, validation_share=share, seed=seed) as partition,
            closing(judge(self._config, intake)) as judged,
        ):
            for origin, judgements in judged:
                for judgement in judgements:
                    ledger.counts.read += 1 + len(judgement.joined)
                    kept = self._settle(judgement, origin, ledger)
                    if kept and self._contest is not None:
                        self._contest.add(self._enter(judgement, origin))
                    elif kept:
                        self._write(kept, 1 + len(judgement.joined), ledger, partition)
            self._settle_contest(ledger, partition)
            _refuse_cuts(_by_origin(intake.cuts), strict=strict)
        counts = ledger.counts
        counts.check()
        if not counts.kept:
            raise DataError(
                f"nothing is left of {counts.read:,} records: {_main_reasons(counts)}.", remedy="loosen the steps with --config"
            )
        report = CleanReport(
            folder=str(self._out),
            reused=False,
            read=counts.read,
            kept=counts.kept,
            dropped=counts.dropped,
            changed=counts.changed,
            rows=partition.rows,
            stats=self._stats.ordered(),
            cuts=_by_origin(intake.cuts),
        )
        facts = {key: value for key, value in msgspec.to_builtins(report).items() if key not in ("folder", "reused")}
        steps = ["read", *(step.name for step in self._config.steps)]
        write_report(
            self._folder / "report.html", self._manifest, facts, steps, report.warnings(), self._samples.taken, self._preview()
        )
        write_manifest(self._folder, msgspec.structs.replace(self._manifest, facts=facts))
        return report

    def _preview(self) -> list[MaskRun]:
        """A short conversation of the training file as training sees it, when tokens are counted."""
        limit = next((step for step in self._config.steps if isinstance(step, TokenLimit)), None)
        if limit is None:
            return []
        first = list(islice(read_conversations(self._folder / TRAIN_NAME), _PREVIEW_OF))
        shown = min(first, key=lambda conversation: abs(count_chars(conversation) - _PREVIEW_CHARS), default=None)
        return [] if shown is None else mask_runs(shown, limit.load_format(), limit.load_tokenizer())

    def _settle(self, judgement: Judgement, origin: str, ledger: LedgerWriter) -> tuple[Kept, ...]:
        """Write a record's ledger rows up to its drop, asking the indexes on the way, and those of the records joined to
        it; returns what is kept of it."""
        for record in judgement.joined:
            ledger.add(_row_of(record.id, origin, record.note))
        for event in judgement.events:
            note = self._ask_index(event) if isinstance(event, Check) else event
            if note is None:
                continue
            ledger.add(_row_of(judgement.id, origin, note))
            if note.action == "dropped":
                self._samples.offer(Sample(note.step, note.reason, judgement.id, origin, judgement.snippet))
                for record in judgement.joined:
                    shared = msgspec.structs.replace(note, before_chars=record.note.after_chars)
                    ledger.add(_row_of(record.id, origin, shared))
                return ()
        return judgement.kept

    def _write(self, kept: tuple[Kept, ...], records: int, ledger: LedgerWriter, partition: PartitionWriter) -> None:
        ledger.counts.kept += records
        for conversation in kept:
            partition.add(conversation)
            self._stats.add(conversation.summary)

    def _enter(self, judgement: Judgement, origin: str) -> Contestant:
        """A judged record as it waits for its longer forks."""
        checks = (event for event in judgement.events if isinstance(event, Check) and event.step == self._forks_place)
        digest: ForkDigest = next(checks).digest
        return Contestant(judgement.id, origin, judgement.snippet, judgement.joined, judgement.kept, digest.group, digest.chars)

    def _settle_contest(self, ledger: LedgerWriter, partition: PartitionWriter) -> None:
        """Write what waited; a fork that is not its group's longest goes to the ledger."""
        for entry, wins in self._contest.settle() if self._contest is not None else ():
            if wins:
                self._write(entry.kept, 1 + len(entry.joined), ledger, partition)
                continue
            ledger.add(_row_of(entry.id, entry.origin, Note(Forks.name, "dropped", SHORTER_FORK, entry.size, 0)))
            for record in entry.joined:
                note = Note(Forks.name, "dropped", SHORTER_FORK, record.note.after_chars, 0)
                ledger.add(_row_of(record.id, entry.origin, note))
            self._samples.offer(Sample(Forks.name, SHORTER_FORK, entry.id, entry.origin, entry.snippet))

    def _ask_index(self, check: Check) -> Note | None:
        reason = self._indexes[check.step].admit(check.digest)
        name = self._config.steps[check.step].name
        return None if reason is None else Note(name, "dropped", reason, check.before_chars, 0)


def _row_of(record_id: str, origin: str, note: Note) -> LedgerRow:
    return LedgerRow(record_id, origin, note.step, note.action, note.reason, note.before_chars, note.after_chars)


def _by_origin(cuts: Sequence[SourceCut]) -> dict[str, Cut]:
    return {entry.origin: entry.cut for entry in cuts}


def _main_reasons(counts: Counts) -> str:
    found = [(number, f"{step}: {reason}") for step, reasons in counts.dropped.items() for reason, number in reasons.items()]
    return ", ".join(f"{number:,} {reason}" for number, reason in sorted(found, key=lambda item: (-item[0], item[1]))[:3])


__all__ = ["TRAIN_NAME", "VALIDATION_NAME", "CleanReport", "clean_conversations"]
