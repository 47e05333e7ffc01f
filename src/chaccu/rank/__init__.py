"""Battles between models become ratings with intervals."""

from chaccu.rank.battles import Battles, parse_battles, read_battles
from chaccu.rank.connectivity import find_components, find_tiers
from chaccu.rank.ranking import Ranking, Rating, rank_battles
from chaccu.rank.win_rate import WinRate, measure_win_rate, preference_from_logprobs, share_of_preference

__all__ = [
    "Battles",
    "Ranking",
    "Rating",
    "WinRate",
    "find_components",
    "find_tiers",
    "measure_win_rate",
    "parse_battles",
    "preference_from_logprobs",
    "rank_battles",
    "read_battles",
    "share_of_preference",
]
