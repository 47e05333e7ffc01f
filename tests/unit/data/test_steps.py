from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from chaccu.conversation import Conversation, Message, TextTokenizer, encode_conversation, load_format
from chaccu.data.outcome import Changed, Drop
from chaccu.data.records import Draft, Turn
from chaccu.data.rounds import join_rounds, split_rounds
from chaccu.data.steps.exact_duplicates import ExactDuplicates
from chaccu.data.steps.html import Html, html_to_markdown, is_html
from chaccu.data.steps.language import Language
from chaccu.data.steps.length import Length
from chaccu.data.steps.near_duplicates import NearDuplicates
from chaccu.data.steps.repetition import Repetition
from chaccu.data.steps.roles import Roles
from chaccu.data.steps.token_limit import TokenLimit
from chaccu.errors import RecipeError


def talk(*texts: str, system: str | None = None) -> Conversation:
    roles: tuple[Any, ...] = ("user", "assistant")
    messages = tuple(Message(roles[place % 2], text) for place, text in enumerate(texts))
    return Conversation(messages=messages, system=system, id="t_0", source="dump#t")


def order(*turns: tuple[str, str | None], system: str | None = None) -> Any:
    found = Draft(id="x_1", source="dump#x", turns=tuple(Turn(role, text) for role, text in turns), system=system)
    return Roles(names={"hal": "assistant"}).order_turns(found)


def texts_of(outcome: Any) -> list[str | None]:
    conversation = outcome.conversations[0] if isinstance(outcome, Changed) else outcome
    return [message.content for message in conversation.messages]


Q, QA, R = [("human", "q")], [("human", "q"), ("gpt", "a")], [("human", "r"), ("gpt", "b")]


class TestRoles:
    def test_names_of_dumps_are_known(self) -> None:
        conversation = order(("system", "s"), ("Human", "q"), ("gpt", "a"), ("user", "q2"), ("hal", "a2"))
        assert isinstance(conversation, Conversation)
        assert conversation.system == "s"
        assert [message.role for message in conversation.messages] == ["user", "assistant"] * 2

    @pytest.mark.parametrize(
        ("turns", "kept", "reason"),
        [
            ([("gpt", "a0"), *QA], ["q", "a"], "answer before the first question"),
            ([*QA, ("human", "q2")], ["q", "a"], "question without an answer"),
            ([*QA, ("gpt", "a2")], ["q", "a"], "second answer in a row"),
            (
                [*Q, ("human", "q2"), ("human", " "), ("human", "q"), ("gpt", "a"), *R],
                ["q\n\nq2", "a", "r", "b"],
                "questions in a row joined",
            ),
            ([("human", "q"), ("gpt", None), *R], ["r", "b"], "turn without text"),
            (
                [*QA, ("alien", "z"), *R],
                ["q", "a", "r", "b"],
                "turn of unknown role",
            ),
            ([*QA, ("system", "s")], ["q", "a"], "system turn after the beginning"),
            ([*QA, ("tool", "t")], ["q", "a"], "tool turn without an answer"),
            (
                [("human", "q"), ("tool", "t"), ("gpt", "a"), *R],
                ["r", "b"],
                "tool turn before an answer",
            ),
        ],
    )
    def test_bad_turns_go_and_good_rounds_stay(self, turns: list[Any], kept: list[str], reason: str) -> None:
        outcome = order(*turns)
        assert isinstance(outcome, Changed)
        assert set(outcome.reasons) == {reason}
        assert texts_of(outcome) == kept

    @pytest.mark.parametrize(
        "turns", [[], [("gpt", "a")], [("human", "q")], [("human", None), ("gpt", "a")], [("x", "y")], [("system", "s")]]
    )
    def test_without_a_round_it_is_a_drop(self, turns: list[Any]) -> None:
        assert isinstance(order(*turns), Drop)

    def test_the_last_of_questions_in_a_row_can_be_kept_alone(self) -> None:
        turns = tuple(Turn(role, text) for role, text in [*Q, ("human", "q2"), ("human", ""), ("gpt", "a")])
        outcome = Roles(questions_in_a_row="last").order_turns(Draft(id="x_1", source="dump#x", turns=turns))
        assert isinstance(outcome, Changed)
        assert outcome.reasons == ("earlier question in a row",)
        assert texts_of(outcome) == ["q2", "a"]

    def test_names_of_ones_own_are_met_whatever_their_case(self) -> None:
        turns = tuple(Turn(role, text) for role, text in [("ALICE", "q"), ("Hal 9", "a")])
        conversation = Roles(names={"Alice": "user", "HAL 9": "assistant"}).order_turns(
            Draft(id="x_1", source="dump#x", turns=turns)
        )
        assert isinstance(conversation, Conversation)
        assert texts_of(conversation) == ["q", "a"]

    def test_tool_turns_between_answers_stay(self) -> None:
        assert isinstance(order(("user", "q"), ("assistant", "call"), ("tool", "42"), ("assistant", "a")), Conversation)


