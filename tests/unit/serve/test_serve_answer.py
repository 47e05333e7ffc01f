"""One answer out of several workers, with workers played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest

from chaccu.conversation import Conversation, Message
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.workers.answer import AnswerPart, Job, stream_answer
from chaccu.serve.gateway.workers.hedging import Hedging
from chaccu.serve.gateway.workers.race import AnswerEvent
from chaccu.serve.gateway.workers.registry import WorkerRegistry
from chaccu.serve.gateway.workers.remote_worker import RemoteWorker
from chaccu.serve.link import Cancel, End, Failure, Generate, ModelOffer, Piece, Sampling, TokenLogprob

ASKED = Conversation(messages=(Message("user", "hi"),))


class Stage:
    """A registry, its workers, and answers that the test writes."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.registry = WorkerRegistry(lambda: self.now_s)
        self.asked = 0
        self.events: list[AnswerEvent] = []
        self.hedging: Hedging | None = Hedging(lambda: self.now_s, least_s=0.05)

    def join(self, name: str, slots: int = 4, priority: int = 0, abilities: tuple[str, ...] = ()) -> RemoteWorker:
        offer = ModelOffer(
            name="m",
            engine="played",
            context_tokens=100,
            slots=slots,
            chat_format="chatml",
            priority=priority,
            abilities=abilities,
        )
        worker = RemoteWorker(name, (offer,), lambda: self.now_s)
        self.registry.add(worker)
        return worker

    def ask(self, *, wait_s: float = 1.0, begun: str = "", **sampling: Any) -> asyncio.Task[list[AnswerPart]]:
        # A question of its own each time, that no worker has read before.
        self.asked += 1
        conversation = Conversation(messages=(Message("user", f"question {self.asked}"),))
        job = Job(model="m", conversation=conversation, begun=begun, sampling=Sampling(**sampling))

        async def collect() -> list[AnswerPart]:
            parts = stream_answer(
                self.registry, job, wait_s=wait_s, max_attempts=3, on_event=self.events.append, hedging=self.hedging
            )
            return [part async for part in parts]

        return asyncio.create_task(collect())


async def next_request(worker: RemoteWorker) -> Generate:
    frame = await asyncio.wait_for(worker.frames.get(), 1)
    assert isinstance(frame, Generate)
    return frame


def write(worker: RemoteWorker, request: Generate, *texts: str, end: End | None = None, failure: Failure | None = None) -> None:
    pieces = [Piece(request.request, text, 1, 9) for text in texts]
    if end is not None:
        pieces.append(Piece(request.request, "", 0, 9, end, failure))
    worker.take_output(pieces)


def text_of(parts: list[AnswerPart]) -> str:
    return "".join(text for part in parts for text in part.texts)


async def test_the_next_worker_goes_on_from_the_text_given() -> None:
    stage = Stage()
    first = stage.join("first")
    answer = stage.ask(max_tokens=10, seed=4)
    request = await next_request(first)
    write(first, request, "a", "b", "c")
    second = stage.join("second")
    stage.registry.remove(first)
    resumed = await next_request(second)
    assert (resumed.begun, resumed.sampling) == ("abc", Sampling(max_tokens=7, seed=4))
    assert resumed.conversation == request.conversation
    write(second, resumed, "d", end="stop")
    parts = await answer
    assert text_of(parts) == "abcd"
    assert parts[-1].usage is not None
    assert (parts[-1].usage.prompt_tokens, parts[-1].usage.completion_tokens) == (9, 4)
    assert {part.prompt_tokens for part in parts} == {9}
    assert stage.events == ["continued"]


async def test_what_the_client_began_comes_before_what_was_given() -> None:
    stage = Stage()
    first = stage.join("first")
    answer = stage.ask(begun="The ")
    request = await next_request(first)
    assert request.begun == "The "
    write(first, request, "end")
    stage.registry.remove(first)
    second = stage.join("second")
    resumed = await next_request(second)
    assert resumed.begun == "The end"
    write(second, resumed, ".", end="stop")
    assert text_of(await answer) == "end."


