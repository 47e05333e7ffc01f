"""The wire between gateway and worker: msgpack frames over one WebSocket, which the worker dials out to the gateway.

One connection carries all requests of a worker, told apart by a number that the gateway gives. A worker opens with `Join`; the
gateway answers `Welcome` or `Refused`. Then the gateway sends `Generate` and `Cancel`, the worker sends `Output` frames (each
may carry pieces of many requests), `Share` when its other gateways give it more or less, `Offers` when its adapters have
changed, and `Drain` when it wants no new work. `LoadAdapter` and `UnloadAdapter` are answered by `OrderDone`.
A `Ping` is answered by a `Pong`, by the program and not by a library below it, so a program that hangs is noticed.

Invariants: every frame is one tagged struct of this module, at most `MAX_FRAME_BYTES` long; each request that was generated
ends with exactly one piece that has an `end`, a cancelled one too, so the gateway knows when the engine has really stopped. It
ignores how either side works.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from chaccu.conversation import Conversation, ToolCallDelta, ToolChat
from chaccu.errors import ServeError

PROTOCOL_VERSION = 5
JOIN_PATH = "/workers/join"
MAX_FRAME_BYTES = 16 * 2**20
PING_INTERVAL_S = 5.0
PING_TIMEOUT_S = 10.0
JOIN_TIMEOUT_S = 10.0
MAX_WEIGHT = 1000.0
MAX_PRIORITY = 1000

End = Literal["stop", "length", "tool_calls", "cancelled", "failed"]
# The last one: the worker has no model of this name any more, so another is to be asked.
FailureKind = Literal["context_overflow", "invalid_request", "engine_failed", "not_served"]


class ModelOffer(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a worker serves. `context_tokens`: prompt and answer of one request together; `slots`: requests at once.

    `weight`: its share of the requests beside equal workers of weight 1; one of higher `priority` gets them first, while it has
    free slots. `abilities`: what its engine carries out of that which not every engine can, as `Generate.needs` names it;
    `vocab_size`: ids of tokens are below it (0: not known). `base`: of an adapter, the model of this worker that it is over.
    """

    name: str
    engine: str
    context_tokens: int
    slots: int
    chat_format: str
    device: str = "cpu"
    weight: float = 1.0
    priority: int = 0
    abilities: tuple[str, ...] = ()
    vocab_size: int = 0
    base: str = ""


class Join(msgspec.Struct, frozen=True, kw_only=True, tag="join"):
    """A worker's first frame. `worker` stays the same when it joins again after a lost connection."""

    protocol: int
    worker: str
    models: tuple[ModelOffer, ...]
    token: str = ""


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """The worker finishes what it has and takes nothing new."""


class Offers(msgspec.Struct, frozen=True, tag="offers"):
    """What the worker serves from now on, all of it: adapters come and go."""

    models: tuple[ModelOffer, ...]


class OrderDone(msgspec.Struct, frozen=True, kw_only=True, tag="order_done"):
    """An order of the gateway's has been carried out, or has not, and why."""

    order: int
    refusal: str = ""
    remedy: str = ""


class Share(msgspec.Struct, frozen=True, kw_only=True, tag="share"):
    """What the worker has beside this gateway: requests `elsewhere`, of `gateways` in all that it has joined."""

    elsewhere: int = 0
    gateways: int = 1


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request failed. `wanted_tokens` and `context_tokens` are set for a context overflow; `parameter`: the one of an
    invalid request that is wrong, where that is known.
    """

    kind: FailureKind
    message: str
    wanted_tokens: int = 0
    context_tokens: int = 0
    parameter: str = ""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token's text in UTF-8, which may be a part of a character, and its log-probability; `top`: the likeliest there."""

    token: bytes
    logprob: float
    top: list[tuple[bytes, float]] = []


