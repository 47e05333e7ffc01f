"""`read_judged`: all that judging folders hold, as one: verdicts, failures, the lengths of the answers, rule checks.

Invariants: a verdict that is in two folders counts once; a failure for which there is a verdict elsewhere is none; what a
folder's manifest says was asked and its files do not hold is `lost`. It ignores what the verdicts come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from chaccu.artifact import MANIFEST_NAME, read_manifest
from chaccu.errors import StorageError
from chaccu.judge.answers import Answer, read_answers
from chaccu.judge.asking import JudgingFailure
from chaccu.judge.checking import CheckedQuestion
from chaccu.judge.json_lines import read_json_lines
from chaccu.judge.judging import FAILURES_NAME
from chaccu.judge.verdict_files import VERDICTS_NAME
from chaccu.judge.verdicts import Verdict, read_verdicts

ANSWERS, CHECKS = "answers.jsonl", "checks.jsonl"

_Line = TypeVar("_Line", bound=msgspec.Struct)


class JudgedFolders(msgspec.Struct, frozen=True, kw_only=True):
    """`answers` by (question id as text, turn, model). `lost`: asked by a manifest, with neither a verdict nor a failure.

    `unfinished`: folders without a manifest, of which it is not known whether the run came to its end. `replaced`: verdicts for
    which a later folder has one with the same ids that was asked something else.
    """

    folders: tuple[str, ...]
    verdicts: list[Verdict]
    failures: list[JudgingFailure]
    answers: dict[tuple[str, int, str], Answer]
    checks: list[CheckedQuestion]
    repeated: int
    lost: int
    unfinished: tuple[str, ...]
    replaced: int = 0

    @property
    def everything(self) -> list[Verdict | JudgingFailure]:
        return [*self.verdicts, *self.failures]


def read_judged(folders: Sequence[Path], answers: Sequence[Path] = ()) -> JudgedFolders:
    """Folders with `verdicts.jsonl`; `answers`: files or folders with answers, besides those beside the verdicts.

    Raises `StorageError` where a folder or file is missing, `DataError` for a bad line.
    """
    verdicts: dict[tuple[Any, ...], Verdict] = {}
    failures: dict[tuple[Any, ...], JudgingFailure] = {}
    checks: list[CheckedQuestion] = []
    read = lost = replaced = 0
    folders = list({folder.resolve(): folder for folder in folders}.values())
    for folder in folders:
        found, failed = _read_verdicts(folder), _read_if_there(folder / FAILURES_NAME, JudgingFailure, "failure")
        read += len(found)
        lost += max(0, _asked(folder) - len(found) - len(failed))
        replaced += sum(_place(one) in verdicts and verdicts[_place(one)].key != one.key for one in found)
        verdicts.update((_place(one), one) for one in found)
        failures.update((_place(one), one) for one in failed)
        checks += _read_if_there(folder / CHECKS, CheckedQuestion, "checked question")
    files = [folder / ANSWERS for folder in folders if (folder / ANSWERS).is_file()]
    files += [path / ANSWERS if path.is_dir() else path for path in answers]
    for path in answers:
        checks += _read_if_there(path / CHECKS, CheckedQuestion, "checked question") if path.is_dir() else []
    return JudgedFolders(
        folders=tuple(folder.name or str(folder) for folder in folders),
        verdicts=list(verdicts.values()),
        failures=[one for place, one in failures.items() if place not in verdicts],
        answers={(str(one.question_id), one.turn, one.model): one for file in files for one in read_answers(file)},
        # A folder may be named for its verdicts and for its answers.
        checks=list(dict.fromkeys(checks)),
        repeated=read - len(verdicts),
        lost=lost,
        replaced=replaced,
        unfinished=tuple(folder.name or str(folder) for folder in folders if not (folder / MANIFEST_NAME).is_file()),
    )


def _read_verdicts(folder: Path) -> list[Verdict]:
    if folder.is_dir() and not (folder / VERDICTS_NAME).is_file():
        raise StorageError(
            f"{folder} is no judging folder: it has no {VERDICTS_NAME}.",
            remedy="name a folder that chaccu judge compare or chaccu judge grade wrote",
        )
    return read_verdicts(folder / VERDICTS_NAME)


def _place(one: Verdict | JudgingFailure) -> tuple[Any, ...]:
    return (str(one.question_id), one.turn, one.models, one.judge, one.prompt)


def _asked(folder: Path) -> int:
    if not (folder / MANIFEST_NAME).is_file():
        return 0
    return int(read_manifest(folder).facts.get("asked", 0))


def _read_if_there(file: Path, kind: type[_Line], called: str) -> list[_Line]:
    return read_json_lines(file, kind, called) if file.is_file() else []
