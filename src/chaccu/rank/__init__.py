"""Battles between models become ratings with intervals."""

from chaccu.rank.battles import Battles, parse_battles
from chaccu.rank.connectivity import find_components, find_tiers
from chaccu.rank.length_control import LengthControlled, control_length
from chaccu.rank.ranking import Ranking, Rating, rank_battles
from chaccu.rank.read import read_battles
from chaccu.rank.win_rate import WinRate, measure_win_rate, preference_from_logprobs, share_of_preference

__all__ = [
    "Battles",
    "LengthControlled",
    "Ranking",
    "Rating",
    "WinRate",
    "control_length",
    "find_components",
    "find_tiers",
    "measure_win_rate",
    "parse_battles",
    "preference_from_logprobs",
    "rank_battles",
    "read_battles",
    "share_of_preference",
]
