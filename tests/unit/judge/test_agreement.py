"""Agreement figures: worked out by hand, and as published on real votes and verdicts."""

from __future__ import annotations

import gzip
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from made_up_verdicts import both_orders, verdict

from chaccu.errors import DataError
from chaccu.judge.agreement import (
    cohen_kappa,
    count_agreement,
    count_correct,
    krippendorff_alpha,
    measure_position,
    pair_among,
    pair_with,
)
from chaccu.judge.intervals import estimate_mean, estimate_ratio, estimate_share, sign_test_low
from chaccu.judge.verdicts import Verdict
from chaccu.judge.votes import group_votes, read_votes
from chaccu.rank import measure_win_rate

DATA = Path(__file__).parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no shared data beside the checkout")


def expected(name: str) -> Any:
    return json.loads((DATA / name / "expected.json").read_text())


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.open(DATA / path)]


def test_agreement_with_and_without_ties_leaves_out_what_is_missing() -> None:
    pairs = [("a", "a"), ("a", "b"), ("tie", "tie"), ("a", "tie"), (None, "a"), ("b", None)]
    whole, decided = count_agreement(pairs), count_agreement(pairs, ties=False)
    assert (whole.agree, whole.total, whole.ratio, whole.missing) == (2, 4, 0.5, 2)
    assert (decided.agree, decided.total, decided.missing) == (1, 2, 2)
    assert count_agreement([]).ratio is None


def test_cohens_kappa() -> None:
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o = 0.7, p_e = 0.5·0.6 + 0.5·0.4 = 0.5.
    pairs = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    assert cohen_kappa(pairs) == pytest.approx(0.4)
    assert cohen_kappa([*pairs, (None, "yes")]) == cohen_kappa(pairs)
    assert cohen_kappa([]) is None
    assert cohen_kappa([("a", "a")] * 3) is None
    assert cohen_kappa([("a", "b"), ("b", "a")]) == -1


def test_krippendorffs_alpha_on_its_authors_own_example() -> None:
    # Krippendorff 2011, section C: four observers, twelve units, values missing.
    a = [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None]
    b = [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3]
    c = [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None]
    d = [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None]
    units = list(zip(a, b, c, d, strict=True))
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units, "ordinal") == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha(units, "interval") == pytest.approx(0.849, abs=5e-4)


def test_alpha_is_none_where_nothing_tells() -> None:
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([("a", None)]) is None
    assert krippendorff_alpha([("a", "a"), ("a", "a")]) is None
    assert krippendorff_alpha([("a", "a"), ("b", "b")]) == 1
    with pytest.raises(DataError, match="'a' is no number"):
        krippendorff_alpha([("a", "b")], "ordinal")


