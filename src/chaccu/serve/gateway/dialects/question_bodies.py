"""What clients send to `/tokenize`, `/detokenize` and `/v1/embeddings`, and what they get.

The first two are as vLLM's server has them, the third is OpenAI's. Invariant: every refusal is an `ApiError` that names the
parameter. It ignores models and workers.
"""

from __future__ import annotations

import base64
import struct
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec

from chaccu.serve.gateway.dialects.parameters import AnyMessages, Unused, chat_job
from chaccu.serve.gateway.errors import bad_request
from chaccu.serve.gateway.workers.texts_or_ids import ID, describe_texts, read_ids, read_texts
from chaccu.serve.link import Detokenize, Embed, Generate, Piece, Sampling, Tokenize

MAX_INPUTS = 2048
# So many vectors fit into a frame, however wide they are; and other requests have their turns between.
_INPUTS_AT_ONCE = 32
TOKENIZE_UNUSED = Unused(
    neutral=MappingProxyType({"return_token_strs": (False,), "continue_final_message": (False,)}), about=frozenset()
)
EMBEDDINGS_UNUSED = Unused(neutral=MappingProxyType({"dimensions": ()}), about=frozenset({"user"}))


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A raw prompt, or messages; one of both."""

    model: str
    prompt: str | None = None
    messages: AnyMessages | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = True

    def questions(self) -> list[Tokenize]:
        """The one question. Raises `ApiError` unless there is one of prompt and messages."""
        if (self.prompt is None) == (self.messages is None):
            which = "both a prompt and messages" if self.messages is not None else "neither a prompt nor messages"
            raise bad_request(f"there are {which}; send one of them.", code="invalid_value", param="prompt")
        if self.messages is None:
            asked = Generate(request=0, model=self.model, sampling=Sampling(), prompt=self.prompt or "")
            return [Tokenize(request=0, model=self.model, asked=asked, adds_bos=self.add_special_tokens)]
        asked = chat_job(self.model, self.messages, Sampling()).request()
        return [Tokenize(request=0, model=self.model, asked=asked, awaits_reply=self.add_generation_prompt)]

    def write(self, pieces: list[Piece], context_tokens: int) -> TokenizeAnswer:
        """What the worker found."""
        ids = [token for piece in pieces if piece.found is not None for token in piece.found.ids]
        return TokenizeAnswer(count=len(ids), max_model_len=context_tokens, tokens=ids)


class TokenizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Ids of the tokens, how many, and how many the model's context holds."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ids of tokens."""

    model: str
    tokens: Annotated[list[Any], msgspec.Meta(extra_json_schema={"items": ID})]

    def questions(self) -> list[Detokenize]:
        """The one question. Raises `ApiError` for what is no id."""
        ids = read_ids(self.tokens)
        if ids is None:
            wrong = next(one for one in self.tokens if read_ids([one]) is None)
            raise bad_request(f"tokens has {wrong!r:.80}; ids are integers from 0.", code="invalid_value", param="tokens")
        return [Detokenize(request=0, model=self.model, ids=ids)]

    def write(self, pieces: list[Piece], context_tokens: int) -> DetokenizeAnswer:
        """What the worker found."""
        return DetokenizeAnswer(pieces[0].text)


class DetokenizeAnswer(msgspec.Struct, frozen=True):
    """Their text, control tokens included."""

    prompt: str


class EmbeddingsBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One or several texts, or lists of token ids."""

    model: str
    input: Annotated[Any, msgspec.Meta(extra_json_schema=describe_texts(MAX_INPUTS))]
    encoding_format: Literal["float", "base64"] | None = None

    def questions(self) -> list[Embed]:
        """The questions, of a few inputs each. Raises `ApiError` for an input that is none."""
        inputs = read_texts(self.input, "input", MAX_INPUTS)
        starts = range(0, len(inputs), _INPUTS_AT_ONCE)
        return [Embed(request=0, model=self.model, inputs=inputs[start : start + _INPUTS_AT_ONCE]) for start in starts]

    def write(self, pieces: list[Piece], context_tokens: int) -> EmbeddingsAnswer:
        """What the workers found, each vector's values as numbers or as base64."""
        vectors = [vector for piece in pieces if piece.found is not None for vector in piece.found.vectors]
        prompt_tokens = sum(piece.prompt_tokens for piece in pieces)
        write = _encode if self.encoding_format == "base64" else _unpack
        return EmbeddingsAnswer(
            data=[EmbeddingEntry(index=index, embedding=write(vector)) for index, vector in enumerate(vectors)],
            model=self.model,
            usage=EmbeddingsUsage(prompt_tokens, prompt_tokens),
        )


class EmbeddingsUsage(msgspec.Struct, frozen=True):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One input's vector, or its values as 32-bit floats in base64, lowest byte first."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Vectors in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[EmbeddingEntry]
    model: str
    usage: EmbeddingsUsage


def _encode(vector: bytes) -> str:
    return base64.b64encode(vector).decode("ascii")


def _unpack(vector: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))
