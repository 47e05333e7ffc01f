"""`data convert`: conversations from one kind of file to another, without changing one.

Forms: `jsonl` (Chaccu's own), `parquet` (the same columns), `openai` (messages with the system text as their first, as
fine-tuning services take it; id and source have no place there), `sharegpt` (source has no place). Whatever Chaccu can read
can be converted; a record that is not a whole conversation stops the conversion, since leaving it out is for `data clean`
and its ledger.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, get_args

import msgspec

from chaccu.artifact import atomic_file
from chaccu.conversation import Conversation
from chaccu.data.config import AUTO_READER
from chaccu.data.intake import Intake
from chaccu.data.judging import parse_record
from chaccu.data.outcome import Drop
from chaccu.data.sources import find_sources
from chaccu.data.steps.roles import Roles
from chaccu.errors import DataError, UsageError, did_you_mean

Form = Literal["jsonl", "parquet", "openai", "sharegpt"]
FORMS: tuple[str, ...] = get_args(Form)
_REMEDY = "clean it first, without a token limit: chaccu data clean FILE --out DIR"


def convert_conversations(source: str, out: Path, form: str | None = None) -> int:
    """Write the conversations of `source` (a file, glob or `package:NAME`) to the file `out`; returns how many.

    `form` is one of `FORMS`; without it the name of `out` tells (`.parquet`, else `jsonl`). Raises `UsageError` for an
    unknown form, `StorageError` for what cannot be read or written, `DataError` naming the record that is no conversation.
    """
    form = form or ("parquet" if out.suffix == ".parquet" else "jsonl")
    if form not in FORMS:
        raise UsageError(f"there is no form {form!r}.", remedy=did_you_mean(form, FORMS))
    conversations = _read(source)
    with atomic_file(out) as file:
        if form == "parquet":
            return _write_parquet(conversations, file)
        return _write_lines(conversations, file, {"openai": _to_openai, "sharegpt": _to_sharegpt}.get(form))


def _read(source: str) -> Iterator[Conversation]:
    roles = Roles()
    intake = Intake(find_sources([source]), AUTO_READER)
    for chunk in intake:
        for record in chunk.records:
            draft = parse_record(chunk.reader, chunk.origin, record)
            outcome = draft if isinstance(draft, Drop) else roles.order_turns(draft)
            if not isinstance(outcome, Conversation):
                reason = outcome.reason if isinstance(outcome, Drop) else ", ".join(outcome.reasons)
                raise DataError(f"record {record.number} of {chunk.origin} is no whole conversation: {reason}.", remedy=_REMEDY)
            yield outcome
    if intake.cuts:
        raise DataError(intake.cuts[0].cut.describe(intake.cuts[0].origin), remedy=_REMEDY)


def _write_lines(
    conversations: Iterator[Conversation], file: IO[bytes], shape: Callable[[Conversation], dict[str, Any]] | None
) -> int:
    encode = msgspec.json.Encoder().encode
    count = 0
    for conversation in conversations:
        file.write(encode(conversation if shape is None else shape(conversation)) + b"\n")
        count += 1
    return count


def _write_parquet(conversations: Iterator[Conversation], file: IO[bytes]) -> int:
    import polars

    turn = polars.Struct({"role": polars.String(), "content": polars.String()})
    schema = {"id": polars.String(), "source": polars.String(), "system": polars.String(), "messages": polars.List(turn)}
    # Through lines on disk, so that memory does not grow with the input.
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "conversations.jsonl"
        with lines.open("wb") as rows:
            count = _write_lines(conversations, rows, None)
        polars.scan_ndjson(lines, schema=schema).sink_parquet(file, compression="zstd", maintain_order=True)
    return count


def _to_openai(conversation: Conversation) -> dict[str, Any]:
    system = [{"role": "system", "content": conversation.system}] if conversation.system is not None else []
    return {"messages": system + [{"role": turn.role, "content": turn.content} for turn in conversation.messages]}


def _to_sharegpt(conversation: Conversation) -> dict[str, Any]:
    called = {"user": "human", "assistant": "gpt", "tool": "tool"}
    system = [{"from": "system", "value": conversation.system}] if conversation.system is not None else []
    turns = [{"from": called[turn.role], "value": turn.content} for turn in conversation.messages]
    return {"id": conversation.id, "conversations": system + turns}
