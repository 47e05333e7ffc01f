"""Writes docs/cli.md: the help text of every command, as the program prints it. `--check` only compares."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from chaccu.cli.main import app

PAGE = Path(__file__).parent / "cli.md"
_INTRODUCTION = """# Commands

What `--help` prints, for every command. This page is generated: `make docs`.
"""


def list_commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command that does something, sorted within its group."""
    children = getattr(command, "commands", {})
    if not children:
        yield words
    for name in sorted(children):
        yield from list_commands(children[name], (*words, name))


def build_page() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for words in list_commands(typer.main.get_command(app)):
        shown = CliRunner().invoke(app, [*words, "--help"], prog_name="chaccu", terminal_width=100, catch_exceptions=False)
        lines = "\n".join(line.rstrip() for line in shown.stdout.strip().splitlines())
        parts.append(f"## chaccu {' '.join(words)}\n\n```\n{lines}\n```\n")
    return "\n".join(parts)


def main() -> None:
    """Write the page, or with `--check` end with 1 when it is out of date."""
    page = build_page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
            sys.exit("docs/cli.md is out of date: run make docs")
        return
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
