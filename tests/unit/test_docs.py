"""The documentation holds: links lead somewhere, commands exist with the options shown, the reference is current."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from chaccu.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
_COMMAND = re.compile(r"(?:^    |`)(chaccu [a-z][^`\n]*)", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")


def shown_commands(page: Path) -> list[str]:
    """Command lines in indented blocks and in code spans, without what is said of them; placeholders such as `…` end one."""
    lines = (
        re.split(r"\s+#|\s{3,}|\s*…|\s*\.\.\.", line)[0].strip() for line in _COMMAND.findall(page.read_text(encoding="utf-8"))
    )
    return [line for line in lines if line != "chaccu"]


COMMANDS = [(page.name, line) for page in PAGES if page.name != "cli.md" for line in shown_commands(page)]


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_shown_command_exists_with_its_options(page: str, line: str) -> None:
    words = shlex.split(line.partition(" -- ")[0])[1:]  # what is behind -- is for another program
    command = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    assert not getattr(command, "commands", {}) or not words, f"{page}: {line}: there is no {words[0]}"
    options = {text for parameter in command.params for text in parameter.opts} | {"--help"}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]
    assert unknown == [], f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = [target for target, _ in _LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_files_on_a_requests_way_exist() -> None:
    page = (ROOT / "docs" / "life_of_a_request.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "chaccu"
    # Names that do not begin at the package are in the gateway.
    files = [name for name in re.findall(r"`([\w/]+\.py)`", page) if not name.startswith("tests/")]
    assert len(files) > 20
    gone = [name for name in files if not (source / name).is_file() and not (source / "serve/gateway" / name).is_file()]
    assert not gone


def test_the_command_reference_is_current() -> None:
    checked = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build_cli_reference.py"), "--check"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
