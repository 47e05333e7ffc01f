"""What `--on ray` refuses and promises without a cluster; the cluster itself is in tests/integration."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from chaccu.artifact import library_versions
from chaccu.data import on_ray
from chaccu.data.clean import LIBRARIES
from chaccu.data.config import load_config
from chaccu.data.judging import Chunk, Judgement, pass_in_order
from chaccu.errors import DataError, MissingDependencyError, UsageError


def test_chunks_come_back_in_order_and_few_are_in_flight() -> None:
    waiting: set[int] = set()
    most = 0

    def read() -> Iterator[Chunk]:
        yield from (Chunk(str(number), "sharegpt", []) for number in range(20))

    def submit(chunk: Chunk) -> int:
        nonlocal most
        waiting.add(int(chunk.origin))
        most = max(most, len(waiting))
        return int(chunk.origin)

    def collect(number: int) -> list[Judgement]:
        waiting.remove(number)
        return [Judgement(str(number), (), (), "")]

    judged = list(pass_in_order(read(), submit, collect, most=4))
    assert [(origin, found[0].id) for origin, found in judged] == [(str(number), str(number)) for number in range(20)]
    assert most == 5
    assert waiting == set()


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"chaccu\[ray\]"):
        on_ray.judge_on_ray(2)


@pytest.mark.parametrize("address", ["ray://head:10001", "head", ":6379", "head:port", "http://head:8265"])
def test_what_is_no_address_is_refused(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match="no address of a Ray cluster"):
        on_ray.judge_on_ray(2, address)


def test_a_head_that_does_not_answer_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(DataError, match=f"no Ray cluster answers at {address}"):
            on_ray.judge_on_ray(2)


def test_what_answers_and_is_no_ray_is_an_error_after_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(on_ray, "_CONNECT_TIMEOUT_S", 2.0)
    timeout = pytest.raises(DataError, match="gave no connection to Ray within 2 s")
    with socket.create_server(("127.0.0.1", 0)) as other, timeout:
        on_ray.judge_on_ray(2, f"127.0.0.1:{other.getsockname()[1]}")


def test_an_address_needs_the_option(tmp_path: Path) -> None:
    from chaccu.cli.data import app

    (tmp_path / "dump.json").write_text("[]")
    found = CliRunner().invoke(
        app, ["clean", str(tmp_path / "dump.json"), "--out", str(tmp_path / "out"), "--ray-address", "a:1"]
    )
    assert isinstance(found.exception, UsageError)
    assert "--on ray" in found.exception.message


def order(versions: dict[str, str], settings: bytes) -> bytes:
    return msgspec.msgpack.encode(on_ray._Order(versions, settings, pickle.dumps(load_config())))


def test_a_node_with_other_versions_or_files_is_refused() -> None:
    versions = library_versions(*LIBRARIES)
    settings = on_ray._describe(load_config())
    assert on_ray._open_order(order(versions, settings)).settings() == load_config().settings()
    chunk = Chunk("dump.json", "sharegpt", [])
    with pytest.raises(DataError, match=r"on node .+: chaccu is .+ there and 99 here"):
        on_ray._judge_there(order({**versions, "chaccu": "99"}, settings), chunk)
    with pytest.raises(DataError, match="polaris is not installed there"):
        on_ray._judge_there(order({**versions, "polaris": "1"}, settings), chunk)
    with pytest.raises(DataError, match="is another one there"):
        on_ray._judge_there(order(versions, b"{}"), chunk)
