"""A judge held to people's votes, with figures worked out by hand and on real votes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_up_verdicts import both_orders, verdict, write_lines
from typer.testing import CliRunner

from chaccu.cli.judge import app
from chaccu.errors import DataError
from chaccu.judge.asking import JudgingFailure
from chaccu.judge.calibrate import Calibration, calibrate
from chaccu.judge.verdicts import Verdict
from chaccu.judge.votes import Vote, group_votes, read_votes

DATA = Path(__file__).parents[4] / "shared" / "data"


def vote(question: int, winner: Any, judge: str = "ann", **fields: Any) -> Vote:
    return Vote(
        **{"question_id": question, "turn": 0, "model_a": "a", "model_b": "b", "winner": winner, "judge": judge, **fields}
    )


def one_calibration(votes: list[Vote], verdicts: list[Verdict]) -> Calibration:
    (found,) = calibrate(votes, verdicts)
    return found


def test_agreement_ceiling_confusion_and_contradictions() -> None:
    verdicts = [one for q, winner in enumerate(["a", "a", "b", "tie", "a"]) for one in both_orders("a", "b", winner, q)]
    verdicts += [verdict("a", "b", None, 5)]
    votes = [
        vote(0, "model_a"),
        vote(0, "model_a", "bob"),
        vote(1, "model_b"),
        # The same pair the other way round: b won.
        vote(1, "model_a", "bob", model_a="b", model_b="a"),
        vote(2, "model_b"),
        vote(2, "tie", "bob"),
        vote(3, "model_a"),
        vote(4, "model_a"),
        vote(4, None, "bob"),
        vote(5, "model_a"),
        vote(9, "model_a"),
        vote(4, "model_a"),
    ]
    found = one_calibration(votes, verdicts)
    assert (found.votes, found.compared, found.unread, found.without_verdict, found.no_winner, found.repeated) == (
        12,
        8,
        1,
        1,
        1,
        1,
    )
    assert found.items == 5
    ties, decided = found.agreement.with_ties, found.agreement.no_ties
    assert (ties.agree, ties.total, ties.rate.questions) == (4, 8, 5)
    assert (decided.agree, decided.total) == (4, 6)
    assert found.human is not None
    assert (found.human.with_ties.agree, found.human.with_ties.total) == (2, 3)
    assert (found.human.no_ties.agree, found.human.no_ties.total) == (2, 2)
    assert found.confusion == {
        "model_a": {"model_a": 3, "model_b": 2},
        "model_b": {"model_b": 1, "tie": 1},
        "tie": {"model_a": 1},
    }
    assert [(one.question_id, one.judge_says, one.votes, one.is_opposite) for one in found.contradictions] == [
        ("1", "model_a", {"model_b": 2}, True),
        ("3", "tie", {"model_a": 1}, False),
    ]
    assert found.more_votes > 100


def test_without_a_second_vote_there_is_no_ceiling_and_without_a_match_no_figure() -> None:
    verdicts = both_orders("a", "b", "a")
    found = one_calibration([vote(1, "model_a", turn=None)], verdicts)
    assert found.human is None
    assert found.human_alpha is None
    assert found.agreement.with_ties.agree == 1
    with pytest.raises(DataError, match="none of the 1 votes is on a pair that was judged"):
        calibrate([vote(2, "model_a")], verdicts)


def test_who_votes_first_changes_nothing_among_people() -> None:
    verdicts = [one for q in range(4) for one in both_orders("a", "b", "a", q)]
    said = [("model_a", "model_b"), ("model_a", "model_b"), ("model_a", "model_a"), ("model_b", "model_b")]
    votes = [vote(q, winner, judge) for q, both in enumerate(said) for winner, judge in zip(both, ("ann", "bob"), strict=True)]
    found, turned = one_calibration(votes, verdicts), one_calibration(votes[::-1], verdicts)
    assert found.human is not None
    assert turned.human is not None
    # Scott's pi: half agree, and of all eight votes four are for each. Cohen's of ann and bob would be 1/5.
    assert found.human.with_ties.kappa == turned.human.with_ties.kappa == 0.0


def test_what_failed_in_one_order_was_not_judged_and_two_prompts_do_not_mix() -> None:
    verdicts = [*both_orders("a", "b", "a", 1), verdict("a", "b", "first", 2)]
    failure = JudgingFailure(
        question_id=2, category="math", turn=0, models=("b", "a"), judge="j", prompt="pair", cause="time-out", message="…"
    )
    votes = [vote(1, "model_a"), vote(2, "model_a")]
    (found,) = calibrate(votes, verdicts, [failure])
    assert (found.votes, found.compared, found.without_verdict) == (2, 1, 1)
    with pytest.raises(DataError, match="judged question 1 by two prompts, pair and vicuna"):
        calibrate(votes, [*verdicts, *both_orders("a", "b", "b", 1, prompt="vicuna")])


def test_a_vote_without_a_turn_finds_its_verdict_and_its_category() -> None:
    verdicts = [*both_orders("a", "b", "a", 1), *both_orders("a", "b", "b", 2, category="art", turn=None)]
    found = one_calibration([vote(1, "model_a", turn=None), vote(2, "model_b")], verdicts)
    assert {name: one.with_ties.agree for name, one in found.by_category.items()} == {"math": 1, "art": 1}
    # A vote on the first of several turns is not on the whole conversation.
    found = one_calibration([vote(1, "model_a"), vote(2, "model_b"), vote(2, "model_b", turn=1)], verdicts)
    assert (found.compared, found.without_verdict) == (1, 2)


def test_many_votes_that_all_agree_are_enough() -> None:
    verdicts = [one for q in range(200) for one in both_orders("a", "b", "a", q)]
    assert one_calibration([vote(q, "model_a") for q in range(200)], verdicts).more_votes == 0


def test_files_of_votes_in_csv_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "votes.csv").write_text(
        "question_id,turn,model_a,model_b,winner,judge\n7,1,x,y,y,ann\n8,,x,y,tie (bothbad),\n9,1,x,y,,ann\n"
    )
    found = read_votes(tmp_path / "votes.csv", first_turn=1)
    assert [(one.question_id, one.turn, one.winner, one.judge) for one in found] == [
        ("7", 0, "model_b", "ann"),
        ("8", None, "tie", ""),
        ("9", 0, None, "ann"),
    ]
    assert len(read_votes(tmp_path / "votes.csv", judges="a*")) == 2
    (tmp_path / "votes.jsonl").write_bytes(
        b'\xef\xbb\xbf{"question_id": 1, "model_a": "x", "model_b": "y", "winner": "tie"}\r\n\r\n'
    )
    assert [one.winner for one in read_votes(tmp_path / "votes.jsonl")] == ["tie"]
    for text, words in (
        ('{"question_id": 1, "model_a": "x", "model_b": "y", "winner": "z"}', "has the winner 'z'"),
        ('{"question_id": 1, "model_a": "x", "model_b": "x", "winner": "tie"}', "against itself"),
        ('{"question_id": 1, "model_a": "x"}', "line 1 .* is no vote"),
        ("", "holds no vote"),
    ):
        (tmp_path / "votes.jsonl").write_text(text + "\n")
        with pytest.raises(DataError, match=words):
            read_votes(tmp_path / "votes.jsonl")
    (tmp_path / "votes.jsonl").write_text('{"question_id": 1, "turn": 0, "model_a": "x", "model_b": "y", "winner": "tie"}\n')
    with pytest.raises(DataError, match="has the turn 0; the first is 1"):
        read_votes(tmp_path / "votes.jsonl", first_turn=1)


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data beside the checkout")
def test_the_command_reaches_the_published_figures(tmp_path: Path) -> None:
    published = json.loads((DATA / "mt_bench" / "expected.json").read_text())["sample_agreement_q81-90_both_turns"]
    labels = group_votes(read_votes(DATA / "mt_bench" / "sample_gpt4_pair_q81-90.jsonl", first_turn=1))
    verdicts = [
        one
        for (question, turn, model_a, model_b), given in labels.items()
        for one in both_orders(
            model_a, model_b, {"model_a": model_a, "model_b": model_b, "tie": "flip"}[str(given[0])], question, turn=turn
        )
    ]
    write_lines(tmp_path / "verdicts.jsonl", verdicts)
    votes = str(DATA / "mt_bench" / "sample_human_votes_q81-90.jsonl")
    arguments = ["calibrate", votes, "--verdicts", str(tmp_path), "--people", "expert_*", "--first-turn", "1"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    (found,) = json.loads(result.stdout)
    assert (found["votes"], found["compared"]) == (312, 312)
    for ours, theirs in (("agreement", "gpt4_human"), ("human", "human_human")):
        for kind in ("with_ties", "no_ties"):
            one = found[ours][kind]
            assert {"agree": one["agree"], "total": one["total"], "ratio": round(one["rate"]["value"], 6)} == published[
                f"{theirs}.{kind}"
            ]
    shown = CliRunner().invoke(app, arguments)
    said = shown.stdout
    assert shown.stderr == "312 votes of expert_*; 66 of others are left out\n"
    assert "with your people: 185 of 312 agree, 59.3 %" in said
    assert "your people among themselves: 85 of 159 agree" in said
