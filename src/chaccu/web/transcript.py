"""What a page knows of a conversation, and how an answer grows in it.

Invariants: a turn keeps what a model has written whatever ended it; a failure stands in the turn in plain words, with its cause
and model, and is never sent to a model as if it were an answer. It ignores how a page looks and imports nothing of Gradio.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from typing import Literal

import msgspec

from chaccu.client import ChatClient, ChatDelta, ChatError, Sampling

TurnState = Literal["waiting", "writing", "done", "stopped", "failed"]
_SHOW_EVERY_S = 0.05


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One message of the person and what became of its answer. Times in seconds since it was sent; `tokens` by the server."""

    prompt: str
    model: str
    state: TurnState = "waiting"
    answer: str = ""
    finish_reason: str | None = None
    cause: str = ""
    error: str = ""
    remedy: str = ""
    first_text_s: float | None = None
    total_s: float | None = None
    tokens: int | None = None


Transcript = tuple[Turn, ...]


def messages_to_ask(turns: Transcript, system: str = "") -> list[dict[str, str]]:
    """What a model is sent: turns that were answered, at least in part, and the last prompt, which awaits its answer."""
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn in turns[:-1]:
        if turn.answer:
            messages += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.answer}]
    return [*messages, {"role": "user", "content": turns[-1].prompt}]


def stopped(turns: Transcript) -> Transcript:
    """The transcript after its reader has stopped the answer."""
    if turns and turns[-1].state in ("waiting", "writing"):
        return (*turns[:-1], msgspec.structs.replace(turns[-1], state="stopped"))
    return turns


async def stream_turn(
    client: ChatClient,
    turns: Transcript,
    *,
    system: str,
    sampling: Sampling,
    clock: Callable[[], float] = time.monotonic,
    show_every_s: float = _SHOW_EVERY_S,
) -> AsyncGenerator[Transcript, None]:
    """The transcript as the last turn's answer grows, at most once in `show_every_s`, and at its end.

    A failed request ends in a turn of state "failed"; nothing is raised for it.
    """
    earlier, turn = turns[:-1], turns[-1]
    began_s = shown_s = clock()
    try:
        async with contextlib.aclosing(client.stream_chat(turn.model, messages_to_ask(turns, system), sampling)) as deltas:
            async for delta in deltas:
                first = turn.first_text_s is None and delta.text != ""
                turn = _grow(turn, delta, clock() - began_s)
                if first or clock() - shown_s >= show_every_s:
                    shown_s = clock()
                    yield (*earlier, turn)
    except ChatError as error:
        turn = msgspec.structs.replace(
            turn,
            state="failed",
            cause=error.cause,
            error=error.message,
            remedy=error.remedy,
            total_s=clock() - began_s,
        )
    yield (*earlier, turn)


def _grow(turn: Turn, delta: ChatDelta, at_s: float) -> Turn:
    if delta.finish_reason is not None:
        tokens = delta.usage.completion_tokens if delta.usage is not None else None
        return msgspec.structs.replace(turn, state="done", finish_reason=delta.finish_reason, total_s=at_s, tokens=tokens)
    first_text_s = at_s if turn.first_text_s is None else turn.first_text_s
    return msgspec.structs.replace(turn, state="writing", answer=turn.answer + delta.text, first_text_s=first_text_s)
