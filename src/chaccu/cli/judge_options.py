"""The options that `chaccu judge compare`, `grade` and `drift` share, as typer reads them.

Invariant: an option of one name means the same in each of the commands. It ignores what they do with it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

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


AtOnce = Annotated[int, typer.Option(min=1, max=256, help="Requests under way to each judge at a time.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Longest silence of a server, in seconds.")]
ApiKey = Annotated[str | None, typer.Option(envvar="CHACCU_API_KEY", help="Key, if the servers want one.")]

_JUDGE = (
    "Name of the judge at --url, or NAME=URL of its own server; NAME=URL,key-env=VARIABLE for an API key of its own, in an "
    "environment variable. Repeat it for several judges."
)
_PRICES = 'TOML file of prices by judge: ["NAME"], then input = 2.5 and output = 10.'
_TOKENIZER = "tokenizer.json, or its folder, to count tokens before; else bytes / 4."
_STRUCTURED = "Ask for JSON by schema where the prompt has one; auto goes without if it is refused."


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """What `compare` and `grade` are both told, in the order of their help."""

    answers: Annotated[
        list[Path], typer.Argument(metavar="ANSWERS...", help="Folders that chaccu judge run wrote, or their answers.jsonl.")
    ]
    judge: Annotated[list[str], typer.Option(help=_JUDGE)]
    out: Annotated[Path, typer.Option(help="Folder to write: verdicts.jsonl, failures.jsonl, canaries.jsonl, manifest.json.")]
    url: Annotated[
        str | None, typer.Option(help="Server of the judges that name none: the gateway, or any OpenAI-compatible one.")
    ] = None
    model: Annotated[list[str] | None, typer.Option(help="Only these models; repeat it for more. All unless given.")] = None
    by: Annotated[Unit, typer.Option(help="A verdict for each turn, or one for the whole conversation.")] = Unit.TURN
    questions: Annotated[
        str | None,
        typer.Option(help="Question set or file that was answered; what the first ANSWERS folder says, unless given."),
    ] = None
    no_checked: Annotated[
        bool, typer.Option("--no-checked", help="Leave out the questions whose answers are checked by rules.")
    ] = False
    criteria: Annotated[Path | None, typer.Option(help="File of criteria for a rubric, where the questions have none.")] = None
    structured: Annotated[Structured, typer.Option(help=_STRUCTURED)] = Structured.AUTO
    again: Annotated[
        int, typer.Option(min=0, max=10, help="Times to ask again, with another seed, if the text is unreadable.")
    ] = 2
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a judge's text.")] = 1024
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest token always.")] = 0.0
    seed: Annotated[int | None, typer.Option(help="Seed for the sampling.")] = None
    at_once: AtOnce = 4
    timeout_s: Timeout = 120.0
    api_key: ApiKey = None
    price_in: Annotated[float | None, typer.Option(min=0, help="US dollars per million tokens that a judge reads.")] = None
    price_out: Annotated[float | None, typer.Option(min=0, help="US dollars per million tokens that a judge writes.")] = None
    prices: Annotated[Path | None, typer.Option(help=_PRICES)] = None
    max_cost: Annotated[float | None, typer.Option(min=0, help="Stop before this run has cost more US dollars.")] = None
    tokenizer: Annotated[Path | None, typer.Option(help=_TOKENIZER)] = None
    estimate: Annotated[bool, typer.Option("--estimate", help="Only say what would be asked, and what it may cost.")] = False
    cache: Annotated[
        Path | None, typer.Option(help="Folder of verdicts by what was asked, for runs to share; OUT/cache unless given.")
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as one JSON object.")] = False


def with_judge_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, which begins with a `JudgeOptions`, as typer reads it: the fields of that are options, before its own."""
    hints = get_type_hints(JudgeOptions, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(JudgeOptions)
    ]
    _, *own = inspect.signature(command, eval_str=True).parameters.values()

    @functools.wraps(command)
    def run(**values: Any) -> None:
        options = JudgeOptions(**{one.name: values.pop(one.name) for one in shared})
        command(options, **values)

    parameters = [*shared, *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run
