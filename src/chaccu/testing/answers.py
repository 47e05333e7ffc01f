"""Answers as `chaccu judge run` leaves them, for tests of what comes after."""

from __future__ import annotations

from chaccu.judge import Answer


def build_answer(
    question_id: int | str, model: str, text: str, *, turn: int = 0, category: str = "x", tokens: int | None = 1
) -> Answer:
    """A whole answer of which only what is given matters."""
    return Answer(
        question_id=question_id,
        turn=turn,
        category=category,
        model=model,
        text=text,
        first_token_s=None,
        total_s=0.1,
        tokens=tokens,
        finish_reason="stop",
        key="k",
    )
