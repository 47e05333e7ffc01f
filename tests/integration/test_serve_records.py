"""Records of real gateways in a database, SQLite and PostgreSQL, and what `chaccu data clean` makes of them."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sql

from chaccu.data.records import read_conversations
from chaccu.data.sources import SourceStream, find_sources
from chaccu.errors import DataError, StorageError, UsageError
from chaccu.serve.gateway.records.conversation_store import NotKeptError, Record, open_store
from chaccu.serve.gateway.records.logged_answer import LogLine
from chaccu.serve.gateway.records.sql_records import SqlRecords
from chaccu.testing.fake_openai import FakeModel, FakeOpenAI
from chaccu.testing.postgres import Postgres
from chaccu.testing.processes import Service, start_command, start_gateway, start_worker, wait_until

WORKER = "scripted:words?tokens=5"


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'records.db'}"
        return
    url: str = request.getfixturevalue("postgres").url
    yield url
    change(url, "DROP TABLE IF EXISTS chaccu_answers, chaccu_schema")


def ask(gateway: Service, text: str, model: str = "words", **more: Any) -> dict[str, Any]:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": text}], **more}).encode()
    with urllib.request.urlopen(f"{gateway.url}/v1/chat/completions", body, timeout=10) as response:
        answer: dict[str, Any] = json.loads(response.read())
    return answer


def logged(gateway: Service, result: str) -> int:
    with urllib.request.urlopen(f"{gateway.url}/metrics", timeout=5) as response:
        found = re.search(rf'^chaccu_logged_answers_total{{result="{result}"}} (\d+)', response.read().decode(), re.MULTILINE)
    return int(found[1]) if found else 0


def change(url: str, statement: str) -> None:
    engine = sql.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sql.text(statement))
    engine.dispose()


def rows_of(url: str) -> list[dict[str, Any]]:
    engine = sql.create_engine(url)
    try:
        with engine.connect() as connection:
            return [
                dict(row) for row in connection.execute(sql.text("SELECT * FROM chaccu_answers ORDER BY number")).mappings()
            ]
    finally:
        engine.dispose()


def test_two_gateways_keep_answers_in_one_database_and_it_is_cleaned(tmp_path: Path, database: str) -> None:
    with FakeOpenAI({"up": FakeModel(answer="an upstream's words")}) as upstream:
        arguments = ("--records", database, "--upstream", f"up={upstream.url}/v1")
        with start_gateway(tmp_path / "a", *arguments) as first, start_gateway(tmp_path / "b", *arguments) as second:
            assert "conversations are logged in" in first.log
            assert "secret" not in first.log
            with start_worker(tmp_path, first, WORKER), start_worker(tmp_path, second, WORKER):
                odd = "é🦙 \x00 \"quoted\" 'x'); DROP TABLE chaccu_answers; --"
                told = [
                    ask(first, odd)["choices"][0]["message"]["content"],
                    ask(second, "short", max_tokens=2),
                    ask(first, "up?", "up"),
                ]
                threads = [threading.Thread(target=ask, args=(one, f"q{n}")) for n, one in enumerate([first, second] * 10)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        assert (first.exit_code, second.exit_code) == (0, 0)
    rows = rows_of(database)
    assert len(rows) == 23
    lines = [json.loads(row["line"]) for row in rows]
    for row, line in zip(rows, lines, strict=True):
        assert {name: row[name] for name in ("id", "time", "model", "finish_reason")} == {
            name: line[name] for name in ("id", "time", "model", "finish_reason")
        }
    by_question = {line["messages"][0]["content"]: line for line in lines}
    assert by_question[odd]["messages"][1] == {"role": "assistant", "content": told[0]}
    assert by_question["short"]["finish_reason"] == "length"
    assert by_question["up?"]["messages"][1]["content"] == "an upstream's words"
    clean = start_command(
        tmp_path, ["data", "clean", database, "--out", str(tmp_path / "out"), "--config", str(plain(tmp_path))]
    )
    assert clean.wait(60) == 0, clean.log
    kept = [c for name in ("train", "validation") for c in read_conversations(tmp_path / "out" / f"{name}.jsonl")]
    assert {c.messages[0].content for c in kept} == {odd, "up?", *(f"q{n}" for n in range(20))}
    for file in (tmp_path / "out").glob("*.json"):
        assert "secret" not in file.read_text()
    if database.startswith("sqlite"):
        assert (tmp_path / "records.db").stat().st_mode & 0o777 == 0o600


def plain(folder: Path) -> Path:
    """A configuration with the steps alone that every record needs."""
    file = folder / "clean.yaml"
    file.write_text("steps:\n  - roles\n")
    return file


def test_a_database_that_restarts_costs_nothing_and_one_that_is_gone_is_counted(tmp_path: Path, postgres: Postgres) -> None:
    with start_gateway(tmp_path, "--records", postgres.url) as gateway, start_worker(tmp_path, gateway, WORKER):
        ask(gateway, "before")
        wait_until(lambda: logged(gateway, "written") == 1, gateway, timeout_s=5)
        postgres.stop()
        try:
            began_s = time.monotonic()
            ask(gateway, "while it is away")
            assert time.monotonic() - began_s < 1
        finally:
            postgres.start()
        wait_until(lambda: logged(gateway, "written") == 2, gateway, timeout_s=10)
        postgres.stop()
        try:
            ask(gateway, "lost words")
            wait_until(lambda: logged(gateway, "lost") == 1, gateway, timeout_s=10)
        finally:
            postgres.start()
        ask(gateway, "after")
        wait_until(lambda: logged(gateway, "written") == 3, gateway, timeout_s=5)
        assert "conversations are not logged now" in gateway.log
        for word in ("lost words", "secret"):
            assert word not in gateway.log
    change(postgres.url, "DROP TABLE chaccu_answers, chaccu_schema")


def record(name: str, moment: datetime = datetime(2025, 6, 1, tzinfo=UTC)) -> Record:
    said: list[Any] = [{"role": "user", "content": f"words of {name}"}, {"role": "assistant", "content": "Yes."}]
    line = LogLine(id=name, time=moment.isoformat(), model="m", finish_reason="stop", messages=said)
    return Record(line, msgspec.json.encode(line), moment)


def test_a_database_is_used_again_and_its_version_looked_at(database: str) -> None:
    for name in ("one", "two"):
        store = SqlRecords(database)
        store.write([record(f"{name}-{number}") for number in range(3)])
        store.close()
    assert [row["id"] for row in rows_of(database)] == [f"{name}-{number}" for name in ("one", "two") for number in range(3)]
    (source,) = find_sources([database])
    store = SqlRecords(database)
    store.write([record("later")])
    store.close()
    with SourceStream(source) as stream:
        assert [json.loads(line)["id"] for line in stream.read(10_000).splitlines()][-1] == "two-2"
    change(database, "UPDATE chaccu_schema SET version = 7")
    with pytest.raises(StorageError, match="version 7; this gateway writes version 1"):
        SqlRecords(database)
    with pytest.raises(DataError, match="version 7; version 1 is read"):
        find_sources([database])


def test_a_row_that_is_refused_costs_itself_alone_and_is_not_told(database: str) -> None:
    store = SqlRecords(database)
    change(database, "CREATE UNIQUE INDEX only_once ON chaccu_answers (id)")
    store.write([record("a")])
    with pytest.raises(NotKeptError) as told:
        store.write([record("b"), record("a"), record("c")])
    store.close()
    assert told.value.count == 1
    assert "words" not in told.value.message
    assert [row["id"] for row in rows_of(database)] == ["a", "b", "c"]


def test_a_file_that_is_taken_away_is_noticed(tmp_path: Path) -> None:
    waits_s: list[float] = []
    store = SqlRecords(f"sqlite:///{tmp_path / 'records.db'}", sleep=waits_s.append)
    store.write([record("a")])
    (tmp_path / "records.db").unlink()
    with pytest.raises(NotKeptError, match="no such table"):
        store.write([record("b")])
    assert 3 < sum(waits_s) < 5


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:////nowhere/records.db", "No such file or directory"),
        ("sqlite://", "no database to keep records in"),
        ("mysql://root@127.0.0.1/x", "no database to keep records in"),
        ("postgresql://me:secret@127.0.0.1:9/x", "conversations cannot be kept in postgresql+psycopg://me:***@127.0.0.1:9/x"),
        ("nonsense", "names no database"),
    ],
)
def test_what_cannot_be_used_is_said_at_once(url: str, said: str) -> None:
    with pytest.raises((UsageError, StorageError)) as told:
        open_store(None, url)
    assert said in told.value.message
    assert "secret" not in told.value.message
    with pytest.raises(UsageError, match="kept in one place"):
        open_store(Path("logs"), url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:///nowhere.db", "there is no file nowhere.db"),
        ("postgresql://me:secret@127.0.0.1:9/x", "me:***@127.0.0.1:9/x cannot be read"),
        ("sqlite:///{folder}/other.db", "no such table"),
        ("sqlite:///{folder}/empty.db", "holds no record"),
    ],
)
def test_a_source_that_is_no_database_of_records_is_an_error(tmp_path: Path, url: str, said: str) -> None:
    (tmp_path / "other.db").touch()
    SqlRecords(f"sqlite:///{tmp_path}/empty.db").close()
    with pytest.raises((DataError, StorageError)) as told:
        find_sources([url.format(folder=tmp_path)])
    assert said in told.value.message
    assert "secret" not in told.value.message
