"""A worker's session over a connection made of queues."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from chaccu.conversation import Conversation, Message, load_format
from chaccu.engine import AdapterSource, EngineInfo, EngineLostError, GenerationDelta, GenerationRequest, Usage, resolve_model
from chaccu.engine.scripted import Script, ScriptedEngine, build_byte_tokenizer
from chaccu.serve.link import (
    Cancel,
    Detokenize,
    Drain,
    Embed,
    Generate,
    LinkError,
    ModelOffer,
    Offers,
    OrderDone,
    Output,
    Piece,
    Ping,
    Pong,
    Question,
    Sampling,
    Tokenize,
    ToWorker,
    UnloadAdapter,
    Welcome,
    decode_from_worker,
    encode_frame,
)
from chaccu.serve.worker.prompt import PromptBuilder
from chaccu.serve.worker.served import Served, ServedModels
from chaccu.serve.worker.session import WorkerSession

OFFER = ModelOffer(name="m", engine="scripted", context_tokens=4096, slots=4, chat_format="chatml")


class Wire:
    """Both ends of a connection in one process."""

    def __init__(self) -> None:
        self.to_worker: asyncio.Queue[bytes | Exception] = asyncio.Queue()
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self.orders: asyncio.Queue[OrderDone] = asyncio.Queue()
        self.frames: list[Output | Drain | Pong | Offers | OrderDone] = []

    async def send(self, message: bytes, /) -> None:
        frame = decode_from_worker(message)
        assert isinstance(frame, Output | Drain | Pong | Offers | OrderDone)
        self.frames.append(frame)
        if isinstance(frame, OrderDone):
            self.orders.put_nowait(frame)
        for piece in frame.pieces if isinstance(frame, Output) else []:
            self.pieces.put_nowait(piece)

    async def recv(self) -> bytes:
        data = await self.to_worker.get()
        if isinstance(data, Exception):
            raise data
        return data

    def give(self, frame: ToWorker) -> None:
        self.to_worker.put_nowait(encode_frame(frame))

    async def answer_to(self, request: int) -> list[Piece]:
        """The pieces of `request`, the last included; those of others are dropped."""
        pieces: list[Piece] = []
        while not pieces or pieces[-1].end is None:
            piece = await self.pieces.get()
            if piece.request == request:
                pieces.append(piece)
        return pieces


class Bench:
    """A session that runs, with its wire, its announcements and the event that drains it."""

    def __init__(self, engine: Any, format_name: str = "chatml") -> None:
        self.wire = Wire()
        self.said: list[str] = []
        self.draining = asyncio.Event()
        builder = PromptBuilder(load_format(format_name), build_byte_tokenizer())
        source = resolve_model("scripted:m")
        self.served = ServedModels(engine, Served(offer=OFFER, builder=builder), source, lambda _: builder)
        self.session = WorkerSession(self.wire, self.served, self.said.append)
        self.task = asyncio.create_task(self.session.run(self.draining, 5.0))


@pytest_asyncio.fixture
async def benches() -> AsyncIterator[list[Bench]]:
    made: list[Bench] = []
    yield made
    for bench in made:
        bench.task.cancel()
    await asyncio.gather(*(bench.task for bench in made), return_exceptions=True)


def ask(request: int, text: str = "hi", **fields: Any) -> Generate:
    asked = Conversation(messages=(Message("user", text),))
    return Generate(request=request, model="m", conversation=asked, sampling=Sampling(**fields))


async def test_an_answer_comes_in_pieces_with_its_counts(benches: list[Bench]) -> None:
    bench = Bench(ScriptedEngine(Script(text="one two three")))
    benches.append(bench)
    bench.wire.give(ask(7))
    pieces = await bench.wire.answer_to(7)
    assert "".join(piece.text for piece in pieces) == "one two three"
    assert (sum(piece.tokens for piece in pieces), pieces[-1].end) == (3, "stop")
    assert pieces[-1].prompt_tokens > 5


async def test_a_stop_string_of_the_request_is_named_and_the_formats_own_is_not(benches: list[Bench]) -> None:
    bench = Bench(ScriptedEngine(Script(text="one two<|im_end|> three")))
    benches.append(bench)
    for request, stop in ((1, ("three", "two")), (2, ("three",))):
        bench.wire.give(ask(request, stop=stop))
        pieces = await bench.wire.answer_to(request)
        assert (pieces[-1].end, pieces[-1].stopped_by) == ("stop", "two" if request == 1 else None)


async def test_a_cancelled_request_ends_once_its_engine_has_stopped(benches: list[Bench]) -> None:
    bench = Bench(ScriptedEngine(Script(tokens=500, tokens_per_s=20, slots=1)))
    benches.append(bench)
    bench.wire.give(ask(1))
    await bench.wire.pieces.get()
    bench.wire.give(Cancel(1))
    assert (await bench.wire.answer_to(1))[-1].end == "cancelled"
    bench.wire.give(Cancel(1))  # too late, and harmless
    bench.wire.give(ask(2, max_tokens=1))  # its only slot is free again
    assert (await bench.wire.answer_to(2))[-1].end == "length"


class LostEngine(ScriptedEngine):
    """Is lost after some words: in the middle of an answer, or while nobody asks."""

    is_lost = False

    def check(self) -> None:
        if self.is_lost:
            raise EngineLostError("gone while idle")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        yield GenerationDelta(text="one ", tokens=1)
        await asyncio.sleep(0)
        raise EngineLostError("gone with an answer")


async def test_a_lost_engine_ends_the_session_and_no_answer(benches: list[Bench]) -> None:
    bench = Bench(LostEngine(Script()))
    benches.append(bench)
    bench.wire.give(ask(1))
    with pytest.raises(EngineLostError, match="gone with an answer"):
        await asyncio.wait_for(bench.task, 2)
    # No end of the request: the gateway goes on with it when the connection closes.
    assert all(piece.end is None for frame in bench.wire.frames if isinstance(frame, Output) for piece in frame.pieces)


async def test_an_engine_lost_while_idle_ends_the_session(benches: list[Bench]) -> None:
    engine = LostEngine(Script())
    bench = Bench(engine)
    benches.append(bench)
    await asyncio.sleep(0.01)
    engine.is_lost = True
    with pytest.raises(EngineLostError, match="gone while idle"):
        await asyncio.wait_for(bench.task, 2)


async def test_a_refused_request_leaves_the_others_alone(benches: list[Bench]) -> None:
    bench = Bench(ScriptedEngine(Script(text="fine", context_tokens=60)))
    benches.append(bench)
    bench.wire.give(ask(1, "x" * 100))
    bench.wire.give(ask(2))
    (piece,) = await bench.wire.answer_to(1)
    assert piece.end == "failed"
    assert piece.failure is not None
    assert piece.failure.kind == "context_overflow"
    assert (piece.failure.wanted_tokens > 100, piece.failure.context_tokens) == (True, 60)
    assert (await bench.wire.answer_to(2))[-1].end == "stop"
    assert bench.said == []


async def test_a_crashing_engine_is_reported_without_its_words(benches: list[Bench]) -> None:
    class Crashing:
        info = EngineInfo(engine="crashing", context_tokens=1, slots=1)

        async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
            yield GenerationDelta(text="so ", tokens=1)
            raise RuntimeError("secret /path")

    bench = Bench(Crashing())
    benches.append(bench)
    bench.wire.give(ask(1))
    pieces = await bench.wire.answer_to(1)
    assert [piece.text for piece in pieces] == ["so ", ""]
    assert pieces[-1].failure is not None
    assert "secret" not in pieces[-1].failure.message
    assert "secret /path" in bench.said[0]


@pytest.mark.parametrize(
    ("texts", "seen"), [([" ", "Hello"], "Hello"), ([" Hello"], "Hello"), (["Hello"], "Hello"), ([" "], "")]
)
async def test_the_formats_own_text_is_cut_from_the_answer(benches: list[Bench], texts: list[str], seen: str) -> None:
    class Fixed:
        info = EngineInfo(engine="fixed", context_tokens=99, slots=1)

        async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
            for text in texts:
                yield GenerationDelta(text=text, tokens=1)
            yield GenerationDelta(text="", tokens=0, finish_reason="stop", usage=Usage(1, len(texts)))

    bench = Bench(Fixed(), "vicuna_v1.1")
    benches.append(bench)
    bench.wire.give(ask(1))
    pieces = await bench.wire.answer_to(1)
    assert "".join(piece.text for piece in pieces) == seen
    assert sum(piece.tokens for piece in pieces) == len(texts)


async def test_draining_finishes_what_there_is(benches: list[Bench]) -> None:
    bench = Bench(ScriptedEngine(Script(tokens=10, tokens_per_s=50)))
    benches.append(bench)
    bench.wire.give(ask(1))
    await bench.wire.pieces.get()
    bench.draining.set()
    await asyncio.wait_for(bench.task, 3)
    assert any(isinstance(frame, Drain) for frame in bench.wire.frames)
    assert isinstance(bench.wire.frames[-1], Output)
    assert bench.wire.frames[-1].pieces[-1].end == "stop"


async def test_many_ready_pieces_share_frames(benches: list[Bench]) -> None:
    bench = Bench(ScriptedEngine(Script(tokens=50)))
    benches.append(bench)
    for request in range(20):
        bench.wire.give(ask(request))
    ended = 0
    while ended < 20:
        ended += (await bench.wire.pieces.get()).end is not None
    assert len(bench.wire.frames) < 20 * 50 / 4


async def test_a_ping_is_answered_while_an_answer_is_read(benches: list[Bench]) -> None:
    bench = Bench(ScriptedEngine(Script(text="late", first_token_s=60)))
    benches.append(bench)
    bench.wire.give(ask(1))
    bench.wire.give(Ping())
    await asyncio.sleep(0.1)
    assert bench.wire.frames == [Pong()]


async def test_a_lost_connection_and_a_wrong_frame_end_the_session(benches: list[Bench]) -> None:
    lost = Bench(ScriptedEngine(Script(tokens=500, tokens_per_s=20)))
    lost.wire.give(ask(1))
    await lost.wire.pieces.get()
    lost.wire.to_worker.put_nowait(ConnectionResetError())
    with pytest.raises(ConnectionResetError):
        await lost.task
    wrong = Bench(ScriptedEngine(Script()))
    wrong.wire.give(Welcome())
    with pytest.raises(LinkError, match="unexpected Welcome"):
        await wrong.task


async def test_what_the_engine_cannot_is_refused_by_its_parameter(benches: list[Bench]) -> None:
    bench = Bench(ScriptedEngine(Script()))
    benches.append(bench)
    bench.wire.give(ask(1, presence_penalty=1.0))
    (piece,) = await bench.wire.answer_to(1)
    assert piece.failure is not None
    assert (piece.failure.kind, piece.failure.parameter) == ("invalid_request", "presence_penalty")
    assert "the engine scripted does not carry out presence_penalty" in piece.failure.message
    assert bench.said == []


async def test_logprobs_are_those_of_the_pieces_tokens(benches: list[Bench]) -> None:
    bench = Bench(ScriptedEngine(Script(text="one two three")))
    benches.append(bench)
    bench.wire.give(ask(1, top_logprobs=2))
    pieces = await bench.wire.answer_to(1)
    assert b"".join(one.token for piece in pieces for one in piece.logprobs) == b"one two three"
    assert all(len(one.top) == 2 for piece in pieces for one in piece.logprobs)


async def test_questions_are_answered_in_one_piece(benches: list[Bench]) -> None:
    bench = Bench(ScriptedEngine(Script(context_tokens=50)))
    benches.append(bench)

    async def answer(question: Question) -> Piece:
        bench.wire.give(question)
        (piece,) = await bench.wire.answer_to(question.request)
        return piece

    prompt = await answer(Tokenize(request=1, model="m", asked=ask(0, "hi")))
    assert prompt.found is not None
    text = (await answer(Detokenize(request=2, model="m", ids=prompt.found.ids))).text
    assert text.endswith("<|im_start|>assistant\n")
    assert "<|im_start|>user\nhi<|im_end|>" in text
    ended = await answer(Tokenize(request=3, model="m", asked=ask(0, "hi"), awaits_reply=False))
    assert ended.found is not None
    assert prompt.found.ids[: len(ended.found.ids)] == ended.found.ids
    vectors = await answer(Embed(request=4, model="m", inputs=["<|im_end|>", [1, 2], [1, 2]]))
    assert vectors.found is not None
    assert vectors.found.vectors[1] == vectors.found.vectors[2] != vectors.found.vectors[0]
    # The text of a control token is text: ten bytes.
    assert vectors.prompt_tokens == 14
    unknown = await answer(Detokenize(request=5, model="m", ids=[3, 999]))
    assert unknown.failure is not None
    assert (unknown.failure.kind, unknown.failure.parameter) == ("invalid_request", "tokens")
    assert "no token 999; the vocabulary has 258" in unknown.failure.message
    long = await answer(Embed(request=6, model="m", inputs=["x" * 60]))
    assert long.failure is not None
    assert (long.failure.kind, long.failure.parameter, long.failure.wanted_tokens) == ("context_overflow", "input", 60)


async def test_an_answer_beyond_a_frame_is_refused(benches: list[Bench]) -> None:
    bench = Bench(ScriptedEngine(Script()))
    benches.append(bench)
    control = [257] * 2_000_000
    bench.wire.give(Detokenize(request=1, model="m", ids=control))
    (piece,) = await bench.wire.answer_to(1)
    assert piece.failure is not None
    assert (piece.failure.kind, piece.failure.parameter) == ("invalid_request", "tokens")
    assert "exceeds the limit" in piece.failure.message


class Adaptable(ScriptedEngine):
    """Takes any adapter, and names the one it answers through."""

    async def load_adapter(self, adapter: AdapterSource) -> None:
        pass

    async def unload_adapter(self, name: str) -> None:
        pass

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        yield GenerationDelta(text=str(request.adapter), tokens=1, finish_reason="stop", usage=Usage(1, 1))


async def test_a_request_is_answered_through_the_adapter_it_names_and_changes_are_told(benches: list[Bench]) -> None:
    bench = Bench(Adaptable(Script(text="x")))
    benches.append(bench)
    await bench.served.add(AdapterSource(name="law", folder=Path("nowhere")))
    for request, model in ((1, "m"), (2, "law")):
        bench.wire.give(msgspec.structs.replace(ask(request), model=model))
    texts = [(await bench.wire.answer_to(request))[-1].text for request in (1, 2)]
    assert texts == ["None", "law"]
    bench.wire.give(UnloadAdapter(order=5, name="law"))
    bench.wire.give(UnloadAdapter(order=6, name="law"))
    assert sorted([await bench.wire.orders.get() for _ in range(2)], key=lambda done: done.order) == [
        OrderDone(order=5),
        OrderDone(order=6, refusal="this worker does not serve 'law'."),
    ]
    told = [frame for frame in bench.wire.frames if isinstance(frame, Offers | OrderDone)]
    assert [[offer.name for offer in frame.models] for frame in told if isinstance(frame, Offers)] == [["m", "law"], ["m"]]
    # The offers come before the word that it is done.
    assert isinstance(told[1], Offers)
    bench.wire.give(msgspec.structs.replace(ask(3), model="law"))
    failure = (await bench.wire.answer_to(3))[-1].failure
    assert (failure.kind, failure.message) == ("not_served", "this worker does not serve 'law'.") if failure else False
