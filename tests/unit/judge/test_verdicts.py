"""Verdicts of two orders become one comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from chaccu.errors import DataError
from chaccu.judge.verdicts import Verdict, compare_orders, read_verdicts


def verdict(first: str, second: str, outcome: Any, **fields: Any) -> Verdict:
    place: dict[str, Any] = {"key": f"{first}{second}", "question_id": 1, "category": "math", "turn": 0}
    plain = {**place, "judge": "j", "prompt": "pair", "prompt_sha256": "0", "text": "…"}
    return Verdict(models=(first, second), outcome=outcome, **{**plain, **fields})


@pytest.mark.parametrize(
    ("one", "other", "winner", "flip", "consistent"),
    [
        ("first", "second", "model_a", False, True),
        ("second", "first", "model_b", False, True),
        ("tie", "tie", "tie", False, True),
        ("first", "first", "tie", True, False),
        ("second", "second", "tie", True, False),
        ("first", "tie", "tie", False, False),
        ("first", None, None, False, False),
        (None, None, None, False, False),
    ],
)
def test_a_pair_is_won_where_both_orders_say_so(one: Any, other: Any, winner: Any, flip: bool, consistent: bool) -> None:
    # Shown as b, a it is the same pair.
    (found,) = compare_orders([verdict("b", "a", other), verdict("a", "b", one)])
    assert (found.model_a, found.model_b, found.orders) == ("a", "b", 2)
    assert (found.winner, found.is_flip, found.is_consistent) == (winner, flip, consistent)


def test_one_order_alone_counts_and_is_not_called_consistent() -> None:
    (found,) = compare_orders([verdict("b", "a", "first")])
    assert (found.winner, found.orders, found.is_flip, found.is_consistent) == ("model_b", 1, False, False)


def test_questions_turns_judges_prompts_and_pairs_stay_apart_and_grades_are_left_out() -> None:
    changes: list[dict[str, Any]] = [{}, {"question_id": 2}, {"turn": 1}, {"judge": "k"}, {"prompt": "other"}]
    verdicts = [verdict("a", "b", "first", **fields) for fields in changes] + [verdict("a", "c", "tie")]
    grade = msgspec.structs.replace(verdicts[0], models=("a",), outcome=None, scores=(7.0,))
    assert len(compare_orders([*verdicts, grade])) == len(verdicts)
    assert grade.is_parsed
    assert not grade.is_comparison


def test_of_an_order_that_is_there_twice_the_last_counts() -> None:
    (found,) = compare_orders([verdict("a", "b", "first"), verdict("a", "b", "second")])
    assert (found.winner, found.orders) == ("model_b", 1)


def test_verdicts_are_read_back_and_a_line_that_was_cut_off_is_not(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    kept = [verdict("a", "b", "first"), verdict("a", "b", None, scores=(8.0, 7.5), flags=("truncated",))]
    file.write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in kept) + b'{"key": "x", "quest')
    assert read_verdicts(file) == kept
    file.write_bytes(b'{"key": 1}\n')
    with pytest.raises(DataError, match=r"line 1 of .* is no verdict"):
        read_verdicts(file)
