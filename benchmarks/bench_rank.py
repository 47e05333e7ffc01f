"""How long a million battles take to be ranked, with intervals, and how much memory; beside it, one fit a resample.

    python benchmarks/bench_rank.py [--battles 1000000] [--models 100] [--bootstraps 1000]

The battles are drawn at random: strengths are normal, a fifth are ties, 100,000 questions. Each case is a `chaccu rank` on a
CSV file, reading included, in a process of its own with two threads at the most. Beside it one fit a resample, timed over a
few and multiplied, without reading: a logistic regression by scipy's L-BFGS over all battles, as leaderboards are often made,
and, over cells of equal battles, the same and evalica's own solver. Writes `results/rank.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evalica
import numpy as np
import polars as pl
from machine import RESULTS, describe_machine, write_results
from measured import run_measured
from scipy.optimize import minimize

from chaccu.rank import read_battles
from chaccu.rank.battles import LEFT_WINS, RIGHT_WINS, TIE
from chaccu.rank.cells import Cells, count_cells

Array = np.ndarray[Any, Any]
THREADS = {"OMP_NUM_THREADS": "2", "POLARS_MAX_THREADS": "2"}
QUESTIONS = 100_000
CASES = {
    "bootstrap_by_battle": ["--by-battle"],
    "bootstrap_by_question": [],
    "bootstrap_by_battle_davidson": ["--by-battle", "--ties", "davidson"],
    "sandwich_by_question": ["--intervals", "sandwich"],
    "style_sandwich_by_question": ["--style"],
}
_RESAMPLES = 3


def write_battles(path: Path, battles: int, models: int) -> None:
    """Random battles of models whose strengths are spread as those of an arena."""
    rng = np.random.default_rng(0)
    strength = rng.normal(0, 0.8, models)
    left = rng.integers(0, models, battles)
    right = (left + rng.integers(1, models, battles)) % models
    won = rng.random(battles) < 1 / (1 + np.exp(strength[right] - strength[left]))
    names = np.array([f"model-{number}" for number in range(models)])
    pl.DataFrame(
        {
            "model_a": names[left],
            "model_b": names[right],
            "winner": np.where(rng.random(battles) < 0.2, "tie", np.where(won, "model_a", "model_b")),
            "question_id": rng.integers(0, QUESTIONS, battles),
            "length_a": rng.integers(10, 2000, battles),
            "length_b": rng.integers(10, 2000, battles),
        }
    ).write_csv(path)


def rank(file: Path, bootstraps: int, options: list[str]) -> dict[str, Any]:
    """One command: seconds and the peak of memory."""
    command = [sys.executable, "-m", "chaccu.cli.main", "rank", str(file), "--bootstraps", str(bootstraps), *options]
    took = run_measured(command, environment=THREADS)
    return {"wall_s": round(took.wall_s, 2), "cpu_s": round(took.cpu_s, 2), "peak_bytes": took.peak_bytes}


def fit_by_scipy(cells: Cells, models: int, count: Array) -> None:
    """One logistic regression over pairs, a tie as half a win."""
    share = np.select([cells.outcome == LEFT_WINS, cells.outcome == TIE], [1.0, 0.5], 0.0)

    def loss(theta: Array) -> tuple[float, Array]:
        d = theta[cells.left] - theta[cells.right]
        residual = count * (share - 1 / (1 + np.exp(-d)))
        gradient = np.bincount(cells.left, residual, models) - np.bincount(cells.right, residual, models)
        return float((count * (np.logaddexp(0, d) - share * d)).sum()), -gradient

    minimize(loss, np.zeros(models), jac=True, method="L-BFGS-B")


def fit_by_evalica(cells: Cells, models: int, count: Array) -> None:
    meaning = {LEFT_WINS: evalica.Winner.X, TIE: evalica.Winner.Draw, RIGHT_WINS: evalica.Winner.Y}
    winners = [meaning[outcome] for outcome in cells.outcome.tolist()]
    evalica.bradley_terry(cells.left, cells.right, winners, weights=count, tolerance=1e-6, limit=500)


def time_usual(cells: Cells, models: int, bootstraps: int, fit: Callable[[Cells, int, Array], None]) -> dict[str, Any]:
    """Seconds of a few resamples and fits, one after the other, and of `bootstraps` at that pace."""
    rng = np.random.default_rng(1)
    total = int(cells.count.sum())
    begun = time.perf_counter()
    for _ in range(_RESAMPLES):
        fit(cells, models, np.maximum(rng.multinomial(total, cells.count / total), 1e-3))
    each = (time.perf_counter() - begun) / _RESAMPLES
    return {"resample_s": round(each, 4), "resamples_timed": _RESAMPLES, "all_resamples_s": round(each * bootstraps, 1)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--battles", type=int, default=1_000_000)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--bootstraps", type=int, default=1000)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "machine": describe_machine("chaccu", "evalica", "numpy", "polars", "scipy"),
        "battles": options.battles,
        "models": options.models,
        "bootstraps": options.bootstraps,
        "questions": QUESTIONS,
        "chaccu": {},
        "usual": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "battles.csv"
        write_battles(file, options.battles, options.models)
        for name, case in CASES.items():
            found["chaccu"][name] = rank(file, options.bootstraps, case)
            print(json.dumps({name: found["chaccu"][name]}), flush=True)
        battles = read_battles(file)
    cells = count_cells(battles)
    rows = Cells(left=battles.left, right=battles.right, outcome=battles.outcome, count=np.ones(len(battles), dtype=np.int64))
    for name, of, fit in (
        ("scipy_over_battles", rows, fit_by_scipy),
        ("scipy_over_cells", cells, fit_by_scipy),
        ("evalica_over_cells", cells, fit_by_evalica),
    ):
        found["usual"][name] = time_usual(of, options.models, options.bootstraps, fit)
        print(json.dumps({name: found["usual"][name]}), flush=True)
    write_results(found, RESULTS / "rank.json")


if __name__ == "__main__":
    main()
