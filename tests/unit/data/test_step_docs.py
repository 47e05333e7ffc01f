"""docs/steps: a page for every step, with its settings, configurations that load, its reasons, and examples that are so."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import polars
import pytest
import yaml

from chaccu.data.clean import clean_conversations
from chaccu.data.config import CleanConfig, default_config_text, load_config
from chaccu.data.records import read_conversations
from chaccu.data.steps import list_steps, load_step_type
from chaccu.data.steps.plain_yaml import parse_yaml
from chaccu.testing.tiny import build_tokenizer

DOCS = Path(__file__).parents[3] / "docs"
STEPS = sorted(list_steps())
BEFORE_ROLES = ("record_marks", "overlap")
SHIPPED = {name: settings for entry in parse_yaml(default_config_text())["steps"] for name, settings in entry.items()}

_BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`]+)`")
_SENTENCE = re.compile(r"(?=.*[a-z])[A-Za-z\0]+(?: [A-Za-z\0]+)+")
_PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b")
_HEAD = re.compile(r"(read|written) (\S+?)(: as read)?")
_ROW = re.compile(r"ledger (\S+): (dropped|changed), (.+)")
_MARK = re.compile(r"  (\w+) = (.+)")
_TURN = re.compile(r"  (\w+)(?: \[([^]]*)\])?: (.*)")
_TIMES = re.compile(r'"(.*)" × (\d+)')


def page_of(name: str) -> str:
    return (DOCS / "steps" / f"{name}.md").read_text(encoding="utf-8")


def table_of(name: str, first: str) -> dict[str, list[str]]:
    """Rows of the page's table whose first column is called `first`, by the code in that column."""
    rows: dict[str, list[str]] = {}
    inside = False
    for line in page_of(name).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == first:
            inside = True
        elif inside and not set(line) <= set("|-"):
            rows[cells[0].strip("`")] = cells[1:]
    return rows


def write_files(name: str, folder: Path) -> None:
    """The files that the page shows, beside which its configurations load."""
    for _, file, text in _BLOCK.findall(page_of(name)):
        if file:
            (folder / file).write_text(text, encoding="utf-8")


def load_steps(steps: list[Any], folder: Path) -> CleanConfig:
    """A page's steps as a configuration: `roles` is put in its place when they leave it out."""
    names = [next(iter(step)) if isinstance(step, dict) else step for step in steps]
    if "roles" not in names:
        place = sum(name in BEFORE_ROLES for name in names)
        steps = [*steps[:place], "roles", *steps[place:]]
    path = folder / "clean.yaml"
    path.write_text(yaml.safe_dump({"steps": steps}, allow_unicode=True), encoding="utf-8")
    return load_config(path)


