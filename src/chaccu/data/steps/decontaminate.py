"""Decontamination: questions of an evaluation are not trained on.

A question of a conversation asks an evaluation question when it holds `ngram_words` words in a row of it (all its words,
when it has fewer), or when the two share most of their three-word sequences (Jaccard similarity from `similarity` up). The
similarity is counted exactly through an index from word sequences to evaluation questions; there are few enough of those
that nothing has to be estimated from a sketch. Words are compared without case and punctuation; text without spaces between
words (Chinese, Japanese, Thai) has its runs between punctuation for words, so few questions of it are long enough to be looked
for. A file without a single question that is long enough is refused. Each reason names the evaluation question, so the ledger
and the report count the matches of each.

Answers are not looked at: reference answers of an evaluation are not in its question files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from chaccu.artifact import sha256_file, storage_errors
from chaccu.conversation import Conversation
from chaccu.data.outcome import Drop, Outcome, Step, filter_rounds
from chaccu.data.rounds import Round
from chaccu.errors import DataError, RecipeError

_WORD = re.compile(r"\w+")
_SHINGLE_WORDS = 3
_SHIPPED = "starter"


class Decontaminate(Step, frozen=True):
    """`questions`: JSONL files, one question a line under `turns`, `question`, `prompt` or `text`, or the name of a question
    set that ships with Chaccu; `drop`: the round that asks it, or the conversation. Evaluation questions under `min_words` are
    too common to tell from chance and are left out."""

    name: ClassVar[str] = "decontaminate"

    questions: tuple[str, ...] = (_SHIPPED,)
    drop: Literal["round", "conversation"] = "round"
    ngram_words: Annotated[int, msgspec.Meta(ge=4)] = 10
    similarity: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.6
    min_words: Annotated[int, msgspec.Meta(ge=_SHINGLE_WORDS)] = 5

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "questions", tuple(map(_locate, self.questions)))
        _build_index(self)

    def describe(self) -> dict[str, object]:
        files = [{"name": Path(name).name, "sha256": sha256_file(_path_of(name))} for name in self.questions]
        return {**super().describe(), "questions": files}

    def __call__(self, conversation: Conversation) -> Outcome:
        index = _build_index(self)
        outcome = filter_rounds(conversation, index.judge)
        if outcome is conversation or self.drop == "round" or isinstance(outcome, Drop):
            return outcome
        return Drop(outcome.reasons[0]) if not isinstance(outcome, Conversation) else outcome


class _Evaluated(msgspec.Struct, frozen=True):
    """One turn of an evaluation question: its name, its words, the number of its different shingles."""

    name: str
    words: tuple[str, ...]
    shingles: int


class _QuestionIndex:
    """Evaluation questions by their word sequences."""

    def __init__(self, settings: Decontaminate) -> None:
        self._settings = settings
        self._turns: list[_Evaluated] = []
        self._by_shingle: dict[tuple[str, ...], list[int]] = {}
        self._by_run: dict[tuple[str, ...], int] = {}
        # One word of every shingle, the longest: a text with none of them shares no shingle, which is quickly told.
        self._anchors: set[str] = set()
        self._run_lengths: set[int] = set()
        for name in settings.questions:
            before = len(self._turns)
            for question, text in _read_questions(name):
                self._add(f"{Path(name).stem}:{question}", tuple(_WORD.findall(text.casefold())))
            if len(self._turns) == before:
                raise RecipeError(
                    f"decontaminate: no question of {name} has {settings.min_words} words (min_words), so none is looked for.",
                    remedy="lower min_words, or leave the file out; text without spaces has runs between punctuation for words",
                )

    def _add(self, name: str, words: tuple[str, ...]) -> None:
        if len(words) < self._settings.min_words:
            return
        place = len(self._turns)
        shingles = set(_runs(words, _SHINGLE_WORDS))
        self._turns.append(_Evaluated(name, words, len(shingles)))
        for shingle in shingles:
            self._by_shingle.setdefault(shingle, []).append(place)
            self._anchors.add(max(shingle, key=len))
        length = min(len(words), self._settings.ngram_words)
        self._run_lengths.add(length)
        for run in _runs(words, length):
            self._by_run.setdefault(run, place)

    def judge(self, turns: Round) -> str | None:
        """The reason when one of the round's questions is an evaluation's."""
        for message in turns:
            place = self._find(message.content or "") if message.role == "user" else None
            if place is not None:
                return f"asks evaluation question {self._turns[place].name}"
        return None

    def _find(self, text: str) -> int | None:
        words = _WORD.findall(text.casefold())
        if self._anchors.isdisjoint(words):
            return None
        found = [shingle for shingle in _runs(words, _SHINGLE_WORDS) if shingle in self._by_shingle]
        if not found:
            return None
        for length in sorted(self._run_lengths):
            if length - _SHINGLE_WORDS < len(found):
                place = next((self._by_run[run] for run in _runs(words, length) if run in self._by_run), None)
                if place is not None:
                    return place
        shared = Counter(place for shingle in set(found) for place in self._by_shingle[shingle])
        total = len(set(_runs(words, _SHINGLE_WORDS)))
        near = [
            (count / (total + self._turns[place].shingles - count), -place)
            for place, count in shared.items()
            if count >= self._settings.similarity * (total + self._turns[place].shingles - count)
        ]
        return -max(near)[1] if near else None


def _runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    """Every run of `length` words, in order."""
    return zip(*(words[start:] for start in range(length)), strict=False)


@lru_cache(maxsize=4)
def _build_index(settings: Decontaminate) -> _QuestionIndex:
    return _QuestionIndex(settings)


def _shipped_file(name: str) -> Path | None:
    file = resources.files("chaccu") / "judge" / "question_sets" / f"{name}.jsonl"
    return Path(str(file)) if name.replace("-", "_").isidentifier() and file.is_file() else None


def _locate(name: str) -> str:
    """The name of a shipped set as it is, a path made absolute: it is that of the folder in which the step was built."""
    return name if _shipped_file(name) is not None else str(Path(name).absolute())


def _path_of(name: str) -> Path:
    path = _shipped_file(name) or Path(name)
    if not path.is_file():
        raise RecipeError(f"decontaminate: there is no file {name}.", remedy="give the path of a JSONL file of questions")
    return path


def _read_questions(name: str) -> list[tuple[str, str]]:
    """Id (or line number) and text of every turn of the questions in a file."""
    path = _path_of(name)
    with storage_errors(path):
        lines = path.read_bytes().splitlines()
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(f"line {number} of {path} is no JSON: {error}.", remedy="give one JSON object a line") from error
        texts = _texts_of(value)
        if not texts:
            raise DataError(
                f"line {number} of {path} holds no question.",
                remedy='give {"turns": ["…"]}, {"question": "…"} or {"prompt": "…"}',
            )
        questions += [(str(value.get("question_id", value.get("id", number))), text) for text in texts]
    return questions


def _texts_of(value: Any) -> list[str]:
    if not isinstance(value, dict):
        return []
    found: Any = next((value[key] for key in ("turns", "question", "prompt", "text") if value.get(key)), None)
    texts = found if isinstance(found, list) else [found]
    return [text for text in texts if isinstance(text, str)]
