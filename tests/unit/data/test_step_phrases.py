from __future__ import annotations

from pathlib import Path

import pytest

from chaccu.data.outcome import Changed, Drop
from chaccu.data.steps import build_step
from chaccu.data.steps.phrases import Moderation, Refusals
from chaccu.errors import RecipeError

from .talks import talk, texts_of

REFUSAL = "I'm sorry, but I cannot write that for you."


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("Here is much.\n\nAs an AI made by OpenAI I cannot.", "speaks for another maker"),
        ("I am ChatGPT, here to help.", "speaks for another maker"),
        ("I’m a large language model trained by Google.", "speaks for another maker"),
        ("As an AI language model, I do not have feelings.", "an AI that cannot"),
        ("Here is a list of things. " * 20 + "But as an AI, I can't be sure.", "an AI that reminds"),
        (REFUSAL, "declines to help"),
        ("Sorry, I can’t do that.", "declines to help"),
        ("It is not appropriate to ask. I encourage you to stop.", "lectures instead"),
    ],
)
def test_each_rule_finds_what_it_is_for(answer: str, reason: str) -> None:
    assert Refusals()(talk("q", answer)) == Drop(reason)


@pytest.mark.parametrize(
    "answer",
    [
        "OpenAI made GPT-4; Google made Bard.",
        "Go is a language developed by Google.",
        "As an Airbnb host, you can do more.",
        "It is not appropriate for every soil, but it grows.",
        "She wrote: 'I'm sorry'. " + "The story goes on and on. " * 20 + "I cannot sleep, she said.",
        "A chatbot such as ChatGPT answers questions.",
    ],
)
def test_a_mention_alone_drops_nothing(answer: str) -> None:
    conversation = talk("As an AI made by OpenAI you cannot, can you?", answer)
    assert Refusals()(conversation) is conversation


def test_the_round_goes_or_the_conversation() -> None:
    conversation = talk("q", "fine", "r", REFUSAL, "s", "fine again")
    outcome = Refusals()(conversation)
    assert isinstance(outcome, Changed)
    assert texts_of(outcome) == ["q", "fine", "s", "fine again"]
    assert Refusals(drop="conversation")(conversation) == Drop("declines to help")
    assert Refusals(whole_share=0.3)(conversation) == Drop("declines to help")
    assert isinstance(Refusals(whole_share=0.5)(conversation), Changed)


def test_only_the_named_rules_are_in_force() -> None:
    step = Refusals(rules=("speaks for another maker",))
    conversation = talk("q", REFUSAL)
    assert step(conversation) is conversation
    with pytest.raises(RecipeError, match="declines to halp"):
        Refusals(rules=("declines to halp",))


def test_moderation_counts_finds_and_sees_questions() -> None:
    step = Moderation()
    once = talk("what does 'fuck you' mean?", "It is an insult.")
    assert step(once) is once
    assert step(talk("fuck you, dumbass, go to hell", "Let us stay calm.")) == Drop("insults")


def test_a_list_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rules:\n- {name: sells, phrases: [buy now], where: end, within_chars: 20, of: both}\n")
    step = build_step("moderation", {"lists": [str(path)], "drop": "conversation"})
    assert step(talk("q", "It is good. Buy\n NOW!")) == Drop("sells")  # type: ignore[operator]
    early = talk("q", "Buy now or later, as you like; there is no hurry.")
    assert step(early) is early  # type: ignore[operator]
    assert step.describe()["lists"][0]["name"] == "mine.yaml"


@pytest.mark.parametrize(
    "text",
    [
        "rules:\n- {name: x, patterns: ['(']}",
        "rules:\n- {name: x, patterns: ['(?i)a']}",
        "rules:\n- {name: x, patterns: ['(?P<a>b)', '(?P<a>c)']}",
        "rules:\n- {name: x, phrases: [' ']}",
        "rules:\n- {name: x, phrases: [true]}",
        "rules: no",
        "[]",
        "no",
        "",
    ],
)
def test_a_malformed_list_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        build_step("moderation", {"lists": [str(path)]})


def test_words_of_a_list_are_words(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rules:\n- {name: no, phrases: [off, 2024-01-01]}\n")
    step = Refusals(lists=(str(path),), rules=("no",))
    assert step(talk("q", "It is off.")) == Drop("no")


def test_a_relative_path_is_that_of_the_folder_in_which_the_step_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "mine.yaml").write_text(f"rules: [{{name: says {place}, phrases: [{place}]}}]")
        monkeypatch.chdir(tmp_path / place)
        steps.append(Refusals(lists=("mine.yaml",)))
    monkeypatch.chdir(tmp_path)
    assert [step(talk("q", "here and there")) for step in steps] == [Drop("says here"), Drop("says there")]
    assert steps[0].describe()["lists"] != steps[1].describe()["lists"]
    assert steps[0].describe()["lists"][0]["name"] == "mine.yaml"  # type: ignore[index]
