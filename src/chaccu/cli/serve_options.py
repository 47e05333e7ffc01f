"""The options that `chaccu serve`, `chaccu gateway` and `chaccu worker` share, as typer reads them.

Invariant: an option of one name means the same in each of the commands. It ignores what they do with it.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class LogFormat(StrEnum):
    """How the log is written."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """How much is told, the most first."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


Host = Annotated[str, typer.Option(help="Address to listen on; others than loopback need --keys or --open.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 lets the system pick a free one.")]
PortFile = Annotated[Path | None, typer.Option(help="Write the URL here once it answers (for scripts).")]
Upstreams = Annotated[
    list[str] | None,
    typer.Option(
        "--upstream",
        help="NAME=URL of an OpenAI-compatible server; repeat for more, with one NAME for several that serve the same model. "
        "Options follow by commas: weight=2, priority=1, as=MODEL (its name there), key-env=VARIABLE (that holds its API key), "
        "continues=false (it cannot go on with another's answer).",
    ),
]
LogFolder = Annotated[
    Path | None,
    typer.Option(
        "--log-conversations",
        metavar="DIR",
        help="Append every chat answer with its conversation to files in DIR, as training data; "
        "they hold people's words, so this is off unless given.",
    ),
]
Records = Annotated[
    str,
    typer.Option(
        "--records",
        metavar="URL",
        envvar="CHACCU_RECORDS",
        help="The same in a database: sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/NAME.",
    ),
]
Token = Annotated[
    str,
    typer.Option(envvar="CHACCU_JOIN_TOKEN", help="Secret that workers show to join; a worker may show its API key instead."),
]
Keys = Annotated[
    Path | None,
    typer.Option(
        "--keys", metavar="FILE", envvar="CHACCU_KEYS", help="File of API keys (see chaccu keys create); requests need one."
    ),
]
Open = Annotated[bool, typer.Option("--open", help="Let everyone who reaches the address use it, without keys.")]
Engine = Annotated[
    str,
    typer.Option(
        help="llamacpp, transformers, vllm, openai, scripted, or auto: by what the weights are and what is installed."
    ),
]
VllmPython = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Python or vllm executable of the environment that has vLLM; default: vllm on the PATH."),
]
Format = Annotated[str | None, typer.Option("--format", help="Chat format, if the model's manifest names none.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=FOLDER",
        help="A LoRA adapter to serve as NAME over the model; repeat for more (llamacpp, transformers).",
    ),
]
AllowLoad = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Let gateways have adapters loaded while it runs, from below DIR alone; default: none."),
]
CorsOrigins = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        help="Origin of a page in browsers that may ask the gateway, as https://chat.example.org; repeat for more, "
        "'*' for all (with --keys).",
    ),
]
LogFormatOption = Annotated[
    LogFormat | None,
    typer.Option("--log-format", help="One line a request on stderr, as text or JSON; without it only warnings are told."),
]
LogLevelOption = Annotated[
    LogLevel | None,
    typer.Option(help="The least level that is told; default: info with --log-format, else warning."),
]
Otlp = Annotated[
    str,
    typer.Option(
        metavar="URL",
        envvar="OTEL_EXPORTER_OTLP_ENDPOINT",
        help="Collector of OpenTelemetry that gets a span of each request, over HTTP: http://HOST:4318.",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine; default: all cores, 8 at most.")]
Slots = Annotated[int | None, typer.Option(min=1, help="Requests worked on at once.")]
Context = Annotated[int | None, typer.Option(min=16, help="Tokens of prompt and answer together, for each request.")]
Drain = Annotated[
    float,
    typer.Option(min=0, help="Seconds to finish answers in after SIGTERM (a gateway: Ctrl-C too; a second one ends it)."),
]


class WithoutSharedState(StrEnum):
    """What a gateway does while its shared state does not answer."""

    LOCAL = "local"
    REFUSE = "refuse"
