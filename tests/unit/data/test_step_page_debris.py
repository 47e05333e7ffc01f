from __future__ import annotations

from pathlib import Path

import pytest

from chaccu.data.outcome import Changed, Drop
from chaccu.data.steps.page_debris import PageDebris
from chaccu.errors import RecipeError, StorageError

from .talks import talk, texts_of

POLICY = (
    "This content may violate our content policy. If you believe this to be in error, please submit your feedback — your "
    "input will aid our research in this area."
)


@pytest.mark.parametrize(
    ("question", "answer", "kept", "reason"),
    [
        ("q", "1 / 2Sure, here it is.", ["q", "Sure, here it is."], "page counter cut"),
        ("q", "1 / 2⚡ In addition", ["q", "⚡ In addition"], "page counter cut"),
        ("q", "3 / 12\nSure.", ["q", "Sure."], "page counter cut"),
        ("!2 / 2paint it", "a", ["paint it", "a"], "page counter cut"),
        ("q", "```\nx\n```\n\n1 / 2Note that x.", ["q", "```\nx\n```\n\nNote that x."], "page counter cut"),
        (" what? \nCopy123 chars / 45 words", "a", [" what? \n", "a"], "page tail cut"),
        ("q", "An answer.Copy5 chars / 1 words", ["q", "An answer."], "page tail cut"),
        (f"how? {POLICY}", "a", ["how? ", "a"], "page tail cut"),
        ("q", "Use it so:\npythonCopy code\nx = 1\nCopy code\n", ["q", "Use it so:\npython\nx = 1\n"], "button label cut"),
    ],
)
def test_debris_is_cut_out_and_nothing_beside_it(question: str, answer: str, kept: list[str], reason: str) -> None:
    outcome = PageDebris()(talk(question, answer))
    assert isinstance(outcome, Changed)
    assert outcome.reasons == (reason,)
    assert texts_of(outcome) == kept


@pytest.mark.parametrize(
    "answer",
    [
        "1 / 2 cup of sugar",
        "1 / 2",
        "2 / 1\nis two",
        "3 / 4-inch pipes",
        "1 / 1Sure",
        "The button says 'Copy code' and copies.",
        "Copy123 chars / 45 words is what the page adds.",
        "The `sqlCopy code` line is not needed.",
        "Too many requests in 1 hour. Try again later. is what a server says when it is asked too often.",
        "network errors are common",
    ],
)
def test_texts_that_speak_of_such_things_stay(answer: str) -> None:
    conversation = talk("q", answer)
    assert PageDebris()(conversation) is conversation


@pytest.mark.parametrize(
    "notice",
    [
        "Too many requests in 1 hour. Try again later.",
        "network error",
        "network error\n\nOnly one message at a time. Please allow any other responses to complete before sending another "
        "message, or wait one minute.",
        POLICY,
        "EmptyMarkdownContent",
    ],
)
def test_rounds_whose_answer_is_the_pages_own_message_go(notice: str) -> None:
    outcome = PageDebris()(talk("q", "a", "r", notice))
    assert isinstance(outcome, Changed)
    assert texts_of(outcome) == ["q", "a"]
    assert PageDebris()(talk("q", notice)) == Drop("answer is a page notice")


def test_questions_can_be_left_byte_for_byte() -> None:
    conversation = talk("what?Copy123 chars / 45 words", "a")
    assert PageDebris(questions=False)(conversation) is conversation


def test_a_share_note_is_no_system_text() -> None:
    note = "*This conversation is shared from [**Some Hub**](https://hub.example)*"
    outcome = PageDebris()(talk("q", "a", system=note))
    assert isinstance(outcome, Changed)
    assert outcome.conversations[0].system is None
    kept = talk("q", "a", system="Be kind.")
    assert PageDebris()(kept) is kept