async def test_an_answer_that_had_only_its_end_to_come_is_complete() -> None:
    stage = Stage()
    worker = stage.join("only")
    answer = stage.ask(max_tokens=2)
    write(worker, await next_request(worker), "a", "b")
    await asyncio.sleep(0)
    stage.registry.remove(worker)
    parts = await answer
    assert (text_of(parts), parts[-1].finish_reason) == ("ab", "length")
    assert parts[-1].usage is not None
    assert parts[-1].usage.prompt_tokens == 9


async def test_with_no_other_worker_the_error_names_model_and_cause() -> None:
    stage = Stage()
    worker = stage.join("only")
    answer = stage.ask(wait_s=0.05)
    write(worker, await next_request(worker), "a")
    stage.registry.remove(worker)
    with pytest.raises(ApiError, match=r"worker of 'm' was lost .* no other one that can go on joined within 0.05 s") as lost:
        await answer
    assert (lost.value.status, lost.value.code) == (503, "worker_lost")
    with pytest.raises(ApiError, match="No worker serves 'm' now") as absent:
        await stage.ask(wait_s=0.01)
    assert (absent.value.status, absent.value.code) == (503, "no_worker")


async def test_a_request_that_kills_its_workers_does_not_kill_them_all() -> None:
    stage = Stage()
    answer = stage.ask()
    for name in "abc":
        worker = stage.join(name)
        await next_request(worker)
        stage.registry.remove(worker)
    survivor = stage.join("d")
    with pytest.raises(ApiError, match="3 in all"):
        await answer
    assert survivor.frames.empty()


async def test_leaving_cancels_and_the_slot_counts_until_the_worker_says_so() -> None:
    stage = Stage()
    worker = stage.join("only")
    answer = stage.ask()
    request = await next_request(worker)
    answer.cancel()
    await asyncio.gather(answer, return_exceptions=True)
    assert await worker.frames.get() == Cancel(request.request)
    assert worker.outstanding == 1
    write(worker, request, end="cancelled")
    assert worker.outstanding == 0


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (
            Failure(kind="context_overflow", message="too long", wanted_tokens=9, context_tokens=5),
            400,
            "context_length_exceeded",
        ),
        (Failure(kind="invalid_request", message="no such role"), 400, "invalid_value"),
        (Failure(kind="engine_failed", message="broken"), 500, "engine_failed"),
    ],
)
async def test_a_workers_failure_becomes_the_clients_error(failure: Failure, status: int, code: str) -> None:
    stage = Stage()
    worker = stage.join("only")
    answer = stage.ask()
    write(worker, await next_request(worker), end="failed", failure=failure)
    with pytest.raises(ApiError, match=failure.message) as caught:
        await answer
    assert (caught.value.status, caught.value.code) == (status, code)
    assert worker.outstanding == 0


async def test_a_suspended_workers_answers_go_on_elsewhere_and_its_late_pieces_are_dropped() -> None:
    stage = Stage()
    frozen = stage.join("frozen")
    answer = stage.ask(seed=1)
    request = await next_request(frozen)
    write(frozen, request, "a", "b")
    await asyncio.sleep(0)
    frozen.suspend()
    other = stage.join("other")
    resumed = await next_request(other)
    assert resumed.begun == "ab"
    assert await frozen.frames.get() == Cancel(request.request)
    assert (frozen.outstanding, stage.registry.room("m")) == (1, 4)
    assert [status.state for status in stage.registry.statuses()] == ["suspended", "ready"]
    stage.registry.resume(frozen)
    write(frozen, request, "c", "d", end="stop")
    write(other, resumed, "c", end="stop")
    assert text_of(await answer) == "abc"
    assert (frozen.outstanding, stage.registry.room("m")) == (0, 8)


async def test_the_only_worker_goes_on_when_it_is_heard_again() -> None:
    stage = Stage()
    only = stage.join("only")
    answer = stage.ask()
    write(only, await next_request(only), "a")
    await asyncio.sleep(0)
    only.suspend()
    await asyncio.sleep(0)
    stage.registry.resume(only)
    assert isinstance(await only.frames.get(), Cancel)
    resumed = await next_request(only)
    write(only, resumed, "b", end="stop")
    assert text_of(await answer) == "ab"


