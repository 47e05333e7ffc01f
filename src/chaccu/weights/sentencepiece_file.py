"""A SentencePiece model (`tokenizer.model`): its pieces and the few settings that decide whether an equal BPE can be built.

The file is a protocol buffer (github.com/google/sentencepiece, sentencepiece_model.proto); of its wire format
(protobuf.dev/programming-guides/encoding) only what these fields use is read. Everything else in it is skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec

from chaccu.artifact import storage_errors
from chaccu.errors import WeightsError

_BPE = 2
_UNKNOWN = 2


class SentencePieceModel(msgspec.Struct, frozen=True):
    """`types`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. `obstacle`: why no equal BPE can be built of
    it ("" when it can); `adds_space`: whether a text begins with a space that is not in it."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    obstacle: str
    adds_space: bool

    @property
    def unknown(self) -> str | None:
        """The piece for what cannot be written otherwise."""
        return next((piece for piece, kind in zip(self.pieces, self.types, strict=True) if kind == _UNKNOWN), None)


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Raises `WeightsError` when the file is no SentencePiece model, `StorageError` when it cannot be read."""
    with storage_errors(path):
        data = memoryview(path.read_bytes())
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | float | memoryview] = {}
    normalizer: dict[int, int | float | memoryview] = {}
    try:
        for field, value in _read_fields(data):
            if field == 1 and isinstance(value, memoryview):
                piece = dict(_read_fields(value))
                pieces.append((str(piece[1], "utf-8"), float(piece.get(2, 0.0)), int(piece.get(3, 1))))  # type: ignore[arg-type]
            elif field in (2, 3) and isinstance(value, memoryview):
                (trainer if field == 2 else normalizer).update(_read_fields(value))
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise WeightsError(f"{path} is no SentencePiece model ({error}).", remedy="fetch it again") from error
    if not pieces:
        raise WeightsError(f"{path} is no SentencePiece model: it has no pieces.", remedy="fetch it again")
    return SentencePieceModel(
        pieces=[piece for piece, _, _ in pieces],
        scores=[score for _, score, _ in pieces],
        types=[kind for _, _, kind in pieces],
        obstacle=_find_obstacle(trainer, normalizer),
        adds_space=bool(normalizer.get(3, 1)),
    )


def _find_obstacle(trainer: dict[int, int | float | memoryview], normalizer: dict[int, int | float | memoryview]) -> str:
    """Field numbers and their defaults are the file format's."""
    if trainer.get(3, 1) != _BPE:
        return "it is no BPE model"
    if not trainer.get(35, 0):
        return "it does not write unknown characters as bytes"
    if trainer.get(24, 0):
        return "it puts the mark of a space behind words"
    if len(normalizer.get(2, b"")):  # type: ignore[arg-type]
        return "it normalises characters"
    if normalizer.get(4, 1):
        return "it takes away repeated spaces"
    return "" if normalizer.get(5, 1) else "it does not mark spaces"


def _read_fields(data: memoryview) -> Iterator[tuple[int, int | float | memoryview]]:
    """Number and value of each field of a message: integers, 32-bit floats, and bytes for strings and messages."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        kind = key & 7
        value: int | float | memoryview
        if kind == 0:
            value, at = _read_varint(data, at)
        elif kind == 2:
            length, at = _read_varint(data, at)
            if at + length > len(data):
                raise ValueError("cut off")
            value, at = data[at : at + length], at + length
        elif kind == 5:
            (value,) = struct.unpack_from("<f", data, at)
            at += 4
        elif kind == 1:
            (value,) = struct.unpack_from("<d", data, at)
            at += 8
        else:
            raise ValueError(f"field of kind {kind}")
        yield key >> 3, value


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
