"""What a worker serves beside its model: names that come and go, and where adapters may be loaded from."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chaccu.conversation import load_format
from chaccu.engine import AdapterSource, resolve_model
from chaccu.engine.scripted import Script, ScriptedEngine, build_byte_tokenizer
from chaccu.errors import EngineError, UsageError
from chaccu.serve.link import ModelOffer
from chaccu.serve.worker.load_folder import find_allowed
from chaccu.serve.worker.prompt import PromptBuilder
from chaccu.serve.worker.served import NotServedError, Served, ServedModels

OFFER = ModelOffer(name="m", engine="scripted", context_tokens=4096, slots=4, chat_format="chatml")
BUILDER = PromptBuilder(load_format("chatml"), build_byte_tokenizer())


class Adaptable(ScriptedEngine):
    """Takes adapters; how long that takes is the test's."""

    def __init__(self) -> None:
        super().__init__(Script(text="x"))
        self.events: list[str] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def load_adapter(self, adapter: AdapterSource) -> None:
        await self.may_go_on.wait()
        if adapter.name == "broken":
            raise EngineError("it does not fit")
        self.events.append(f"+{adapter.name}")

    async def unload_adapter(self, name: str) -> None:
        self.events.append(f"-{name}")


def build(engine: ScriptedEngine, allow_load: Path | None = None) -> ServedModels:
    base = Served(offer=OFFER, builder=BUILDER)
    return ServedModels(engine, base, resolve_model("scripted:m"), lambda _: BUILDER, allow_load)


def adapter(name: str) -> AdapterSource:
    return AdapterSource(name=name, folder=Path("nowhere"))


def names(served: ServedModels) -> list[str]:
    return [offer.name for offer in served.offers]


async def test_an_adapter_is_offered_once_it_is_loaded_and_unloaded_once_it_is_idle() -> None:
    engine = Adaptable()
    served = build(engine)
    seen: list[list[str]] = []
    unwatch = served.watch(lambda: seen.append(names(served)))
    await served.add(adapter("law"))
    assert (seen, served.offers[1].base) == ([["m", "law"]], "m")
    with served.use("law") as model:
        assert model.adapter == "law"
        unloading = asyncio.create_task(served.unload("law"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (names(served), unloading.done(), engine.events) == (["m"], False, ["+law"])
        with pytest.raises(NotServedError):
            await served.unload("law")
        with pytest.raises(UsageError, match="still unloading 'law'"):
            await served.add(adapter("law"))
        # Others come and go meanwhile.
        await served.add(adapter("prose"))
        await served.unload("prose")
        # What was on its way is still answered.
        with served.use("law"), served.use("m") as base:
            assert base.adapter is None
    await unloading
    assert seen == [["m", "law"], ["m"], ["m", "prose"], ["m"]]
    assert engine.events == ["+law", "+prose", "-prose", "-law"]
    with pytest.raises(NotServedError, match="does not serve 'law'"), served.use("law"):
        pass
    with pytest.raises(NotServedError):
        await served.unload("law")
    unwatch()
    await served.add(adapter("law"))
    assert len(seen) == 4


async def test_a_change_is_finished_though_who_asked_has_left_and_the_next_waits_for_it() -> None:
    engine = Adaptable()
    served = build(engine)
    engine.may_go_on.clear()
    asking = asyncio.create_task(served.add(adapter("law")))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.sleep(0)
    following = asyncio.create_task(served.add(adapter("law")))
    engine.may_go_on.set()
    with pytest.raises(UsageError, match="serves 'law' already"):
        await following
    assert (asking.cancelled(), names(served), engine.events) == (True, ["m", "law"], ["+law"])


async def test_what_cannot_be_changed_is_said_and_changes_nothing() -> None:
    served = build(Adaptable())
    with pytest.raises(UsageError, match="it is its own model"):
        await served.unload("m")
    with pytest.raises(EngineError, match="does not fit"):
        await served.add(adapter("broken"))
    with pytest.raises(EngineError, match="the engine scripted loads no adapters"):
        await build(ScriptedEngine(Script(text="x"))).add(adapter("law"))
    with pytest.raises(UsageError, match="loads nothing while it runs"):
        await served.load("law", "law")
    assert names(served) == ["m"]


@pytest.mark.parametrize(
    "path", ["..", ".", "", "/", "/etc", "../beside", "law/..", "law/../../beside", "out", "loop", "x\0y", "no"]
)
def test_only_folders_below_the_allowed_one_are_found(tmp_path: Path, path: str) -> None:
    root = tmp_path / "allowed"
    (root / "law" / "inner").mkdir(parents=True)
    (tmp_path / "beside").mkdir()
    (root / "out").symlink_to(tmp_path / "beside")
    (root / "loop").symlink_to(root / "loop")
    for good in ("law", "law/inner", "law/../law", str(root / "law")):
        assert find_allowed(root, good).is_relative_to(root / "law")
    with pytest.raises(UsageError):
        find_allowed(root, path)


def test_an_allowed_folder_may_be_reached_by_a_link_and_links_within_it_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real" / "law").mkdir(parents=True)
    (tmp_path / "real" / "newest").symlink_to("law")
    (tmp_path / "named").symlink_to(tmp_path / "real")
    assert find_allowed(tmp_path / "named", "newest") == tmp_path / "real" / "law"
    (tmp_path / "real" / "law" / "adapter.gguf").symlink_to("/etc/hostname")
    with pytest.raises(UsageError, match="with all that it holds"):
        find_allowed(tmp_path / "named", "newest")