async def usual_answers(stage: Stage, worker: RemoteWorker, count: int = 25) -> None:
    """So many answers of which each begins at once."""
    for _ in range(count):
        answer = stage.ask()
        write(worker, await next_request(worker), "x", end="stop")
        await answer


async def test_a_failed_engine_hands_its_request_to_another_worker() -> None:
    stage = Stage()
    broken, sound = stage.join("broken", priority=1), stage.join("sound")
    broken_failure = Failure(kind="engine_failed", message="out of memory")
    answer = stage.ask(seed=3)
    write(broken, await next_request(broken), end="failed", failure=broken_failure)
    request = await next_request(sound)
    assert request.begun == ""
    write(sound, request, "a", "b")
    await asyncio.sleep(0)
    write(sound, request, end="failed", failure=broken_failure)
    # Both have failed; what the last one said is what the client is told.
    with pytest.raises(ApiError, match="out of memory") as caught:
        await answer
    assert caught.value.code == "engine_failed"
    assert stage.events == ["retried"]


async def test_a_worker_whose_engine_fails_again_and_again_is_left_out_and_tried_later() -> None:
    stage = Stage()
    broken, sound = stage.join("broken", priority=1), stage.join("sound")

    async def ask() -> str:
        answer = stage.ask()
        await asyncio.sleep(0)
        while not broken.frames.empty():
            frame = broken.frames.get_nowait()
            if isinstance(frame, Generate):
                write(broken, frame, end="failed", failure=Failure(kind="engine_failed", message="no"))
        write(sound, await next_request(sound), "fine", end="stop")
        stage.now_s += 0.01
        return text_of(await answer)

    assert [await ask() for _ in range(40)] == ["fine"] * 40
    assert stage.events == ["retried"] * 3
    assert [status.state for status in stage.registry.statuses()] == ["resting", "ready"]
    assert stage.registry.room("m") == 4
    stage.now_s += 1
    assert stage.registry.room("m") == 5
    assert [await ask() for _ in range(40)] == ["fine"] * 40
    assert stage.events == ["retried"] * 4
    stage.registry.remove(sound)
    # The only one left is asked, however often it has failed.
    assert stage.registry.room("m") == 4
    answer = stage.ask()
    write(broken, await next_request(broken), "well", end="stop")
    assert text_of(await answer) == "well"
    assert [status.state for status in stage.registry.statuses()] == ["ready", "lost"]


async def test_an_answer_slow_to_begin_is_asked_of_a_second_worker_and_the_first_text_wins() -> None:
    stage = Stage()
    quick = stage.join("quick")
    await usual_answers(stage, quick)
    slow = stage.join("slow", priority=1)
    for winner in ("second", "first"):
        answer = stage.ask(seed=5)
        first_request = await next_request(slow)
        second_request = await next_request(quick)
        assert second_request.sampling == first_request.sampling
        won, lost = (quick, slow) if winner == "second" else (slow, quick)
        requests = {quick: second_request, slow: first_request}
        write(won, requests[won], "a")
        await asyncio.sleep(0)
        assert await lost.frames.get() == Cancel(requests[lost].request)
        write(lost, requests[lost], "a", end="cancelled")
        write(won, requests[won], "b", end="stop")
        assert text_of(await answer) == "ab"
        assert (quick.outstanding, slow.outstanding) == (0, 0)
        if winner == "second":
            assert stage.events == ["hedged", "hedge_won"]
            await usual_answers(stage, slow)  # so that a second request has been earned again
    assert stage.events == ["hedged", "hedge_won", "hedged"]


async def test_a_lost_racer_leaves_the_answer_to_the_other() -> None:
    stage = Stage()
    quick = stage.join("quick")
    await usual_answers(stage, quick)
    slow = stage.join("slow", priority=1)
    answer = stage.ask()
    await next_request(slow)
    request = await next_request(quick)
    stage.registry.remove(slow)
    write(quick, request, "a", end="stop")
    assert text_of(await answer) == "a"
    assert stage.events == ["hedged", "hedge_won"]