class Found(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What answers a question that is not for a text: token `ids`, or `vectors` as 32-bit floats, lowest byte first."""

    ids: list[int] = []
    vectors: list[bytes] = []


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Text of one request with the tokens it accounts for, and their `logprobs` where they are asked for; the last piece has an
    `end`, and a `failure` if that is why, or the stop string of the request that it was `stopped_by`. A `Question` is answered
    in one piece, by its text or by what was `found`. `tool_calls`: parts of calls of functions, after the text.
    """

    request: int
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    end: End | None = None
    failure: Failure | None = None
    stopped_by: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    found: Found | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()


class Output(msgspec.Struct, frozen=True, tag="output"):
    """Pieces in the order they were made, of any number of requests."""

    pieces: list[Piece]


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The worker has joined."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The worker may not join; trying again changes nothing."""

    reason: str
    remedy: str = ""


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens; as in the engines' `GenerationRequest`."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    top_logprobs: int | None = None
    json_schema: str | None = None


class TraceContext(msgspec.Struct, frozen=True, array_like=True):
    """Under which span of which trace a request is worked on, as W3C's headers `traceparent` and `tracestate` have it."""

    traceparent: str
    tracestate: str = ""


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate", omit_defaults=True):
    """One request: a `conversation` whose answer is awaited, a `chat` with functions that may be called, or a raw `prompt`,
    which may be `prompt_ids`.

    `begun`: the answer's text so far, when another worker (or the client) has begun it; only what follows is sent.
    `request_id`: what operators know the client's request by; `trace`: its span, where it has one.
    """

    request: int
    model: str
    sampling: Sampling
    conversation: Conversation | None = None
    prompt: str = ""
    prompt_ids: list[int] = []
    begun: str = ""
    request_id: str = ""
    trace: TraceContext | None = None
    chat: ToolChat | None = None

    def needs(self) -> dict[str, str]:
        """The abilities without which an engine cannot answer this, each with the parameter that asks for it."""
        sampling, needs = self.sampling, {}
        for name, neutral in (("presence_penalty", 0.0), ("frequency_penalty", 0.0), ("repetition_penalty", 1.0)):
            if getattr(sampling, name) != neutral:
                needs["penalties"] = name
        if sampling.logit_bias:
            needs["logit_bias"] = "logit_bias"
        if sampling.top_logprobs is not None:
            needs["logprobs"] = "logprobs"
        if sampling.json_schema is not None:
            needs["json_schema"] = "response_format"
            if self.begun:
                needs["json_resumed"] = "response_format"
        if self.chat is not None:
            needs["tools"] = "tools"
        if self.prompt_ids:
            needs["token_ids"] = "prompt"
        return needs


class Tokenize(msgspec.Struct, frozen=True, kw_only=True, tag="tokenize", omit_defaults=True):
    """The token ids that `asked` is answered behind; of a conversation those without the beginning of a reply, where it
    `awaits_reply` not; of a raw prompt those without the tokenizer's own BOS, where it `adds_bos` not.
    """

    request: int
    model: str
    asked: Generate
    awaits_reply: bool = True
    adds_bos: bool = True
    request_id: str = ""
    trace: TraceContext | None = None


class Detokenize(msgspec.Struct, frozen=True, kw_only=True, tag="detokenize", omit_defaults=True):
    """The text of token `ids`."""

    request: int
    model: str
    ids: list[int]
    request_id: str = ""
    trace: TraceContext | None = None


class Embed(msgspec.Struct, frozen=True, kw_only=True, tag="embed", omit_defaults=True):
    """A vector for each input, which is a text or token ids."""

    request: int
    model: str
    inputs: list[str | list[int]]
    request_id: str = ""
    trace: TraceContext | None = None


Question = Tokenize | Detokenize | Embed


class LoadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="load_adapter"):
    """Load the adapter in the folder `path` and offer it as `name`. Answered by `OrderDone`, after `Offers` that have it."""

    order: int
    name: str
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="unload_adapter"):
    """Offer `name` no more, and unload it once its requests have ended. Answered by `OrderDone`."""

    order: int
    name: str


Order = LoadAdapter | UnloadAdapter


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Nobody waits for this request any more."""

    request: int


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """The gateway asks whether the worker still runs."""


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """It does."""


FromWorker = Join | Offers | Output | Share | Drain | OrderDone | Pong
ToWorker = Welcome | Refused | Generate | Question | Order | Cancel | Ping


class LinkError(ServeError):
    """The other side of a link sent what it must not: an oversized, malformed or unexpected frame."""


def encode_frame(frame: FromWorker | ToWorker) -> bytes:
    """The frame's bytes. Raises `LinkError` when they exceed `MAX_FRAME_BYTES`."""
    data = msgspec.msgpack.encode(frame)
    if len(data) > MAX_FRAME_BYTES:
        raise LinkError(
            f"a frame of {len(data):,} bytes exceeds the limit of {MAX_FRAME_BYTES:,}.", remedy="send less in one request"
        )
    return data


def decode_from_worker(data: bytes) -> FromWorker:
    """A worker's frame. Raises `LinkError` when it is malformed."""
    try:
        return _FROM_WORKER.decode(data)
    except msgspec.DecodeError as error:
        raise LinkError(f"a worker sent a malformed frame: {error}.") from error


def decode_to_worker(data: bytes) -> ToWorker:
    """A gateway's frame. Raises `LinkError` when it is malformed."""
    try:
        return _TO_WORKER.decode(data)
    except msgspec.DecodeError as error:
        raise LinkError(f"the gateway sent a malformed frame: {error}.", remedy="run the same version on both sides") from error


_FROM_WORKER: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
_TO_WORKER: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
