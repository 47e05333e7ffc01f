"""`fake_judge`: a judge model for tests, whose verdicts follow from what it is asked.

Invariant: equal messages give equal verdicts, in this process and the next. It ignores quality: a verdict is drawn from a hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Literal

from chaccu.testing.fake_openai import FakeModel

VerdictForm = Literal["letter", "pair", "single", "unparsable"]


def fake_judge(form: VerdictForm, *, delay_s: float = 0.0) -> FakeModel:
    """A model for `FakeOpenAI` that answers with verdicts in one form.

    "letter": `[[A]]`, `[[B]]` or `[[C]]` (a tie). "pair": two scores from 1 to 10 in the first line. "single": `Rating: [[7]]`.
    "unparsable": words without a verdict.
    """
    write = _WRITERS[form]
    return FakeModel(answer=lambda messages: write(_draw(messages)), delay_s=delay_s)


def _draw(messages: list[dict[str, Any]]) -> int:
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _write_letter(draw: int) -> str:
    return f"Both answers were read with care. The verdict is [[{'ABC'[draw % 3]}]]"


def _write_pair(draw: int) -> str:
    return f"{draw % 10 + 1} {draw // 10 % 10 + 1}\nThe first number is for the first answer, the second for the second."


def _write_single(draw: int) -> str:
    return f"The answer was read with care. Rating: [[{draw % 10 + 1}]]"


def _write_unparsable(draw: int) -> str:
    return "I would rather not say which of them is better."


_WRITERS: MappingProxyType[VerdictForm, Callable[[int], str]] = MappingProxyType(
    {"letter": _write_letter, "pair": _write_pair, "single": _write_single, "unparsable": _write_unparsable}
)
