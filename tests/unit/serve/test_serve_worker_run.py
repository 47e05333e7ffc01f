"""What a worker does when its engine is lost: load it again, or end where only a new process can."""

from __future__ import annotations

from typing import Any

import pytest

from chaccu.engine import EngineLostError
from chaccu.engine.scripted import ScriptedEngine
from chaccu.errors import EngineError
from chaccu.serve.worker import WorkerConfig, run, run_worker

CONFIG = WorkerConfig(model="scripted:a", gateways=("http://127.0.0.1:9",))


def lose(monkeypatch: pytest.MonkeyPatch, *, needs_new_process: bool) -> list[str]:
    """Engines that are lost once, and can be loaded again at the second try; returns what happens."""
    events: list[str] = []
    load = ScriptedEngine.load

    def load_or_fail(*arguments: Any) -> ScriptedEngine:
        events.append("load")
        if events.count("load") == 2:
            raise EngineError("not yet there")
        return load(*arguments)

    async def serve(*_: Any) -> None:
        events.append("serve")
        if events.count("serve") == 1:
            raise EngineLostError("gone", needs_new_process=needs_new_process)

    monkeypatch.setattr(ScriptedEngine, "load", load_or_fail)
    monkeypatch.setattr(run, "_serve", serve)
    monkeypatch.setattr(run, "_FIRST_LOAD_DELAY_S", 0.01)
    return events


def test_a_lost_engine_is_loaded_until_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    events, said = lose(monkeypatch, needs_new_process=False), []
    run_worker(CONFIG, said.append)
    assert events == ["load", "serve", "load", "load", "serve"]
    assert "a has lost its engine and leaves: gone" in said
    assert any("cannot be loaded again; next try in 0.02 s: not yet there" in line for line in said)


def test_a_worker_ends_where_only_a_new_process_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    events = lose(monkeypatch, needs_new_process=True)
    with pytest.raises(EngineLostError, match="gone"):
        run_worker(CONFIG, lambda _: None)
    assert events == ["load", "serve"]