PAGE = (
    '<div class="markdown prose"><p>See <strong>this</strong> &amp; that:</p>'
    "<pre><div><div><span>python</span><button><svg></svg>Copy code</button></div>"
    '<div><code class="!whitespace-pre hljs language-python"><span class="hljs-keyword">def</span> f():\n\n\n'
    "    return &quot;&lt;p&gt;&quot;\n</code></div></div></pre>"
    "<ul><li>one</li><li>two<pre><code>a\n  b\n</code></pre></li></ul>"
    "<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>1</td></tr></tbody></table></div>"
)


class TestHtml:
    def test_a_page_becomes_markdown_with_its_code_exact(self) -> None:
        text = html_to_markdown(PAGE) or ""
        assert "See **this** & that:" in text
        assert '```python\ndef f():\n\n\n    return "<p>"\n```' in text
        assert "- two\n" in text
        assert "  ```\n  a\n    b\n  ```" in text
        assert "| a |" in text
        assert "Copy code" not in text

    def test_only_html_answers_change_and_questions_never(self) -> None:
        question = "  <p>What does this do?</p>\r\n "
        outcome = Html()(talk(question, PAGE, "and <b>this</b>?", "The `<b>` tag makes text bold: <b>so</b>"))
        assert isinstance(outcome, Changed)
        texts = texts_of(outcome)
        assert texts[0] == question
        assert texts[2:] == ["and <b>this</b>?", "The `<b>` tag makes text bold: <b>so</b>"]

    @pytest.mark.parametrize(
        "text",
        [
            "plain",
            "<div>\n<p>Use this snippet</p>\n</div>",
            "<p>one</p>\n```html\n<p>two</p>\n```",
            "<html><body><p>x</p></body></html>",
            "<p>begins so but ends in words",
            "1 < 2",
        ],
    )
    def test_answers_about_html_are_left_alone(self, text: str) -> None:
        assert not is_html(text)
        conversation = talk("q", text)
        assert Html()(conversation) is conversation

    def test_code_with_fences_gets_a_longer_fence(self) -> None:
        assert html_to_markdown("<pre><code>```\nx\n```\n</code></pre>") == "````\n```\nx\n```\n````"

    def test_code_in_a_quote_stays_in_the_quote(self) -> None:
        assert (
            html_to_markdown("<blockquote><p>so:</p><pre>a\n\nb\n</pre></blockquote>") == "> so:\n>\n> ```\n> a\n> \n> b\n> ```"
        )

    @pytest.mark.parametrize("text", ["<p>\U000f0000</p>", "<p>&#xF0000;</p>", "<p>&#xF0000;0&#xF0000;</p>"])
    def test_characters_used_as_marks_cannot_be_forged(self, text: str) -> None:
        assert html_to_markdown(text + "<pre>x</pre>") in (None, "\U000f0000\n\n```\nx\n```")

    def test_an_empty_code_block_and_an_empty_answer_vanish(self) -> None:
        assert html_to_markdown("<p>a</p><pre><div><button>Copy code</button><code></code></div></pre>") == "a"
        assert html_to_markdown('<div class="markdown"><p></p></div>') == ""

    def test_what_the_converter_would_lose_is_a_named_drop(self) -> None:
        deep = '<div class="markdown">' + "<div>" * 5000 + "x"
        assert isinstance(Html()(talk("q", deep)), Drop)
        outcome = Html()(talk("q", deep, "r", "<p>b</p>"))
        assert isinstance(outcome, Changed)
        assert len(outcome.reasons) == 2
        assert texts_of(outcome) == ["r", "b"]

    def test_only_what_became_markdown_is_said_to_have(self) -> None:
        deep = '<div class="markdown">' + "<div>" * 5000 + "x"
        outcome = Html()(talk("q", deep, "r", "plain"))
        assert isinstance(outcome, Changed)
        assert outcome.reasons == ("HTML that Markdown cannot hold whole",)
        assert texts_of(outcome) == ["r", "plain"]


