from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import msgspec
import pytest

from chaccu.errors import UsageError
from chaccu.rank import Ranking, parse_battles, rank_battles, write_leaderboard

EVIL = "<b onclick=x>|evil\n"


@pytest.fixture(scope="module")
def ranking() -> Ranking:
    rows = [("a", EVIL, "model_a")] * 6 + [("a", EVIL, "model_b")] * 4 + [(EVIL, "c", "both_bad")] * 3 + [("a", "c", "model_b")]
    return rank_battles(parse_battles([*rows, ("top", "a", "model_a"), ("x", "y", "tie")]), bootstraps=50, with_pairs=True)


def test_json_is_the_ranking(tmp_path: Path, ranking: Ranking) -> None:
    write_leaderboard(tmp_path / "r.json", ranking)
    assert msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=Ranking) == ranking
    assert len(json.loads((tmp_path / "r.json").read_text())["pairs"]) == 4


def test_csv_has_a_row_for_each_model_and_nothing_for_what_is_not_known(tmp_path: Path, ranking: Ranking) -> None:
    write_leaderboard(tmp_path / "r.csv", ranking)
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == [row.model for row in ranking.ratings]
    top = rows[0]
    assert (top["model"], top["place"], top["rating"], top["low"], top["best_rank"]) == ("top", "1", "", "", "")
    assert float(rows[1]["rating"]) == ranking.ratings[1].rating


def test_markdown_keeps_its_columns_whatever_the_names(tmp_path: Path, ranking: Ranking) -> None:
    write_leaderboard(tmp_path / "r.md", ranking)
    text = (tmp_path / "r.md").read_text()
    assert "\\<b onclick=x\\>\\|evil" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {10}
    assert text.count("## Component") == 3
    assert "- 16 battles = 12 decided + 4 ties (3 of them both bad), 6 models" in text
    assert "- 2 components that never met" in text


def test_the_page_needs_nothing_else_and_shows_names_as_text(tmp_path: Path, ranking: Ranking) -> None:
    write_leaderboard(tmp_path / "r.html", ranking)
    text = (tmp_path / "r.html").read_text()
    assert not re.search(r"https?:|src=|@import|url\(|<link", text)
    assert "<b onclick" not in text
    assert "&lt;b onclick=x&gt;|evil" in text
    assert text.count("<tbody>") == 3
    assert text.count("</tr>") == 3 + len(ranking.ratings)


def test_another_form_is_refused(tmp_path: Path, ranking: Ranking) -> None:
    with pytest.raises(UsageError, match=r"r.xlsx ends in .xlsx"):
        write_leaderboard(tmp_path / "r.xlsx", ranking)
