from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars

from chaccu.conversation import Conversation
from chaccu.data.clean import clean_conversations
from chaccu.data.config import load_config
from chaccu.data.records import read_conversations
from chaccu.data.steps.forks import Forks

from .talks import talk

BEGIN = "beginning " * 40


def admit(step: Forks, *conversations: Conversation) -> list[str | None]:
    index = step.open_index()
    return [index.admit(step.digest(conversation)) for conversation in conversations]


def test_what_an_earlier_conversation_begins_with_goes_always() -> None:
    whole, short = talk("q", BEGIN, "r", "b"), talk("q", BEGIN)
    assert admit(Forks(), whole, short, whole) == [None, *["beginning of an earlier conversation"] * 2]
    assert admit(Forks(), short, whole) == [None, None]


def test_forks_by_setting() -> None:
    forks = [talk("q", BEGIN, "r", "b"), talk("q", BEGIN, "r", "c"), talk("q", BEGIN, "s", "d"), talk("other", BEGIN)]
    assert admit(Forks(), *forks) == [None] * 4
    fork = "fork of an earlier conversation"
    assert admit(Forks(keep="first"), *forks) == [None, fork, fork, None]
    assert admit(Forks(keep="first", shared_rounds=2), *forks) == [None] * 4


def test_a_greeting_is_no_shared_history() -> None:
    greeted = [talk("Hi", "Hello!", "What is a lake?", "Water."), talk("Hi", "Hello!", "What is a hill?", "Earth.")]
    assert admit(Forks(keep="first"), *greeted) == [None, None]
    with_systems = [talk("q", BEGIN, "r", "b", system="Be brief."), talk("q", BEGIN, "r", "c")]
    assert admit(Forks(keep="first"), *with_systems) == [None, None]


def test_the_longest_stays_with_its_books_in_order(tmp_path: Path, write_dump: Callable[..., Path]) -> None:
    def record(name: str, *texts: str) -> dict[str, object]:
        turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
        return {"id": name, "conversations": turns}

    begin = " ".join(f"shared{place}" for place in range(60))
    ends = [" ".join(f"{name}{place}" for place in range(count)) for name, count in (("a", 40), ("b", 90), ("c", 60))]
    records: list[dict[str, Any]] = [
        record("A_0", "q", begin),
        record("A_1", begin, "r", ends[0]),
        record("B_0", "q", begin, "r", ends[1]),
        record("Other_0", "x", " ".join(f"other{place}" for place in range(60))),
        record("C_0", "q", begin, "r", ends[2]),
    ]
    # The second part begins with the answer of the first.
    records[1]["conversations"] = [{"from": "gpt", "value": begin}, *records[1]["conversations"][1:]]
    config = tmp_path / "clean.yaml"
    config.write_text("steps: [overlap, roles, {forks: {keep: longest}}]")
    outputs = []
    for workers in (1, 2):
        report = clean_conversations(
            [str(write_dump(records))], tmp_path / "out", load_config(config), validation_share=0, workers=workers, fresh=True
        )
        outputs.append({file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()})
    assert outputs[0] == outputs[1]
    assert "waiting.bin" not in outputs[0]
    assert (report.read, report.kept, report.stats.conversations) == (5, 2, 2)
    assert report.dropped == {"forks": {"fork of a longer conversation": 3}}
    assert [one.id for one in read_conversations(tmp_path / "out" / "train.jsonl")] == ["B_0", "Other_0"]
    ledger = polars.read_parquet(tmp_path / "out" / "ledger.parquet").filter(polars.col("action") == "dropped")
    assert ledger["id"].to_list() == ["A_0", "A_1", "C_0"]
