"""Verdicts made up for tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from chaccu.judge.verdicts import Verdict


def verdict(first: str, second: str | None, said: Any, question: int | str = 1, **fields: Any) -> Verdict:
    """A comparison that `said` "first", "second", "tie" or None, or with no `second` a grade."""
    plain: dict[str, Any] = {"category": "math", "turn": 0, "judge": "j", "prompt": "pair", "prompt_sha256": "a" * 64}
    own = {"outcome": said} if second is not None else {"scores": None if said is None else (float(said),)}
    models = (first, second) if second is not None else (first,)
    key = f"{models} {question} {fields}"
    return Verdict(**{**plain, "key": key, "question_id": question, "models": models, "text": "", **own, **fields})


def both_orders(model: str, other: str, winner: str, question: int | str = 1, **fields: Any) -> list[Verdict]:
    """Both orders of a comparison that `winner` wins: `model`, `other`, or "tie", "flip" (the first place wins twice)."""
    if winner in ("tie", "flip"):
        said = ("tie", "tie") if winner == "tie" else ("first", "first")
    else:
        said = ("first", "second") if winner == model else ("second", "first")
    return [verdict(model, other, said[0], question, **fields), verdict(other, model, said[1], question, **fields)]


def write_lines(file: Path, lines: Iterable[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