class TestLanguage:
    GERMAN = talk(
        "Wie kocht man ein weiches Ei, und wie lange dauert das?", "Man legt das Ei für fünf Minuten in kochendes Wasser."
    )
    ENGLISH = talk("How long does one boil a soft egg?", "Put the egg into boiling water for about five minutes and serve it.")

    def test_defaults_keep_all(self) -> None:
        assert Language()(self.GERMAN) is self.GERMAN

    def test_keep_and_skip(self) -> None:
        assert Language(keep=("en",))(self.ENGLISH) is self.ENGLISH
        assert Language(keep=("en",))(self.GERMAN) == Drop("language de")
        assert Language(skip=("de",))(self.GERMAN) == Drop("language de")

    def test_todays_codes_stand_for_the_detectors_old_ones(self) -> None:
        hebrew = talk("כמה זמן מבשלים ביצה רכה?", "מבשלים את הביצה במים רותחים חמש דקות ומגישים אותה מיד.")
        for code in ("he", "iw"):
            assert Language(keep=(code,))(hebrew) is hebrew
            assert Language(skip=(code,))(hebrew) == Drop("language iw")
            assert Language(keep=(code,))(self.ENGLISH) == Drop("language en")
        for code in ("no", "nb", "jv", "fil", "zh", "zh-Hant", "zh-Hans", "sr-ME"):
            Language(keep=(code,))

    @pytest.mark.parametrize("text", ["", "\x00\x01\ufffe", "7 8 9", "```\ncode\n```"])
    def test_text_of_no_language_is_unknown(self, text: str) -> None:
        conversation = talk(text, text)
        assert Language(keep=("en",))(conversation) is conversation
        assert Language(unknown="drop")(conversation) == Drop("language unknown")


class TestLengthAndRepetition:
    def test_blank_rounds_go(self) -> None:
        outcome = Length()(talk("q", "\u200b\n ", "r", "answer", " ", "answer"))
        assert isinstance(outcome, Changed)
        assert outcome.reasons == ("blank answer", "blank question")
        assert texts_of(outcome) == ["r", "answer"]

    def test_too_short_is_a_drop(self) -> None:
        assert Length(min_chars=16)(talk("hi", "Hello!")) == Drop("too short")
        assert Length(min_answer_chars=10)(talk("a long enough question", "yes")) == Drop("too short")

    def test_repetition_and_gibberish(self) -> None:
        assert Repetition()(talk("q", "again and " * 500)) == Drop("repetition")
        assert Repetition()(talk("q", "\ufffd\ufffd\ufffd ok")) == Drop("gibberish")
        prose = talk("q", "A short answer, said once, about nothing much; but said.")
        assert Repetition()(prose) is prose
        assert Repetition()(talk("again and " * 500, "fine, thank you")).messages  # type: ignore[union-attr]


WORDS = [f"word{number}" for number in range(300)]


