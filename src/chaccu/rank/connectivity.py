"""Which models can be compared at all.

Two models that no chain of battles joins have no common scale: they are in different components. Within a component,
Bradley–Terry ratings are finite only among models that each won (or drew) along some chain against each other: these form
a tier, and between two tiers every battle went to the upper one (Ford 1957, "Solution of a ranking problem from binary
comparisons").

It ignores how often models met.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def find_components(models: Sequence[int], met: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Models joined by battles, largest component first; inside, in the given order."""
    root = {model: model for model in models}

    def top(model: int) -> int:
        while root[model] != model:
            root[model] = root[root[model]]
            model = root[model]
        return model

    for one, other in met:
        root[top(one)] = top(other)
    components: dict[int, list[int]] = {}
    for model in models:
        components.setdefault(top(model), []).append(model)
    return sorted(components.values(), key=len, reverse=True)


def find_tiers(models: Sequence[int], beaten: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The strongly connected parts of one component, no part beaten by a later one.

    `beaten`: (winner, loser) pairs; a tie is given in both directions.
    """
    losers: dict[int, list[int]] = {model: [] for model in models}
    winners: dict[int, list[int]] = {model: [] for model in models}
    for winner, loser in set(beaten):
        losers[winner].append(loser)
        winners[loser].append(winner)
    # Kosaraju: in reverse order of finishing, each search against the edges collects one part, upper parts first.
    finished: list[int] = []
    seen: set[int] = set()
    for start in models:
        if start not in seen:
            _search(start, losers, seen, finished)
    tiers: list[list[int]] = []
    seen.clear()
    for start in reversed(finished):
        if start not in seen:
            part: list[int] = []
            _search(start, winners, seen, part)
            tiers.append(sorted(part))
    return tiers


def _search(start: int, edges: dict[int, list[int]], seen: set[int], finished: list[int]) -> None:
    """Depth first, without recursion; appends models as they are finished."""
    seen.add(start)
    stack = [(start, iter(edges[start]))]
    while stack:
        model, rest = stack[-1]
        following = next((other for other in rest if other not in seen), None)
        if following is None:
            finished.append(model)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(edges[following])))
