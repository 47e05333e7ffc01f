"""Encoding sources: what cannot be trained on is named, and worker processes change nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from chaccu.conversation import Conversation, Message, load_format, load_template_format
from chaccu.errors import StorageError, TrainError
from chaccu.testing.tiny import build_tokenizer
from chaccu.train.encode import Chunk, Encoding, encode_sources, read_source
from chaccu.train.encode_workers import choose_workers, encoding_in
from chaccu.train.recipe import DataSource

CHATML = load_format("chatml")


def write_conversations(path: Path, *conversations: Conversation) -> DataSource:
    path.write_bytes(b"\n".join(msgspec.json.encode(one) for one in conversations) + b"\n")
    return DataSource(path=str(path))


def talk(identity: str, reply: str | None = "The sky is blue.") -> Conversation:
    messages = [Message("user", "What colour is the sky?")]
    if reply is not None:
        messages.append(Message("assistant", reply))
    return Conversation(messages=tuple(messages), id=identity)


def test_too_long_names_the_conversation_and_both_numbers(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    source = write_conversations(tmp_path / "long.jsonl", talk("c-17", "The sky is blue. " * 30))
    (whole,) = encode_sources([source], CHATML, tokenizer, sequence_len=4096, seed=0)
    with pytest.raises(TrainError) as caught:
        encode_sources([source], CHATML, tokenizer, sequence_len=64, seed=0)
    for part in ("'c-17'", str(len(whole.ids)), "64", "long.jsonl"):
        assert part in caught.value.message


def test_max_tokens_leaves_long_ones_out(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    source = write_conversations(tmp_path / "mixed.jsonl", talk("long", "blue " * 200), talk("short"))
    limited = msgspec.structs.replace(source, max_tokens=64)
    left_out: dict[str, int] = {}
    (kept,) = encode_sources([limited], CHATML, tokenizer, sequence_len=64, seed=0, report_left_out=left_out.__setitem__)
    assert left_out == {source.path: 1}
    assert "The sky is blue." in tokenizer.decode(kept.ids)
    with pytest.raises(TrainError, match="at most 3 tokens"):
        encode_sources([msgspec.structs.replace(source, max_tokens=3)], CHATML, tokenizer, sequence_len=64, seed=0)


def test_max_tokens_above_the_row_still_keeps_rows_whole(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    source = msgspec.structs.replace(write_conversations(tmp_path / "a.jsonl", talk("a", "blue " * 200)), max_tokens=4096)
    with pytest.raises(TrainError, match="64"):
        encode_sources([source], CHATML, tokenizer, sequence_len=64, seed=0)


def test_no_trained_token_names_the_conversation(tmp_path: Path) -> None:
    source = write_conversations(tmp_path / "silent.jsonl", talk("mute", reply=None))
    with pytest.raises(TrainError, match=r"'mute'.*no trained token"):
        encode_sources([source], CHATML, build_tokenizer(tmp_path), sequence_len=512, seed=0)


def test_sampling_and_repeating(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    source = write_conversations(tmp_path / "many.jsonl", *(talk(str(number), f"It is {number}.") for number in range(100)))
    source = msgspec.structs.replace(source, conversations=70, repeat=2)
    encoded = encode_sources([source], CHATML, tokenizer, sequence_len=512, seed=5)
    assert len(encoded) == 140
    assert len({tuple(one.ids) for one in encoded}) == 70
    assert encode_sources([source], CHATML, tokenizer, sequence_len=512, seed=5) == encoded
    assert encode_sources([source], CHATML, tokenizer, sequence_len=512, seed=6) != encoded


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"absent\.jsonl"):
        list(read_source(DataSource(path=str(tmp_path / "absent.jsonl"))))
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(msgspec.json.encode(talk("a")) + b"\n\n{oops\n")
    with pytest.raises(TrainError, match=r"broken\.jsonl, line 3"):
        list(read_source(DataSource(path=str(broken))))
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(TrainError, match="no conversations"):
        encode_sources([DataSource(path=str(empty))], CHATML, build_tokenizer(tmp_path), sequence_len=512, seed=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_those_left_out_are_counted_among_those_that_were_read(tmp_path: Path, workers: int) -> None:
    tokenizer = build_tokenizer(tmp_path)
    texts = ("blue " * 200 if number % 10 == 0 else "It is blue." for number in range(150))
    source = write_conversations(tmp_path / "mixed.jsonl", *(talk(str(number), text) for number, text in enumerate(texts)))
    left_out: dict[str, int] = {}

    def encode(**fields: Any) -> int:
        left_out.clear()
        limited = msgspec.structs.replace(source, max_tokens=64, **fields)
        options = {"sequence_len": 64, "seed": 0, "workers": workers, "report_left_out": left_out.__setitem__}
        return len(encode_sources([limited], CHATML, tokenizer, **options))

    assert encode() + left_out[source.path] == 150
    assert left_out == {source.path: 15}
    assert encode(repeat=3) == 3 * 135
    assert left_out == {source.path: 15}
    # Of the first 64, of which 20 are taken.
    assert encode(conversations=20) == 20
    assert 0 < left_out[source.path] < 15


def many(tmp_path: Path, count: int = 300) -> DataSource:
    replies = (f"It is {number}. " * (1 + number % 5) for number in range(count))
    return write_conversations(tmp_path / "many.jsonl", *(talk(f"c-{number}", one) for number, one in enumerate(replies)))


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}",
    ],
)
def test_workers_give_the_same_tokens_in_the_same_order(tmp_path: Path, template: str | None) -> None:
    chat_format = CHATML if template is None else load_template_format(template)
    sources = [msgspec.structs.replace(many(tmp_path), conversations=170, repeat=2), many(tmp_path)]
    tokenizer = build_tokenizer(tmp_path)
    here, there = (
        encode_sources(sources, chat_format, tokenizer, sequence_len=512, seed=5, workers=workers) for workers in (1, 2)
    )
    assert len(here) == 2 * 170 + 300
    assert there == here


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_name_the_conversation_or_the_line_whoever_meets_them(tmp_path: Path, workers: int) -> None:
    tokenizer = build_tokenizer(tmp_path)
    source = many(tmp_path, 200)
    lines = Path(source.path).read_bytes().splitlines(keepends=True)

    def encode(at: int, line: bytes) -> None:
        Path(source.path).write_bytes(b"".join([*lines[:at], line, *lines[at:]]))
        encode_sources([source], CHATML, tokenizer, sequence_len=512, seed=0, workers=workers)

    with pytest.raises(TrainError, match=r"'mute' of .*no trained token") as caught:
        encode(150, msgspec.json.encode(talk("mute", None)) + b"\n")
    assert "chaccu data clean" in caught.value.remedy
    with pytest.raises(TrainError, match=r"many\.jsonl, line 151"):
        encode(150, b"{oops\n")
    template = CHATML.template + "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    refusing = msgspec.structs.replace(CHATML, template=template)
    odd = Conversation(id="odd", messages=(Message("tool", "2"), Message("assistant", "It is 2.")))
    source = write_conversations(tmp_path / "odd.jsonl", *(talk("even") for _ in range(100)), odd)
    with pytest.raises(TrainError, match=r"conversation 'odd' of .*odd\.jsonl: .*no tools"):
        encode_sources([source], refusing, tokenizer, sequence_len=512, seed=0, workers=workers)


def test_progress_counts_what_is_wanted_of_all_sources(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    sources = [many(tmp_path), msgspec.structs.replace(many(tmp_path), conversations=70)]
    encode_sources(sources, CHATML, build_tokenizer(tmp_path), sequence_len=512, seed=0, report=lambda *one: told.append(one))
    assert told[0] == (0, 370)
    assert told[-1] == (370, 370)
    assert (300, 370) in told
    assert told == sorted(told)


def test_as_many_workers_as_the_text_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert [choose_workers(size) for size in (0, 9_000_000, 25_000_000, 1 << 40)] == [1, 1, 5, 12]


def test_a_worker_that_is_killed_is_an_error_not_a_wait(tmp_path: Path) -> None:
    source = many(tmp_path)
    encoding = Encoding(CHATML, build_tokenizer(tmp_path), 512)
    chunk = Chunk(source, list(enumerate(Path(source.path).read_bytes().splitlines()[:5], 1)))
    others = set(psutil.Process().children())  # such as torch's compile workers, after a test that compiles
    with encoding_in(2, encoding) as encode:
        assert [len(encoded) for encoded in encode([chunk])] == [5]
        workers = set(psutil.Process().children()) - others
        assert len(workers) == 2
        for worker in workers:
            worker.kill()
        with pytest.raises(TrainError, match="ended early, with exit code -9"):
            list(encode([chunk]))
    assert not any(worker.is_running() for worker in workers)


ENDLESS = """
import itertools, signal, sys
from pathlib import Path
from chaccu.conversation import TextTokenizer, load_format
from chaccu.train.encode import Chunk, Encoding
from chaccu.train.encode_workers import encoding_in
from chaccu.train.recipe import DataSource

# Where a shell starts tests in the background, Ctrl-C is ignored from the start.
signal.signal(signal.SIGINT, signal.default_int_handler)
line = Path(sys.argv[1]).read_bytes().splitlines()[0]
encoding = Encoding(load_format("chatml"), TextTokenizer.load(Path(sys.argv[2])), 512)
with encoding_in(2, encoding) as encode:
    chunk = Chunk(DataSource(path=sys.argv[1]), [(1, line)] * 64)
    for _ in encode(itertools.repeat(chunk)):
        print("encoded", flush=True)
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, end: signal.Signals) -> None:
    build_tokenizer(tmp_path)
    arguments = [sys.executable, "-c", ENDLESS, many(tmp_path).path, str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"encoded\n"
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        if end is signal.SIGINT:
            os.killpg(process.pid, end)  # as the terminal does
        else:
            process.kill()
        said = process.stderr.read().decode()
    assert said.count("Traceback") == (1 if end is signal.SIGINT else 0), said
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []


def test_a_worker_loads_no_torch() -> None:
    code = "import sys, chaccu.train.encode, chaccu.train.encode_workers; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
