"""Battles between models become ratings with intervals."""

from chaccu.rank.battles import Battles, parse_battles, read_battles
from chaccu.rank.connectivity import find_components, find_tiers
from chaccu.rank.ranking import Ranking, Rating, rank_battles

__all__ = [
    "Battles",
    "Ranking",
    "Rating",
    "find_components",
    "find_tiers",
    "parse_battles",
    "rank_battles",
    "read_battles",
]