async def test_no_second_worker_is_asked_while_it_is_full_or_hedging_is_off() -> None:
    stage = Stage()
    quick = stage.join("quick", slots=1)
    await usual_answers(stage, quick)
    slow = stage.join("slow", slots=1, priority=1)
    first, second = stage.ask(), stage.ask()
    requests = [(worker, await next_request(worker)) for worker in (slow, quick)]
    await asyncio.sleep(0.15)
    assert (quick.outstanding, slow.outstanding, stage.events) == (1, 1, [])
    for worker, request in requests:
        write(worker, request, "a", end="stop")
    await asyncio.gather(first, second)
    stage.hedging = None
    answer = stage.ask()
    await asyncio.sleep(0.15)
    assert (quick.outstanding + slow.outstanding, stage.events) == (1, [])
    answer.cancel()


async def test_what_a_client_does_not_read_is_bounded_and_the_answer_goes_on_once_it_reads() -> None:
    stage = Stage()
    worker = stage.join("only")
    job = Job(model="m", conversation=ASKED, sampling=Sampling())
    parts = stream_answer(stage.registry, job, wait_s=1, max_attempts=1, on_event=stage.events.append)
    begun = asyncio.ensure_future(anext(parts))
    request = await next_request(worker)
    write(worker, request, "0 ")
    text = text_of([await begun])
    for index in range(1, 6000):
        write(worker, request, f"{index} ")
    assert worker.frames.get_nowait() == Cancel(request.request)
    write(worker, request, end="cancelled")
    rest = asyncio.create_task(collect(parts))
    resumed = await next_request(worker)
    text += resumed.begun.removeprefix(text)
    assert len(text.split()) == 4097
    write(worker, resumed, *(f"{index} " for index in range(4097, 6000)), end="stop")
    last = await rest
    assert "0 " + text_of(last) == "".join(f"{index} " for index in range(6000))
    assert last[-1].usage is not None
    assert last[-1].usage.completion_tokens == 6000
    assert stage.events == ["paused"]


async def test_a_worker_that_joins_again_replaces_itself() -> None:
    stage = Stage()
    former = stage.join("same")
    answer = stage.ask()
    write(former, await next_request(former), "a")
    latter = stage.join("same")
    stage.registry.remove(former)  # the old connection is noticed to be dead only now
    resumed = await next_request(latter)
    write(latter, resumed, "b", end="stop")
    assert text_of(await answer) == "ab"
    assert [status.state for status in stage.registry.statuses()] == ["ready"]


async def test_a_conversation_goes_back_to_the_worker_that_has_read_it() -> None:
    stage = Stage()
    workers = [stage.join(name) for name in "abc"]

    async def answer(messages: tuple[Message, ...], text: str) -> RemoteWorker:
        job = Job(model="m", conversation=Conversation(messages=messages, system="be kind"), sampling=Sampling())
        parts = stream_answer(stage.registry, job, wait_s=1, max_attempts=3, on_event=stage.events.append)
        task = asyncio.create_task(collect(parts))
        await asyncio.sleep(0)
        (given,) = [worker for worker in workers if worker.outstanding]
        request = await next_request(given)
        write(given, request, text, end="stop")
        assert text_of(await task) == text
        return given

    talks = [(Message("user", f"question {index} " * 20),) for index in range(3)]
    asked = [await answer(talk, f"answer {index} " * 20) for index, talk in enumerate(talks)]
    for index in (2, 0, 1):
        stage.now_s += 1
        messages = (*talks[index], Message("assistant", f"answer {index} " * 20), Message("user", "and then?"))
        assert await answer(messages, "so") is asked[index]


async def collect(parts: AsyncGenerator[AnswerPart, None]) -> list[AnswerPart]:
    return [part async for part in parts]


async def test_lost_workers_are_remembered_and_bounded() -> None:
    stage = Stage()
    for index in range(150):
        stage.registry.remove(stage.join(f"w{index}"))
    statuses = stage.registry.statuses()
    assert len(statuses) == 100
    assert {status.state for status in statuses} == {"lost"}
    assert statuses[0].worker == "w149"
    assert stage.registry.models() == {}
    assert stage.registry.knows("m")


