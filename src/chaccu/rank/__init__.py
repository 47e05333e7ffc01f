"""Battles between models become ratings with intervals."""

from chaccu.rank.battles import Battles, battles_of_frames, parse_battles
from chaccu.rank.connectivity import find_components, find_tiers
from chaccu.rank.leaderboard import FEW_QUESTIONS, write_leaderboard
from chaccu.rank.length_control import LengthControlled, control_length
from chaccu.rank.ranking import Ranking, Rating, rank_battles
from chaccu.rank.read import read_battles, read_frame
from chaccu.rank.win_rate import WinRate, measure_win_rate, preference_from_logprobs, share_of_preference

__all__ = [
    "FEW_QUESTIONS",
    "Battles",
    "LengthControlled",
    "Ranking",
    "Rating",
    "WinRate",
    "battles_of_frames",
    "control_length",
    "find_components",
    "find_tiers",
    "measure_win_rate",
    "parse_battles",
    "preference_from_logprobs",
    "rank_battles",
    "read_battles",
    "read_frame",
    "share_of_preference",
    "write_leaderboard",
]
