"""Small dumps to clean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOPICS = ["volcanoes", "rivers", "bicycles", "violins", "glaciers", "lighthouses", "orchards", "telescopes", "windmills"]


def share_record(number: int, rounds: int = 2, part: int = 0) -> dict[str, Any]:
    """A ShareGPT record unlike every other."""
    topic = TOPICS[number % len(TOPICS)]
    turns = []
    for step in range(rounds):
        facts = " ".join(f"{topic}-{number}-{step}-{place} stands here" for place in range(12))
        turns.append({"from": "human", "value": f"Tell me fact {step} about {topic} number {number}, please."})
        turns.append({"from": "gpt", "value": f"Here is what I know of {topic}: {facts}."})
    return {"id": f"Talk{number}_{part}", "conversations": turns}


@pytest.fixture
def write_dump(tmp_path: Path) -> Callable[..., Path]:
    def write(records: list[Any], name: str = "dump.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
        return path

    return write