class TestDuplicates:
    def admit(self, step: Any, *conversations: Conversation) -> list[str | None]:
        index = step.open_index()
        return [index.admit(step.digest(conversation)) for conversation in conversations]

    def test_exact(self) -> None:
        verdicts = self.admit(
            ExactDuplicates(),
            talk("Hello  there", "A"),
            talk("hello there", "a"),
            talk("hello", "there a"),
            talk("hello there", "b"),
        )
        assert verdicts == [None, "exact duplicate", None, None]

    def test_the_same_turns_under_another_system_text_are_another_conversation(self) -> None:
        systems = (None, "Be kind.", "be  kind.", "Be brief.", "", None)
        conversations = [talk("Hello there", "A", system=system) for system in systems]
        again = "exact duplicate"
        assert self.admit(ExactDuplicates(), *conversations) == [None, None, again, None, None, again]

    def test_near(self) -> None:
        first = talk(" ".join(WORDS[:150]), " ".join(WORDS[150:]))
        near = talk(" ".join(WORDS[:150]), " ".join(WORDS[150:-2]) + " changed")
        half = talk(" ".join(WORDS[:150]), " ".join(reversed(WORDS[150:])))
        short = talk("hi", "hello")
        assert self.admit(NearDuplicates(), first, near, half, short, short) == [None, "near duplicate", None, None, None]

    def test_bands_must_divide_permutations(self) -> None:
        with pytest.raises(RecipeError):
            NearDuplicates(permutations=128, bands=7)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    vocabulary = {chr(code): code for code in range(256)}
    letters = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(
        models.BPE(vocab=vocabulary | {letter: 256 + place for place, letter in enumerate(sorted(letters))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    return path


class TestTokenLimit:
    @pytest.mark.parametrize("chat_format", ["chatml", "vicuna_v1.1", "llama-3", "gemma-3"])
    def test_parts_fit_and_no_round_is_lost(self, tokenizer: Path, chat_format: str) -> None:
        conversation = talk(
            *(f"{'q' if place % 2 == 0 else 'a'}{place} " + "x" * (place * 7 % 90) for place in range(40)), system="Be kind."
        )
        loaded = TextTokenizer.load(tokenizer)
        whole = encode_conversation(conversation, load_format(chat_format), loaded)
        step = TokenLimit(tokenizer=str(tokenizer), max_tokens=len(whole.ids) // 3, chat_format=chat_format)
        outcome = step(conversation)
        assert isinstance(outcome, Changed)
        assert len(outcome.conversations) > 2
        assert tuple(message for part in outcome.conversations for message in part.messages) == conversation.messages
        assert {part.source for part in outcome.conversations} == {"dump#t"}
        assert [part.id for part in outcome.conversations] == [
            f"t_0/{number + 1}" for number in range(len(outcome.conversations))
        ]
        sizes = [len(encode_conversation(part, load_format(chat_format), loaded).ids) for part in outcome.conversations]
        assert tuple(sizes) == outcome.tokens
        assert max(sizes) <= step.max_tokens
        # Greedy: the next part's first round would not have fitted.
        for part, following in zip(outcome.conversations, outcome.conversations[1:], strict=False):
            longer = join_rounds(part, [part.messages, split_rounds(following.messages)[0]])
            assert len(encode_conversation(longer, load_format(chat_format), loaded).ids) > step.max_tokens

    def test_exactly_at_the_limit_stays_whole(self, tokenizer: Path) -> None:
        conversation = talk("question", "answer", "question", "answer")
        size = len(encode_conversation(conversation, load_format("chatml"), TextTokenizer.load(tokenizer)).ids)
        assert TokenLimit(tokenizer=str(tokenizer), max_tokens=size)(conversation) == Changed((conversation,), (), (size,))
        split = TokenLimit(tokenizer=str(tokenizer), max_tokens=size - 1)(conversation)
        assert isinstance(split, Changed)
        assert len(split.conversations) == 2

    @pytest.mark.parametrize("chat_format", ["chatml", "vicuna_v1.1", "llama-3", "gemma-3"])
    @pytest.mark.parametrize(
        "answer",
        [
            "\n".join(f"{line}. a line of text" for line in range(60)),
            "word " * 200 + "\n\n",
            "x" * 900,
            "山の上で。" * 60,
            "```python\n" + "    y = 1\n\n\n" * 60 + "```",
        ],
    )
    def test_an_answer_over_the_limit_is_trained_in_windows(self, tokenizer: Path, answer: str, chat_format: str) -> None:
        step = TokenLimit(tokenizer=str(tokenizer), max_tokens=300, chat_format=chat_format)
        outcome = step(talk("q", "a", "a longer question", answer, "r", "b"))
        assert isinstance(outcome, Changed)
        assert outcome.reasons == ("answer in windows of the token limit", "split at the token limit")
        before, *windows, after = outcome.conversations
        assert [m.content for m in (*before.messages, *after.messages)] == ["q", "a", "r", "b"]
        assert len(windows) > 2
        assert {part.messages[0].content for part in windows} == {"a longer question"}
        last = [part.messages[1] for part in windows]
        assert "".join((m.content or "")[m.trained_from :] for m in last) == answer
        assert [m.unfinished for m in last] == [True] * (len(windows) - 1) + [False]
        assert last[0].trained_from == 0
        assert all(m.trained_from > 0 for m in last[1:])
        loaded = TextTokenizer.load(tokenizer)
        encoded = [encode_conversation(part, load_format(chat_format), loaded) for part in outcome.conversations]
        assert tuple(len(one.ids) for one in encoded) == outcome.tokens
        assert max(outcome.tokens) <= step.max_tokens
        whole = encode_conversation(talk("a longer question", answer), load_format(chat_format), loaded)
        # This tokenizer has a token a byte: what is trained is counted exactly.
        assert sum(sum(one.mask) for one in encoded[1:-1]) == sum(whole.mask)

    def test_a_question_that_leaves_no_room_is_shortened_or_its_round_left_out(self, tokenizer: Path) -> None:
        pasted = "Sum this up: " + "a pasted text goes on " * 40 + "Thank you."
        step = TokenLimit(tokenizer=str(tokenizer), max_tokens=300)
        outcome = step(talk(pasted, "It goes on."))
        assert isinstance(outcome, Changed)
        assert outcome.reasons == ("question over the token limit shortened",)
        (part,) = outcome.conversations
        question, answer = part.messages
        assert (question.content or "").startswith("Sum this up: a pasted")
        assert (question.content or "").endswith("goes on Thank you.")
        assert "\n[…]\n" in (question.content or "")
        assert answer == Message("assistant", "It goes on.")
        assert 280 < outcome.tokens[0] <= 300
        strict = TokenLimit(tokenizer=str(tokenizer), max_tokens=300, long_questions="leave_out")
        assert strict(talk(pasted, "It goes on.")) == Drop("every round is over the token limit")
        named = strict(talk("q", "a", pasted, "It goes on.", "r", "b"))
        assert isinstance(named, Changed)
        assert named.reasons == ("round over the token limit", "split at the token limit")
        assert [[m.content for m in part.messages] for part in named.conversations] == [["q", "a"], ["r", "b"]]

    def test_what_has_no_windows_is_left_out_by_name(self, tokenizer: Path) -> None:
        long = "x" * 500
        rewriting = TokenLimit(tokenizer=str(tokenizer), max_tokens=200, chat_format="falcon")
        assert rewriting(talk("q", "a\n\nb" * 100)) == Drop("every round is over the token limit")
        turns = (Message("user", "q"), Message("assistant", "call"), Message("tool", "t"), Message("assistant", long))
        called = msgspec.structs.replace(talk("q", "a"), messages=turns)
        assert TokenLimit(tokenizer=str(tokenizer), max_tokens=200)(called) == Drop("every round is over the token limit")
        tiny = TokenLimit(tokenizer=str(tokenizer), max_tokens=16)
        assert tiny(talk("q" * 50, long)) == Drop("every round is over the token limit")