def test_intervals_go_by_question_and_are_the_same_each_time() -> None:
    shares, questions = [1.0] * 30 + [0.0] * 30, list(range(60))
    alone = estimate_share(shares, questions)
    assert (alone.n, alone.questions, alone.value) == (60, 60, 0.5)
    assert alone == estimate_share(shares, questions)
    assert alone.low == pytest.approx(0.377, abs=0.02)
    # Ten times the same question is no ten times the evidence.
    joined = estimate_share(shares, [number // 10 for number in questions])
    assert joined.low is not None
    assert alone.low is not None
    assert joined.low < alone.low - 0.1
    sure = estimate_share([1.0] * 10, range(10))
    assert (sure.value, sure.high) == (1.0, 1.0)
    assert sure.low == pytest.approx(0.7225, abs=1e-4)  # Wilson: 10 / (10 + 1.96²)
    assert estimate_share([None], [1]).value is None
    assert estimate_mean([7.0], [1]) == estimate_mean([7.0, None], [1, 2])
    assert estimate_mean([7.0], [1]).low is None
    ratio = estimate_ratio([9, 8, 10], [10, 10, 10], [1, 2, 3])
    assert ratio.value == pytest.approx(0.9)
    assert ratio.low == pytest.approx(0.8)
    assert estimate_ratio([1], [0], [1]).value is None


def test_the_sign_tests_lower_end_is_exact_and_goes_by_question() -> None:
    # Clopper and Pearson: all of n won gives 0.025^(1/n); 8 of 10 gives 0.4439 (their table), and a tie keeps its half.
    assert sign_test_low([1.0] * 6, range(6)) == pytest.approx(0.025 ** (1 / 6))
    assert sign_test_low([1.0] * 8 + [0.0] * 2, range(10)) == pytest.approx(0.4439, abs=5e-5)
    assert sign_test_low([1.0] * 6 + [0.5] * 6, range(12)) == pytest.approx((0.5 + 0.025 ** (1 / 6)) / 2)
    assert sign_test_low([0.5] * 9, range(9)) == 0.5
    assert sign_test_low([0.0] * 9, range(9)) == 0.0
    # One question in six turns is one question.
    assert sign_test_low([1.0] * 6, [1] * 6) == pytest.approx(0.025)
    assert 0.49 < sign_test_low([1.0, 1.0, 0.0] * 10_000, range(30_000)) < 2 / 3


def test_no_rounding_makes_an_interval_certain() -> None:
    # Three judges, of whom two say the same on every question: the questions do not differ, and are five.
    found = estimate_share([1.0, 1.0, 0.0] * 5, [number // 3 for number in range(15)])
    assert found.value == pytest.approx(2 / 3)
    assert found.low is not None
    assert found.low < 0.5


def test_the_mean_of_few_questions_has_an_interval_that_holds_as_often_as_it_says() -> None:
    draw = random.Random(7)
    held = dict.fromkeys((5, 10), 0)
    for few in held:
        for _ in range(400):
            found = estimate_mean([draw.gauss(5, 2) for _ in range(few)], range(few))
            assert found.low is not None
            assert found.high is not None
            held[few] += found.low <= 5 <= found.high
    # As they come out of the resamples they hold in 85 and 90 of 100.
    assert held[5] > 0.9 * 400
    assert held[10] > 0.92 * 400


def test_an_interval_of_very_many_questions_is_that_of_its_resamples() -> None:
    found = estimate_mean([float(number % 2) for number in range(3000)], range(3000))
    assert found.low == pytest.approx(0.5 - 1.96 * 0.5 / 3000**0.5, abs=0.002)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.5 / 3000**0.5, abs=0.002)


@needs_data
def test_votes_agree_with_gpt4_and_with_one_another_as_published() -> None:
    folder, published = DATA / "mt_bench", expected("mt_bench")["sample_agreement_q81-90_both_turns"]
    judged = {
        item: labels[0]
        for item, labels in group_votes(read_votes(folder / "sample_gpt4_pair_q81-90.jsonl", first_turn=1)).items()
    }
    people = group_votes(read_votes(folder / "sample_human_votes_q81-90.jsonl", judges="expert_*", first_turn=1))
    for name, pairs in (("gpt4_human", pair_with(judged, people)), ("human_human", pair_among(people))):
        for ties, kind in ((True, "with_ties"), (False, "no_ties")):
            found = count_agreement(pairs, ties=ties)
            assert found.ratio is not None
            assert {"agree": found.agree, "total": found.total, "ratio": round(found.ratio, 6)} == published[f"{name}.{kind}"]


@needs_data
def test_position_bias_and_accuracy_of_a_judge_on_eighty_questions() -> None:
    published = expected("vicuna80")
    names = {"gpt-4": "gpt4", "gpt-3.5": "gpt35", "vicuna": "vicuna-13b"}
    outcomes: dict[int, Any] = {1: "first", 2: "second", 3: "tie", -1: None}
    verdicts = [
        Verdict(
            key=str(number),
            question_id=line["question_id"],
            category="",
            turn=0,
            models=(line["first"], line["second"]),
            judge=line["judge"],
            prompt="pair",
            prompt_sha256="0",
            outcome=outcomes[line["verdict"]],
            text="",
        )
        for number, line in enumerate(lines("vicuna80/prd_claude_judge.jsonl.gz"))
    ]
    found = measure_position(verdicts)
    assert (found.first_rate, found.second_rate) == (published["first_rate"], published["second_rate"])
    assert found.consistency.value == published["swap_consistency"]
    assert found.both_orders == 800
    assert found.first + found.second + found.tie + found.unparsed == 1600
    assert found.first_share.high is not None
    assert found.first_share.high < 0.5
    for name, share in published["claude"].items():
        model = names.get(name, name)
        won = [
            0.5 if one.outcome == "tie" else float(one.models[0 if one.outcome == "first" else 1] == model)
            for one in verdicts
            if model in one.models
        ]
        assert measure_win_rate(won).win_rate == share


def test_one_order_alone_tells_nothing_of_the_places() -> None:
    alone = [verdict("a", "b", "first", number) for number in range(30)]
    found = measure_position(alone)
    assert (found.first, found.first_rate, found.first_share.value) == (30, 1.0, None)
    found = measure_position([*alone, *both_orders("a", "b", "a", 90), *both_orders("a", "b", "flip", 91)])
    assert (found.first_share.value, found.first_share.n) == (3 / 4, 4)


@needs_data
def test_accuracy_and_swap_agreement_where_the_better_answer_is_known() -> None:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines("llmbar/verdicts.jsonl.gz"):
        groups[f"{line['subset']}|{line['judge']}|{line['strategy']}"].append(line)
    table = expected("llmbar")["table"]
    assert groups.keys() == table.keys()
    for name, found in groups.items():
        published = table[name]
        gold = [str(line["label"]) for line in found]
        plain, swapped = ([line[f"winner_{order}"] for line in found] for order in ("original", "swapped"))
        right = [count_correct(labels, gold) for labels in (plain, swapped)]
        assert [one.agree for one in right] == [published["correct_original"], published["correct_swapped"]]
        assert sum(one.agree for one in right) / sum(one.total for one in right) == pytest.approx(published["accuracy"])
        both = count_agreement(zip(plain, swapped, strict=True))
        assert both.agree == published["consistent"]
        assert both.agree / len(found) == published["swap_agreement"]
        # The source takes a verdict that could not be read as one that is not for the first answer.
        kappa = cohen_kappa((one == "1", other == "1") for one, other in zip(plain, swapped, strict=True))
        assert kappa == pytest.approx(published["kappa_agreement_published"], rel=1e-12)