@pytest.mark.parametrize(
    ("joined", "asked", "status", "text"),
    [
        ([], "m", 503, "No model is served yet"),
        (["m"], "mm", 404, "'mm' does not exist; did you mean 'm'"),
        (["m"], "other", 404, "'other' does not exist; known: m."),
    ],
)
def test_unknown_models(joined: list[str], asked: str, status: int, text: str) -> None:
    stage = Stage()
    for name in joined:
        stage.join(name)
    with pytest.raises(ApiError, match=text) as caught:
        stage.registry.check_known(asked, [])
    assert caught.value.status == status


async def test_only_a_worker_that_has_the_abilities_is_asked_and_goes_on() -> None:
    stage = Stage()
    idle = stage.join("idle", slots=64)
    able = stage.join("able", abilities=("json_schema",))
    answer = stage.ask(json_schema="{}")
    request = await next_request(able)
    assert idle.frames.empty()
    write(able, request, "{")
    stage.registry.remove(able)
    # One that could begin such an answer cannot go on with it; this one can.
    fresh = stage.join("fresh", slots=64, abilities=("json_schema",))
    resuming = stage.join("resuming", abilities=("json_schema", "json_resumed"))
    resumed = await next_request(resuming)
    assert (resumed.begun, resumed.sampling.json_schema) == ("{", "{}")
    assert fresh.frames.empty()
    write(resuming, resumed, "}", end="stop")
    assert text_of(await answer) == "{}"
    stage.registry.remove(resuming)
    cut = stage.ask(json_schema="{}", wait_s=0.05)
    write(fresh, await next_request(fresh), "{")
    stage.registry.remove(fresh)
    with pytest.raises(ApiError, match="no other one that can go on joined") as lost:
        await cut
    assert lost.value.code == "worker_lost"


async def test_logprobs_come_with_their_texts() -> None:
    stage = Stage()
    worker = stage.join("only", abilities=("logprobs",))
    answer = stage.ask(top_logprobs=1)
    request = await next_request(worker)
    told = TokenLogprob(b"a", -0.5, [(b"a", -0.5)])
    worker.take_output([Piece(request.request, "a", 1, 9, logprobs=[told])])
    write(worker, request, end="stop")
    assert [one for part in await answer for one in part.logprobs] == [told]


NOT_SERVED = Failure(kind="not_served", message="not any more")


async def test_a_worker_that_serves_the_model_no_more_is_followed_by_one_that_does() -> None:
    stage = Stage()
    first, second = stage.join("first"), stage.join("second", priority=-1)
    answer = stage.ask()
    # On its way while the worker withdrew the model.
    request = await next_request(first)
    stage.registry.change_offers(first, ())
    write(first, request, end="failed", failure=NOT_SERVED)
    write(second, await next_request(second), "here", end="stop")
    assert text_of(await answer) == "here"
    assert (stage.events, stage.registry.knows("m")) == ([], True)


async def test_a_model_whose_last_worker_withdrew_it_is_not_there() -> None:
    stage = Stage()
    worker = stage.join("one")
    sent = stage.ask()
    request = await next_request(worker)
    worker.held = True
    waits = stage.ask(wait_s=30)
    await asyncio.sleep(0)
    other = msgspec.structs.replace(worker.offers["m"], name="other")
    stage.registry.change_offers(worker, (other,))
    write(worker, request, end="failed", failure=NOT_SERVED)
    for answer in (sent, waits):
        with pytest.raises(ApiError, match="'m' does not exist; known: other") as caught:
            await asyncio.wait_for(answer, 1)
        assert (caught.value.status, caught.value.code) == (404, "model_not_found")


async def test_a_model_is_known_while_another_worker_has_it_or_the_last_was_lost() -> None:
    stage = Stage()
    first, second = stage.join("first"), stage.join("second")
    stage.registry.change_offers(first, ())
    assert stage.registry.knows("m")
    stage.registry.remove(second)
    assert stage.registry.knows("m")
