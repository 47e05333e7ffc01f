from __future__ import annotations

import msgspec
import pytest

from chaccu.judge.checks import Check, PythonCase, PythonCheck, meets_check, read_code_blocks


def check(text: str) -> Check:
    return msgspec.json.decode(text, type=Check)


@pytest.mark.parametrize(
    ("rule", "met", "unmet"),
    [
        (
            '{"kind": "number", "value": 12}',
            ["12", "5 + 7 = 12.", "**12**", "x=12", "Twelve", "12\n\n5 more than 7"],
            ["", "12 or 13", "1.2", "v12"],
        ),
        ('{"kind": "number", "value": -3}', ["-3", "It is −3.", "-3.0"], ["3", "5-3 3"]),
        ('{"kind": "number", "value": 1234.5}', ["1,234.5", "1234.5"], ["1 234.5 6", "1.2345"]),
        ('{"kind": "number", "value": 0.659, "tolerance": 0.001}', ["29/44", "0.6591"], ["0.65", "66 %"]),
        ('{"kind": "exact", "any_of": ["Tom", "Tommy"]}', ["tom.", " **Tom** ", '"Tommy"'], ["Tom is", ""]),
        (
            '{"kind": "exact", "any_of": ["QX-7"], "case": true}',
            ["QX-7", " QX-7\n", "`QX-7`", "**QX-7**.", "QX\u20117"],
            ["qx-7", "QX-7 it is"],
        ),
        ('{"kind": "pattern", "pattern": "a+b"}', ["aab", "AB"], ["aabc", "b"]),
        ('{"kind": "pattern", "pattern": "a+b", "case": true}', ["ab"], ["AB"]),
        ('{"kind": "contains", "all": ["sea"], "none": ["cold"]}', ["The Sea."], ["season", "sea, cold", ""]),
        ('{"kind": "contains", "any": ["CO₂", "carbon dioxide"]}', ["Carbon dioxide", "it is CO₂."], ["carbon"]),
        (
            '{"kind": "json", "keys": ["a"]}',
            ['{"a": 1, "b": 2}', '```json\n{"a": 1}\n```', '`{"a": 1}`'],
            ['{"b": 1}', "[1]", "a", "[" * 9999],
        ),
        ('{"kind": "json", "values": {"a": true}, "only": true}', ['{"a": true}'], ['{"a": 1}', '{"a": true, "b": 1}']),
        ('{"kind": "words", "least": 2, "most": 3}', ["a b", "a b c"], ["a", "a b c d", ""]),
        ('{"kind": "starts", "text": "Today"}', [" Today it", '"Today it"', "**Today** it"], ["today", "On Today"]),
        ('{"kind": "ends", "text": "!"}', ["Yes! \n", '"Yes!"'], ["Yes!."]),
        ('{"kind": "list", "items": 2}', ["Here:\n- a\n* b", "• a\n• b"], ["- a", "-a\n-b", "- a\n- b\n- c", "1. a\n2. b"]),
        ('{"kind": "list", "items": 1, "marker": "dash"}', ["- a"], ["* a", "• a"]),
        ('{"kind": "list", "items": 2, "marker": "number", "only": true}', ["1. a\n\n2) b"], ["So:\n1. a\n2. b"]),
        ('{"kind": "lines", "count": 2}', ["a\n\nb\n"], ["a", "a\nb\nc"]),
        ('{"kind": "case", "case": "upper"}', ["HELLO, 2!"], ["Hello", "2!"]),
        ('{"kind": "case", "case": "lower"}', ["hello"], ["Hello"]),
        (
            '{"kind": "language", "code": "fr"}',
            ["Bonjour ! Comment avez-vous dormi cette nuit ?"],
            ["How did you sleep last night?"],
        ),
    ],
)
def test_answers_meet_a_rule_or_not(rule: str, met: list[str], unmet: list[str]) -> None:
    read = check(rule)
    assert [text for text in met if not meets_check(text, read)] == []
    assert [text for text in unmet if meets_check(text, read)] == []


def test_a_language_is_none_where_the_text_is_none() -> None:
    assert not meets_check("\x00\x01", check('{"kind": "language", "code": "fr"}'))


def test_unknown_kinds_and_fields_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="Invalid value 'rhyme'"):
        check('{"kind": "rhyme"}')
    with pytest.raises(msgspec.ValidationError, match="unknown field `tolerence`"):
        check('{"kind": "number", "value": 1, "tolerence": 2}')


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ('{"kind": "pattern", "pattern": "a("}', "is no regular expression"),
        ('{"kind": "contains"}', "contains needs words"),
        ('{"kind": "words", "least": 3, "most": 2}', "at most 2 is less than at least 3"),
        ('{"kind": "exact", "any_of": []}', "length >= 1"),
        ('{"kind": "starts", "text": ""}', "length >= 1"),
        ('{"kind": "number", "value": 1, "tolerance": -1}', ">= 0"),
        ('{"kind": "python", "function": "f", "cases": []}', "length >= 1"),
        ('{"kind": "python", "function": "f", "cases": [{"args": [], "returns": 1}], "timeout_s": 0}', "> 0"),
    ],
)
def test_rules_that_any_answer_or_none_could_meet_are_refused(rule: str, says: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=says):
        check(rule)


def test_code_is_not_read_off_a_text() -> None:
    with pytest.raises(TypeError, match="a check of kind python"):
        meets_check("def f(): pass", PythonCheck(function="f", cases=(PythonCase(args=(), returns=1),)))


def test_code_is_what_is_fenced() -> None:
    assert read_code_blocks("So:\n```python\na = 1\n```\nand\n```\nb = 2\n```") == ["a = 1\n", "b = 2\n"]
    assert read_code_blocks("```py\na = 1") == ["a = 1"]
    assert read_code_blocks("a = 1") == ["a = 1"]
