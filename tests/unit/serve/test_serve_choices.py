"""Several answers of one request, merged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from chaccu.serve.gateway.workers.answer import AnswerPart, AnswerUsage, Job
from chaccu.serve.gateway.workers.choices import collect_choices, derive_seed, stream_choices
from chaccu.serve.link import Sampling


class Stage:
    """Answers of three words each, one a turn of the loop; it keeps what was asked and how many were under way at once."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.seeds: list[int | None] = []
        self.under_way = self.most = self.closed = 0
        self._fails_at = fails_at

    async def answer(self, job: Job) -> AsyncGenerator[AnswerPart, None]:
        number = len(self.seeds)
        self.seeds.append(job.sampling.seed)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            for word in ("a", "b", "c"):
                await asyncio.sleep(0)
                if number == self._fails_at:
                    raise LookupError("no more")
                yield AnswerPart([f"{word}{number}"], prompt_tokens=9)
            yield AnswerPart([], "stop", AnswerUsage(9, 3), 9)
        finally:
            self.under_way -= 1
            self.closed += 1


def job(n: int, seed: int | None = 7) -> Job:
    return Job(model="m", sampling=Sampling(seed=seed), n=n)


@pytest.mark.parametrize(("n", "lanes"), [(1, 4), (3, 1), (3, 2), (5, 8), (4, 0)])
async def test_all_choices_come_whole_and_are_counted_once(n: int, lanes: int) -> None:
    stage = Stage()
    parts = [part async for part in stream_choices(job(n), lanes, stage.answer)]
    texts = ["".join(text for part in parts if part.index == index for text in part.texts) for index in range(n)]
    assert sorted(texts) == [f"a{index}b{index}c{index}" for index in range(n)]
    assert sorted(part.index for part in parts if part.finish_reason) == list(range(n))
    assert [part.usage for part in parts if part.usage] == [AnswerUsage(9, 3 * n)]
    assert parts[-1].usage is not None
    assert stage.most <= max(1, lanes)
    assert stage.under_way == 0


async def test_whole_choices_are_sorted() -> None:
    choices, usage = await collect_choices(stream_choices(job(3), 2, Stage().answer))
    assert [choice.last.index for choice in choices] == [0, 1, 2]
    assert [choice.text for choice in choices] == ["a0b0c0", "a1b1c1", "a2b2c2"]
    assert usage == AnswerUsage(9, 9)


async def test_seeds_are_derived_and_repeat() -> None:
    first, again, unseeded = Stage(), Stage(), Stage()
    for stage, seed in ((first, 7), (again, 7), (unseeded, None)):
        await collect_choices(stream_choices(job(4, seed), 1, stage.answer))
    assert first.seeds == again.seeds
    assert first.seeds[0] == 7
    assert len(set(first.seeds)) == 4
    assert unseeded.seeds == [None] * 4
    assert all(-(2**63) <= (derive_seed(2**63 - 1, index) or 0) < 2**63 for index in range(128))


async def test_one_that_fails_ends_them_all() -> None:
    stage = Stage(fails_at=1)
    with pytest.raises(LookupError):
        await collect_choices(stream_choices(job(8), 3, stage.answer))
    assert (stage.under_way, len(stage.seeds)) == (0, stage.closed)


async def test_leaving_ends_them_all_and_a_slow_reader_holds_them_up() -> None:
    stage = Stage()
    parts = stream_choices(job(6), 2, stage.answer)
    await anext(parts)
    await asyncio.sleep(0.01)
    # Two answers are under way, and none of the rest has been begun for a reader that has taken one part.
    assert len(stage.seeds) == 2
    await parts.aclose()
    assert (stage.under_way, stage.closed) == (0, 2)
