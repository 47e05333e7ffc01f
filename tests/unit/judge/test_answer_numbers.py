from __future__ import annotations

import pytest

from chaccu.judge.answer_numbers import read_numbers, read_results


@pytest.mark.parametrize(
    "answer",
    [
        "1024",
        "1,024",
        "1024.",
        "**1024**",
        "about 1024",
        "≈1024",
        "$1024$",
        "1{,}024",
        "1\\,024 units",
        "1\u202f024",
        "1024.0",
        "1024 bytes",
        "2^10 = 1024",
        "The answer is \\boxed{1024}.",
        "\\boxed{1024}, as 2^10 = 2 · 512 shows, or 4 · 256.",
        "$\\boxed{1{,}024}$",
        "one thousand and twenty-four",
        "One thousand twenty four.",
        "a thousand, twenty-four bytes",
        "1024\n\nThat is 2 to the power of 10.",
        "**1,024.**\n\nExplanation: 2 doubled 9 times.",
    ],
)
def test_a_result_is_read_in_the_forms_that_models_write(answer: str) -> None:
    assert 1024 in read_results(answer)


@pytest.mark.parametrize(
    "answer",
    ["", "none", "1024 or 1025", "First 1024, then minus 1: 1023", "x1024", "\\boxed{1023}, not 1024", "102.4", "1024/2"],
)
def test_a_number_on_the_way_is_no_result(answer: str) -> None:
    assert 1024 not in read_results(answer)


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        ("twelve", 12),
        ("It is one hundred and forty-four.", 144),
        ("three hundred ninety-one", 391),
        ("a hundred and one", 101),
        ("minus sixteen", -16),
        ("Between two and three, so three", 3),
        ("one hundred eighty\u2011three thousand", 183_000),
        ("No one is seventy years old", 70),
        ("7 (seventy)", 7),
        ("\\boxed{seven}", 7),
        ("\\frac{29}{44}", 29 / 44),
        ("$\\dfrac{3}{4}$", 0.75),
        (".659", 0.659),
        ("-\\frac{1}{2}", -0.5),
    ],
)
def test_words_and_fractions_are_numbers(answer: str, result: float) -> None:
    assert read_results(answer) == [result]


def test_all_numbers_of_a_text_are_found() -> None:
    assert read_numbers("From 3-4 to 1,000,000 or -2.5, at 1/2; a1, 1.2.3") == [3, 4, 1_000_000, -2.5, 0.5, 1.2]