def test_a_list_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("tails: ['Sent from my phone']\n")
    step = PageDebris(lists=("page_debris", str(path)))
    assert texts_of(step(talk("q", "Fine. Sent from my phone"))) == ["q", "Fine. "]
    described = step.describe()["lists"]
    assert isinstance(described, list)
    assert [entry["name"] for entry in described] == ["page_debris", "mine.yaml"]
    bad = ["tails: ['(']", "tale: [x]", "tails: [", "tails: ['(?i)x']", "labels: x", "labels: [1]", "[labels]", "labels"]
    for name, text in ((f"bad{number}.yaml", text) for number, text in enumerate(bad)):
        (tmp_path / name).write_text(text)
        with pytest.raises(RecipeError, match=name):
            PageDebris(lists=(str(tmp_path / name),))
    with pytest.raises(StorageError):
        PageDebris(lists=("none.yaml",))


def build_own(tmp_path: Path, text: str, *before: str) -> PageDebris:
    """The step with a list of one's own, behind the lists `before`."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return PageDebris(lists=(*before, str(path)))


@pytest.mark.parametrize("before", [(), ("page_debris",)])
@pytest.mark.parametrize(
    ("text", "answer", "kept", "reason"),
    [
        ("labels: ['Copy']", "so:\nCopy\nx = 1", "so:\nx = 1", "button label cut"),
        (
            "labels: ['(?P<language>\\w*) ?Run', '(\\w+) Save']",
            "so:\npython Run\nx\nsql Save",
            "so:\npython\nx\nsql",
            "button label cut",
        ),
        ("labels: ['(\\w)\\1+', '(\\w)-\\1']", "so:\naaa\nx\nb-b\nb-c", "so:\na\nx\nb\nb-c", "button label cut"),
        ("counters: ['\\[Version \\d+\\] ?']", "[Version 2] Sure.", "Sure.", "page counter cut"),
        ("counters: ['\\[\\d+ / \\d+\\] ']", "[2 / 3] Sure.", "Sure.", "page counter cut"),
        ("later_counters: ['(?<=\\n)v\\d\\n']", "Sure.\nv2\nOr so.", "Sure.\nOr so.", "page counter cut"),
        ("tails: ['Sources:.*']", "Sure." + "Sources: " + "x" * 900, "Sure.", "page tail cut"),
        ("tails: ['Bye|Sent']", "Bye is said. Sent", "Bye is said. ", "page tail cut"),
    ],
)
def test_what_a_list_of_ones_own_names_is_found_wherever_it_stands(
    tmp_path: Path, before: tuple[str, ...], text: str, answer: str, kept: str, reason: str
) -> None:
    outcome = build_own(tmp_path, text, *before)(talk("q", answer))
    assert isinstance(outcome, Changed)
    assert outcome.reasons == (reason,)
    assert texts_of(outcome) == ["q", kept]


def test_notices_of_ones_own_may_be_long(tmp_path: Path) -> None:
    step = build_own(tmp_path, "notices: ['The model sleeps\\. z+']", "page_debris")
    assert step(talk("q", "The model sleeps. " + "z" * 900 + "\n\nThe model sleeps. z")) == Drop("answer is a page notice")


def test_a_counter_that_has_two_numbers_must_count_in_lists_of_ones_own_too(tmp_path: Path) -> None:
    step = build_own(tmp_path, "counters: ['\\[\\d+ / \\d+\\] ']")
    for answer in ("[3 / 2] Sure.", "[0 / 2] Sure.", "[1 / 1] Sure."):
        conversation = talk("q", answer)
        assert step(conversation) is conversation


def test_patterns_that_find_nothing_change_nothing(tmp_path: Path) -> None:
    conversation = talk("q", "\nSure.")
    assert build_own(tmp_path, "{tails: ['x*'], counters: ['x*']}")(conversation) is conversation


def test_the_lists_of_one_step_are_looked_for_side_by_side(tmp_path: Path) -> None:
    step = build_own(tmp_path, "labels: ['Run']", "page_debris")
    assert texts_of(step(talk("q", "so:\npythonCopy code\nx\nRun"))) == ["q", "so:\npython\nx"]
    assert texts_of(step(talk("q", "so:\nRun\nx"))) == ["q", "so:\nx"]
