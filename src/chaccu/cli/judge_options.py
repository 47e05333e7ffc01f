"""The options that `chaccu judge compare`, `grade` and `drift` share, as typer reads them.

Invariant: an option of one name means the same in each of the commands. It ignores what they do with it.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Unit(StrEnum):
    """What one verdict is of."""

    TURN = "turn"
    CONVERSATION = "conversation"


class Structured(StrEnum):
    """Whether the endpoint is asked to hold answers to a prompt's JSON schema."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


Answers = Annotated[
    list[Path], typer.Argument(metavar="ANSWERS...", help="Folders that chaccu judge run wrote, or their answers.jsonl.")
]
Judges = Annotated[
    list[str],
    typer.Option(
        "--judge",
        help="Name of the judge at --url, or NAME=URL of its own server; NAME=URL,key-env=VARIABLE for an API key of its own, "
        "in an environment variable. Repeat it for several judges.",
    ),
]
Url = Annotated[
    str | None, typer.Option(help="Server of the judges that name none: the gateway, or any OpenAI-compatible one.")
]
Out = Annotated[Path, typer.Option(help="Folder to write: verdicts.jsonl, failures.jsonl, canaries.jsonl, manifest.json.")]
Models = Annotated[list[str] | None, typer.Option("--model", help="Only these models; repeat it for more. All unless given.")]
Questions = Annotated[
    str | None, typer.Option(help="Question set or file that was answered; what the first ANSWERS folder says, unless given.")
]
Criteria = Annotated[Path | None, typer.Option(help="File of criteria for a rubric, where the questions have none.")]
By = Annotated[Unit, typer.Option("--by", help="A verdict for each turn, or one for the whole conversation.")]
NoChecked = Annotated[bool, typer.Option("--no-checked", help="Leave out the questions whose answers are checked by rules.")]
AtOnce = Annotated[int, typer.Option(min=1, max=256, help="Requests under way to each judge at a time.")]
Again = Annotated[int, typer.Option(min=0, max=10, help="Times to ask again, with another seed, if the text is unreadable.")]
StructuredMode = Annotated[
    Structured,
    typer.Option("--structured", help="Ask for JSON by schema where the prompt has one; auto goes without if it is refused."),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens of a judge's text.")]
Temperature = Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest token always.")]
Seed = Annotated[int | None, typer.Option(help="Seed for the sampling.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Longest silence of a server, in seconds.")]
ApiKey = Annotated[str | None, typer.Option(envvar="CHACCU_API_KEY", help="Key, if the servers want one.")]
PriceIn = Annotated[float | None, typer.Option(min=0, help="US dollars per million tokens that a judge reads.")]
PriceOut = Annotated[float | None, typer.Option(min=0, help="US dollars per million tokens that a judge writes.")]
Prices = Annotated[Path | None, typer.Option(help='TOML file of prices by judge: ["NAME"], then input = 2.5 and output = 10.')]
MaxCost = Annotated[float | None, typer.Option(min=0, help="Stop before this run has cost more US dollars.")]
TokenizerPath = Annotated[
    Path | None, typer.Option("--tokenizer", help="tokenizer.json, or its folder, to count tokens before; else characters / 4.")
]
EstimateOnly = Annotated[bool, typer.Option("--estimate", help="Only say what would be asked, and what it may cost.")]
Cache = Annotated[
    Path | None, typer.Option(help="Folder of verdicts by what was asked, for runs to share; OUT/cache unless given.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the counts as one JSON object.")]
