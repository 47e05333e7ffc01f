"""`Membership`: a worker's place at each of its gateways, for as long as it runs.

Invariants: each gateway has a task of its own, so a lost one delays no other; one that refuses is left, and its refusal ends
the worker only when no other gateway is left; addresses that a name has got since are joined too, and one that the name has
lost is dialled no more once its connection is gone. It ignores what is served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence

from chaccu.errors import ServeError
from chaccu.serve.worker.gateways import LOOK_AGAIN_S, GatewayAddress, NamedGateway

StayJoined = Callable[[GatewayAddress, Callable[[], bool]], Coroutine[None, None, None]]


class Membership:
    """The gateways of one worker. `stay_joined` is one gateway's task, for as long as the function that it gets says so."""

    def __init__(
        self,
        named: Sequence[NamedGateway],
        stay_joined: StayJoined,
        announce: Callable[[str], None],
        *,
        look_again_s: float = LOOK_AGAIN_S,
    ) -> None:
        self._named = named
        self._stay_joined = stay_joined
        self._announce = announce
        self._look_again_s = look_again_s
        self._tasks: dict[GatewayAddress, asyncio.Task[None]] = {}
        # What each name stands for now.
        self._addresses: dict[NamedGateway, list[GatewayAddress]] = {}
        self._refused: set[GatewayAddress] = set()
        self._missing: set[NamedGateway] = set()

    async def run(self, draining: asyncio.Event) -> None:
        """Until `draining` is set and every gateway has been left. Raises the last refusal when there is no other gateway."""
        told = asyncio.create_task(draining.wait())
        try:
            while not draining.is_set():
                await self._look_up()
                await asyncio.wait(
                    {told, *self._tasks.values()}, timeout=self._look_again_s, return_when=asyncio.FIRST_COMPLETED
                )
                if not draining.is_set():
                    self._note_ended()
            for ended in await asyncio.gather(*self._tasks.values(), return_exceptions=True):
                # It ends in any case.
                if isinstance(ended, Exception):
                    self._announce(f"while the worker ended: {ended}")
        finally:
            tasks = [told, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _look_up(self) -> None:
        for gateway in self._named:
            try:
                addresses = await gateway.look_up()
            except OSError as error:
                if gateway not in self._missing:
                    self._announce(f"{gateway.shown} is not found ({error}); trying again")
                self._missing.add(gateway)
                continue
            self._missing.discard(gateway)
            self._addresses[gateway] = addresses
            for address in addresses:
                if address not in self._tasks and address not in self._refused:
                    stay_joined = self._stay_joined(address, lambda address=address: self._is_named(address))  # type: ignore[misc]
                    self._tasks[address] = asyncio.create_task(stay_joined)

    def _is_named(self, address: GatewayAddress) -> bool:
        return any(address in addresses for addresses in self._addresses.values())

    def _note_ended(self) -> None:
        for address, task in list(self._tasks.items()):
            if not task.done():
                continue
            del self._tasks[address]
            error = task.exception()
            if error is None:
                continue
            if not isinstance(error, ServeError) or not self._tasks:
                raise error
            self._refused.add(address)
            self._announce(f"{address.shown}: {error.message} It is tried no more; the worker goes on with its other gateways")