def reasons_in_code(name: str) -> set[str]:
    """Texts in the step's module and the rules of its lists; \\0 stands for what a text is formatted with."""
    step_type = load_step_type(name)
    tree = ast.parse(Path(sys.modules[step_type.__module__].__file__ or "").read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in _nodes_of_results(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.add("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
    file = DOCS.parent / "src" / "chaccu" / "data" / "steps" / f"{name}.yaml"
    rules = parse_yaml(file.read_text(encoding="utf-8")).get("rules", []) if file.is_file() else []
    return found | {rule["name"] for rule in rules}


def _nodes_of_results(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes below `node`, but for those of `raise` statements, comparisons and docstrings."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.Raise | ast.Compare) and not (
            isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        ):
            yield child
            yield from _nodes_of_results(child)


def test_every_step_has_a_page_that_the_table_links_to() -> None:
    data = (DOCS / "data.md").read_text(encoding="utf-8")
    assert [name for name in STEPS if f"| [`{name}`](steps/{name}.md) |" not in data] == []
    assert sorted(page.stem for page in DOCS.glob("steps/*.md")) == STEPS


@pytest.mark.parametrize("name", STEPS)
def test_every_setting_is_named_with_its_default(name: str) -> None:
    fields = {field.name: field for field in msgspec.structs.fields(load_step_type(name))}
    rows = table_of(name, "setting")
    assert list(rows) == list(fields)
    for field in fields.values():
        kind, default, meaning = rows[field.name]
        assert meaning
        choices = [str(value) for value in getattr(msgspec.inspect.type_info(field.type), "values", ())]
        assert [choice for choice in choices if choice not in _CODE.findall(kind)] == []
        if field.required:
            assert default == "required"
            continue
        value: Any = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
        value = list(value) if isinstance(value, tuple) else value
        shown = [parse_yaml(code) for code in _CODE.findall(default) if code != "clean.yaml"]
        shipped = (SHIPPED.get(name) or {}).get(field.name, value)
        assert shown == [value, *([shipped] if shipped != value else [])]


@pytest.mark.parametrize("name", STEPS)
def test_every_configuration_on_a_page_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(name, tmp_path)
    blocks = [text for language, file, text in _BLOCK.findall(page_of(name)) if language == "yaml" and not file]
    assert blocks
    for text in blocks:
        value = parse_yaml(text)
        assert isinstance(value, list), text
        assert name in [step.name for step in load_steps(value, tmp_path).steps]


@pytest.mark.parametrize("name", STEPS)
def test_the_reasons_are_those_of_the_code(name: str) -> None:
    known = reasons_in_code(name)
    listed = table_of(name, "reason")
    assert listed
    shown = {reason if reason in known else _PLACEHOLDER.sub("\0", reason) for reason in listed}
    assert shown - known == set()
    assert {row for cells in listed.values() for row in cells[0].split(", ")} <= {"changed", "dropped"}
    assert {text for text in known if _SENTENCE.fullmatch(text)} - shown == set()


class Example(NamedTuple):
    """What a page's example reads, writes and enters in the ledger."""

    records: list[dict[str, Any]]
    written: dict[str, Any]
    ledger: list[tuple[str, str, str]]


def parse_example(text: str) -> Example:
    """The records of an example as ShareGPT has them, and what it says becomes of them."""
    example = Example([], {}, [])
    turns: list[dict[str, Any]] = []
    for line in text.splitlines():
        if (head := _HEAD.fullmatch(line)) is not None:
            turns = []
            if head[1] == "read":
                example.records.append({"id": head[2], "conversations": turns})
            else:
                example.written[head[2]] = None if head[3] else turns
        elif (row := _ROW.fullmatch(line)) is not None:
            example.ledger.append((row[1], row[2], row[3]))
        elif (mark := _MARK.fullmatch(line)) is not None:
            example.records[-1][mark[1]] = json.loads(mark[2])
        else:
            turn = _TURN.fullmatch(line)
            assert turn is not None, line
            times = _TIMES.fullmatch(turn[3])
            said = (times[1] * int(times[2]) if times else turn[3]).replace("\\n", "\n")
            turns.append({"from": turn[1], "value": said} | ({"as": turn[2]} if turn[2] else {}))
    for record in example.records:
        if example.written.get(record["id"], ()) is None:
            known = {"human": "user", "gpt": "assistant"}
            example.written[record["id"]] = [turn | {"from": known[turn["from"]]} for turn in record["conversations"]]
    return example


@pytest.mark.parametrize("name", STEPS)
def test_the_example_is_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(name, tmp_path)
    build_tokenizer(tmp_path / "base")
    blocks = _BLOCK.findall(page_of(name).partition("## Example")[2])
    (text,) = [text for language, _, text in blocks if language == "text"]
    steps = next((parse_yaml(text) for language, _, text in blocks if language == "yaml"), [name])
    example = parse_example(text)
    (tmp_path / "dump.json").write_text(json.dumps(example.records), encoding="utf-8")
    clean_conversations(["dump.json"], tmp_path / "out", load_steps(steps, tmp_path), validation_share=0)
    written: dict[str, Any] = {}
    for conversation in read_conversations(tmp_path / "out" / "train.jsonl"):
        turns = [{"from": "system", "value": conversation.system}] if conversation.system else []
        for message in conversation.messages:
            notes = [f"trained_from {message.trained_from}"] * (message.trained_from > 0) + ["unfinished"] * message.unfinished
            turns.append({"from": message.role, "value": message.content} | ({"as": ", ".join(notes)} if notes else {}))
        written[conversation.id] = turns
    assert written == example.written
    ledger = polars.read_parquet(tmp_path / "out" / "ledger.parquet")
    assert set(ledger["step"]) <= {name}
    assert list(ledger.select("id", "action", "reason").iter_rows()) == example.ledger
