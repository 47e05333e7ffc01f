"""`chaccu judge`: ask models the same questions, check their answers, have them judged, report what came of it."""

from __future__ import annotations

import typer

from chaccu.cli import judge_answers, judge_ask, judge_report
from chaccu.cli.judge_score import score_command

app = typer.Typer(name="judge", help="Judge: questions to answers to verdicts.", no_args_is_help=True)
judge_answers.register(app)
judge_ask.register(app)
judge_report.register(app)
app.command("score", epilog="Example: chaccu judge score reviews.jsonl --out scores.json --battles battles.jsonl")(
    score_command
)
