"""The `chaccu` command: names, help and exit codes; every command imports its room only when it runs.

Invariants: results on stdout, progress and errors on stderr; exit code 0 done, 1 failed, 2 wrong use, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback

import typer

from chaccu.cli import chat, data, demo, doctor, formats, judge, keys, rank, recipe, serve, train, web, weights, workers
from chaccu.errors import ChaccuError, ChildFailedError

app = typer.Typer(
    name="chaccu",
    help="From a pile of shared conversations to a served and judged chat model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _group in (data.app, formats.app, judge.app, keys.app, recipe.app, weights.app, workers.app):
    app.add_typer(_group)
for _commands in (demo, doctor, train, serve, web, chat, rank):
    _commands.register(app)


def main() -> None:
    """Run the command line; turn Chaccu's errors into one message and an exit code."""
    try:
        app()
    except ChaccuError as error:
        if not isinstance(error, ChildFailedError):
            _say_error(str(error))
        if os.environ.get("CHACCU_TRACEBACK"):
            traceback.print_exc()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say_error("stopped.")
        sys.exit(130)


def _say_error(text: str) -> None:
    sys.stderr.write(f"chaccu: {text}\n")


if __name__ == "__main__":
    main()
