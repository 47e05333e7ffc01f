"""`GatewayShares`: what each gateway that a worker has joined is told of the requests from the others.

Invariants: every request under way is counted for the one gateway it came from; a gateway learns of each change that another
one made, the last state where several come at once; one that has gone counts no more. It ignores frames and sockets.
"""

from __future__ import annotations

from collections.abc import Callable

from chaccu.serve.link import Share


class GatewayShares:
    """One worker's gateways."""

    def __init__(self) -> None:
        self._places: set[Place] = set()

    def join(self, on_change: Callable[[], None]) -> Place:
        """A gateway has been joined; `on_change` is called whenever its share is another one."""
        place = Place(self, on_change)
        self._places.add(place)
        self.tell(but=None)
        return place

    def leave(self, place: Place) -> None:
        self._places.discard(place)
        self.tell(but=place)

    def share(self, place: Place) -> Share:
        """What there is beside `place`."""
        elsewhere = sum(one.requests for one in self._places if one is not place)
        return Share(elsewhere=elsewhere, gateways=len(self._places))

    def tell(self, but: Place | None) -> None:
        for place in self._places:
            if place is not but:
                place.on_change()


class Place:
    """One gateway among them. `requests`: how many it has under way."""

    def __init__(self, shares: GatewayShares, on_change: Callable[[], None]) -> None:
        self.requests = 0
        self.on_change = on_change
        self._shares = shares

    def begin(self) -> None:
        self.requests += 1
        self._shares.tell(but=self)

    def end(self) -> None:
        self.requests -= 1
        self._shares.tell(but=self)

    def leave(self) -> None:
        self._shares.leave(self)

    @property
    def share(self) -> Share:
        return self._shares.share(self)
