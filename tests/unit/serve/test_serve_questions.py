"""Questions to workers: what clients may send, and what becomes of a question whose worker is lost."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from typing import Any

import msgspec
import pytest

from chaccu.serve.gateway.dialects.parameters import parse_body
from chaccu.serve.gateway.dialects.question_bodies import (
    EMBEDDINGS_UNUSED,
    TOKENIZE_UNUSED,
    EmbeddingsBody,
    TokenizeBody,
)
from chaccu.serve.gateway.errors import ApiError
from chaccu.serve.gateway.workers.questions import ask_worker
from chaccu.serve.gateway.workers.registry import WorkerRegistry
from chaccu.serve.gateway.workers.remote_worker import RemoteWorker
from chaccu.serve.link import Detokenize, Failure, Found, ModelOffer, Piece


def embeddings(given: Any, **more: Any) -> EmbeddingsBody:
    return parse_body({"model": "m", "input": given, **more}, EmbeddingsBody, EMBEDDINGS_UNUSED)


@pytest.mark.parametrize(
    ("given", "inputs"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2.0], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_every_form_of_input(given: Any, inputs: list[Any]) -> None:
    (question,) = embeddings(given, user="someone", dimensions=None).questions()
    assert question.inputs == inputs


def test_many_inputs_are_asked_in_several_questions() -> None:
    questions = embeddings([str(index) for index in range(70)]).questions()
    assert [len(question.inputs) for question in questions] == [32, 32, 6]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("", "empty"),
        ([], "there are 0 inputs"),
        (["a"] * 2049, "there are 2,049 inputs; send 1 to 2,048"),
        (["a", ""], "input 1 = ''"),
        (["a", 5], "input 1 = 5"),
        ([[1], []], r"input 1 = []"),
        ([-1], "input 0 = -1"),
        ([[1.5]], "input 0 = [1.5]"),
        ([True], "input 0 = True"),
    ],
)
def test_an_input_that_is_none_is_named(given: Any, text: str) -> None:
    with pytest.raises(ApiError) as caught:
        embeddings(given).questions()
    assert (caught.value.status, caught.value.param) == (400, "input")
    assert text in caught.value.message


def test_other_wrong_values() -> None:
    for fields, param in (({"dimensions": 8}, "dimensions"), ({"encoding_format": "hex"}, "encoding_format")):
        with pytest.raises(ApiError) as caught:
            embeddings("a", **fields)
        assert caught.value.param == param
    messages = [{"role": "user", "content": "hi"}]
    for fields in ({}, {"prompt": "x", "messages": messages}):
        with pytest.raises(ApiError, match="send one of them"):
            parse_body({"model": "m", **fields}, TokenizeBody, TOKENIZE_UNUSED).questions()


def test_vectors_as_numbers_and_as_base64() -> None:
    packed = struct.pack("<3f", 0.5, -1.0, 0.25)
    piece = Piece(1, prompt_tokens=4, end="stop", found=Found(vectors=[packed]))
    plain = json.loads(msgspec.json.encode(embeddings("a").write([piece], 9)))
    assert plain["data"] == [{"object": "embedding", "index": 0, "embedding": [0.5, -1.0, 0.25]}]
    assert plain["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    coded = embeddings("a", encoding_format="base64").write([piece], 9).data[0].embedding
    assert base64.b64decode(str(coded)) == packed


class Stage:
    def __init__(self) -> None:
        self.registry = WorkerRegistry(lambda: 0.0)
        self.tried: list[str] = []

    def join(self, name: str, *abilities: str) -> RemoteWorker:
        offer = ModelOffer(name="m", engine="played", context_tokens=9, slots=1, chat_format="chatml", abilities=abilities)
        worker = RemoteWorker(name, (offer,), lambda: 0.0)
        self.registry.add(worker)
        return worker

    def ask(self, *needs: str, max_attempts: int = 2) -> asyncio.Task[Piece]:
        question = Detokenize(request=0, model="m", ids=[5])
        asked = ask_worker(
            self.registry,
            question,
            needs=frozenset(needs),
            wait_s=0.1,
            max_attempts=max_attempts,
            on_tried=self.tried.append,
        )
        return asyncio.create_task(asked)


async def number_of(worker: RemoteWorker) -> int:
    frame = await asyncio.wait_for(worker.frames.get(), 1)
    assert isinstance(frame, Detokenize)
    return frame.request


async def test_another_worker_is_asked_the_same_when_one_is_lost() -> None:
    stage = Stage()
    first = stage.join("first", "embeddings")
    asked = stage.ask("embeddings")
    await number_of(first)
    assert first.outstanding == 1
    stage.join("weak")
    second = stage.join("second", "embeddings")
    stage.registry.remove(first)
    answer = Piece(await number_of(second), end="stop", found=Found(ids=[1]))
    second.take_output([answer])
    assert await asked == answer
    assert (stage.tried, second.outstanding) == (["first", "second"], 0)


async def test_what_a_worker_refuses_or_loses_is_an_error() -> None:
    stage = Stage()
    worker = stage.join("only")
    refused = stage.ask()
    failure = Failure(kind="invalid_request", message="no token 5", parameter="tokens")
    worker.take_output([Piece(await number_of(worker), end="failed", failure=failure)])
    with pytest.raises(ApiError, match="no token 5") as caught:
        await refused
    assert (caught.value.status, caught.value.param) == (400, "tokens")
    lost = stage.ask(max_attempts=1)
    await number_of(worker)
    stage.registry.remove(worker)
    with pytest.raises(ApiError, match=r"1 in all") as gone:
        await lost
    assert gone.value.code == "worker_lost"
    with pytest.raises(ApiError, match="No worker serves 'm' now"):
        await stage.ask()
