from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaccu.data import framing
from chaccu.data.framing import RecordStream
from chaccu.errors import DataError


class Bytes:
    """A stream that gives at most `step` bytes a read."""

    def __init__(self, data: bytes, step: int = 1 << 20, damage: str = "") -> None:
        self._file = io.BytesIO(data)
        self._step = step
        self.damage = damage

    def read(self, size: int, /) -> bytes:
        return self._file.read(min(size, self._step))


def read_all(data: bytes, step: int = 1 << 20) -> tuple[list[Any], RecordStream]:
    stream = RecordStream(Bytes(data, step), "dump")
    records = list(stream)
    for number, record in enumerate(records, start=1):
        assert record.number == number
        if record.end > record.start and data[record.start : record.start + 1] in b"{[":
            assert data[record.start : record.end] == record.payload
    return [record.payload for record in records], stream


RECORDS = [
    {"id": "a_0", "text": 'quotes " and \\ and ] } in strings'},
    {"id": "b", "text": "žluťoučký kůň 🦙", "deep": [[{"x": []}]]},
    {"id": "c", "text": "last"},
]


@pytest.mark.parametrize("step", [1, 3, 64, 1 << 20])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_array_yields_its_records_whatever_the_read_size(step: int, ascii_only: bool) -> None:
    payloads, stream = read_all(json.dumps(RECORDS, ensure_ascii=ascii_only, indent=2).encode(), step)
    assert [json.loads(payload) for payload in payloads] == RECORDS
    assert stream.cut is None


@pytest.mark.parametrize("newline_at_end", [True, False])
def test_lines_and_pretty_printed_objects(newline_at_end: bool) -> None:
    lines = "\n\n".join(json.dumps(record) for record in RECORDS) + "\n" * newline_at_end
    pretty = "\n".join(json.dumps(record, indent=2) for record in RECORDS)
    for text in (lines, pretty, "\ufeff" + lines):
        payloads, stream = read_all(text.encode())
        assert [json.loads(payload) for payload in payloads] == RECORDS
        assert stream.cut is None


def test_every_cut_keeps_what_is_whole_and_says_where() -> None:
    data = json.dumps(RECORDS, ensure_ascii=False, indent=2).encode()
    _, whole = read_all(data)
    assert whole.cut is None
    ends = [record.end for record in RecordStream(Bytes(data), "dump")]
    for size in range(1, len(data)):
        payloads, stream = read_all(data[:size], step=7)
        expected = sum(end <= size for end in ends)
        assert len(payloads) == expected
        assert stream.cut is not None
        assert stream.cut.after_record == expected
        assert stream.cut.offset == (ends[expected - 1] if expected else 1)
        assert stream.cut.unread_bytes == size - stream.cut.offset
        assert stream.cut.size_bytes == size


@pytest.mark.parametrize(
    ("tail", "why"),
    [
        (b', {"v": "caf\xc3', "inside record 2"),
        (b', {"v": "tab\\', "inside record 2"),
        (b', {"v": "\\u00', "inside record 2"),
        (b",", "before the array's closing bracket"),
        (b"", "before the array's closing bracket"),
    ],
)
def test_cuts_in_awkward_places(tail: bytes, why: str) -> None:
    payloads, stream = read_all(b'[{"a": 1}' + tail)
    assert payloads == [b'{"a": 1}']
    assert stream.cut is not None
    assert stream.cut.why == why
    assert (stream.cut.offset, stream.cut.unread_bytes) == (9, len(tail))
    assert "cut off at byte" in stream.cut.describe("dump")


def test_a_last_line_that_is_cut_off_is_told() -> None:
    payloads, stream = read_all(b'{"a": 1}\n{"a": 2}\n{"a": ')
    assert payloads == [b'{"a": 1}', b'{"a": 2}']
    assert stream.cut is not None
    assert stream.cut.unread_bytes == 6 + 1


def test_scalars_and_rubbish_between_records_are_records_too() -> None:
    payloads, stream = read_all(b'[1, {"a": 1}, "x, ]", null, [2], rubbish, {"a": 2}] more')
    assert payloads == [b"1", b'{"a": 1}', b'"x, ]"', b"null", b"[2]", b"rubbish", b'{"a": 2}', b"more"]
    assert stream.cut is None


def test_a_bad_record_costs_itself_alone() -> None:
    payloads, _ = read_all(b'[{"a": 1}, {"a": \xff nonsense}, {"a": 3}]')
    assert len(payloads) == 3


def test_deep_nesting_and_a_long_string_are_one_record_each() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    long = b'"' + b"x" * 5_000_000 + b'"'
    payloads, stream = read_all(b"[" + deep + b',{"a":' + long + b"}]", step=1 << 19)
    assert payloads[0] == deep
    assert len(payloads[1]) == len(long) + 6
    assert stream.cut is None


def test_a_record_beyond_the_limit_is_a_cut_not_a_memory_hog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "MAX_RECORD_BYTES", 1000)
    payloads, stream = read_all(b'[{"a": 1}, {"a": "' + b"x" * 5000, step=500)
    assert payloads == [b'{"a": 1}']
    assert stream.cut is not None
    assert "longer than" in stream.cut.why


@pytest.mark.parametrize("data", [b"", b"  \n ", b"\xef\xbb\xbf", b"id,text\n1,a", b"\xff\xfe[\x00", b"PK\x03\x04"])
def test_what_is_no_json_is_refused_with_one_message(data: bytes) -> None:
    with pytest.raises(DataError):
        read_all(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(JSON, max_size=8), st.integers(1, 40), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_array_comes_out_as_its_items(items: list[Any], step: int, ascii_only: bool) -> None:
    data = json.dumps(items, ensure_ascii=ascii_only).encode("utf-8", errors="surrogatepass")
    payloads, stream = read_all(data, step)
    assert [json.loads(payload) for payload in payloads] == items
    assert stream.cut is None


@given(st.binary(max_size=200), st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_random_bytes_never_crash(data: bytes, step: int) -> None:
    for begin in (b"[", b"{", b""):
        try:
            read_all(begin + data, step)
        except DataError:
            assert not begin
