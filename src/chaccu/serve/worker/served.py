"""`ServedModels`: the names that a worker answers to: its model, and adapters over it that come and go.

Invariants: a name that is withdrawn is offered no more from that moment on, and is unloaded once its last request has ended; a
change that has begun is finished, whoever has asked for it and left; the engine changes one adapter at a time. It ignores
gateways.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec

from chaccu.engine import AdapterEngine, AdapterSource, Engine, ModelSource, resolve_adapter
from chaccu.errors import EngineError, ServeError, UsageError
from chaccu.serve.link import ModelOffer
from chaccu.serve.worker.load_folder import find_allowed
from chaccu.serve.worker.prompt import PromptBuilder


class NotServedError(ServeError):
    """The worker has no model of this name, or not any more."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """One name: what is offered of it, how its prompts are made, and the adapter to answer through."""

    offer: ModelOffer
    builder: PromptBuilder
    adapter: str | None = None


class ServedModels:
    """The model `base` of `engine`, which comes from `source`, with its adapters. `build` makes the prompts of an adapter that
    names a chat format; `allow_load`: the folder below which `load` finds adapters, None: nowhere.
    """

    def __init__(
        self,
        engine: Engine,
        base: Served,
        source: ModelSource,
        build: Callable[[str], PromptBuilder],
        allow_load: Path | None = None,
    ) -> None:
        self.engine = engine
        self._base = base
        self._source = source
        self._build = build
        self._allow_load = allow_load
        self._served = {base.offer.name: base}
        for name in engine.info.adapters:
            self._served[name] = self._over_base(name, base.builder)
        self._offers = tuple(one.offer for one in self._served.values())
        self._loaded: set[str] = set()
        # Offered no more, though some requests of theirs are left.
        self._withdrawn: set[str] = set()
        self._requests: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._changing = asyncio.Lock()
        self._watchers: set[Callable[[], None]] = set()
        self._changes: set[asyncio.Task[None]] = set()

    @property
    def offers(self) -> tuple[ModelOffer, ...]:
        """What gateways may give requests for, the model itself first; the same object until that changes."""
        return self._offers

    def watch(self, on_change: Callable[[], None]) -> Callable[[], None]:
        """Have `on_change` called whenever `offers` have changed; returns what ends that."""
        self._watchers.add(on_change)
        return lambda: self._watchers.discard(on_change)

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Served]:
        """What answers to `name`, which stays loaded for the block. Raises `NotServedError`.

        A request that was on its way while its name was withdrawn is still answered, where the adapter is not gone.
        """
        served = self._served.get(name)
        if served is None:
            raise NotServedError(f"this worker does not serve {name!r:.220}.")
        self._requests[name] += 1
        try:
            yield served
        finally:
            self._requests[name] -= 1
            self._idle.set()

    async def add(self, adapter: AdapterSource) -> None:
        """Load an adapter and offer it. Raises `EngineError` when it cannot be, `UsageError` for a name that is taken."""
        await self._finish(self._add(adapter))

    async def load(self, name: str, path: str) -> None:
        """As `add`, for what a gateway has asked for. Raises `UsageError` too for a path that is not allowed."""
        folder = await asyncio.to_thread(find_allowed, self._allow_load, path)
        self._check_free(name)
        adapter = await asyncio.to_thread(resolve_adapter, name, folder, self._source)
        await self.add(adapter)

    async def unload(self, name: str) -> None:
        """Withdraw an adapter, wait for its requests, unload it. Raises `NotServedError` or `UsageError`."""
        await self._finish(self._remove(name))

    async def _add(self, adapter: AdapterSource) -> None:
        async with self._changing:
            self._check_free(adapter.name)
            builder = self._base.builder
            if adapter.chat_format not in (None, self._base.offer.chat_format):
                builder = await asyncio.to_thread(self._build, adapter.chat_format)
            await self._adapters().load_adapter(adapter)
            self._loaded.add(adapter.name)
            self._served[adapter.name] = self._over_base(adapter.name, builder, adapter.chat_format)
            self._tell()

    async def _remove(self, name: str) -> None:
        if name not in self._served or name in self._withdrawn:
            raise NotServedError(f"this worker does not serve {name!r:.220}.")
        if name not in self._loaded:
            whose = "its own model" if name == self._base.offer.name else "loaded by the engine's own flags"
            raise UsageError(f"this worker cannot unload {name!r}: it is {whose}.", remedy="end the worker")
        self._withdrawn.add(name)
        self._tell()
        while True:
            # Others may change meanwhile, for this may take as long as an answer does.
            while self._requests[name]:
                self._idle.clear()
                await self._idle.wait()
            async with self._changing:
                if not self._requests[name]:
                    del self._served[name], self._requests[name]
                    self._loaded.discard(name)
                    self._withdrawn.discard(name)
                    await self._adapters().unload_adapter(name)
                    return

    async def _finish(self, change: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    def _adapters(self) -> AdapterEngine:
        if not isinstance(self.engine, AdapterEngine):
            raise EngineError(
                f"the engine {self.engine.info.engine} loads no adapters.",
                remedy="serve the model with llamacpp or transformers",
            )
        return self.engine

    def _check_free(self, name: str) -> None:
        if name in self._withdrawn:
            raise UsageError(f"this worker is still unloading {name!r}.", remedy="wait, or choose another name")
        if name in self._served:
            raise UsageError(f"this worker serves {name!r} already.", remedy="unload it, or choose another name")

    def _over_base(self, name: str, builder: PromptBuilder, chat_format: str | None = None) -> Served:
        base = self._base.offer
        offer = msgspec.structs.replace(base, name=name, base=base.name, chat_format=chat_format or base.chat_format)
        return Served(offer=offer, builder=builder, adapter=name)

    def _tell(self) -> None:
        self._offers = tuple(one.offer for name, one in self._served.items() if name not in self._withdrawn)
        for on_change in [*self._watchers]:
            on_change()
