"""`chaccu doctor`: what this machine can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from chaccu.cli.machine import Machine


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("doctor", epilog="Example: chaccu doctor --json")(doctor_command)


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Say what this machine can do, and for what is missing the command that adds it.

    Nothing is loaded or changed: versions are read, not imported. A missing part is no failure.
    """
    import msgspec

    from chaccu.cli.machine import survey_machine

    machine = survey_machine()
    if as_json:
        typer.echo(msgspec.json.encode(machine).decode())
    else:
        _say_machine(machine)


def _say_machine(machine: Machine) -> None:
    free = "" if machine.memory_free_bytes is None else f", {machine.memory_free_bytes / 1e9:.1f} GB free"
    facts = [
        ("Chaccu", machine.chaccu),
        ("Python", f"{machine.python} on {machine.system}"),
        ("cores", str(machine.cores)),
        ("memory", "unknown" if machine.memory_bytes is None else f"{machine.memory_bytes / 1e9:.1f} GB{free}"),
        ("disk", f"{machine.disk_free_bytes / 1e9:.1f} GB free here"),
    ]
    facts += [
        ("GPU", f"{gpu.name}, {gpu.memory_bytes / 1e9:.1f} GB, {gpu.memory_free_bytes / 1e9:.1f} GB free")
        for gpu in machine.gpus
    ]
    if not machine.gpus:
        facts.append(("GPU", machine.gpu_problem or "none seen"))
    for name, value in facts:
        typer.echo(f"{name:<8} {value}")
    typer.echo("")
    width = max(len(ability.name) for ability in machine.abilities)
    for ability in machine.abilities:
        found = ", ".join(f"{part.name} {part.version or ''}".strip() for part in ability.parts if part.found)
        missing = ", ".join(part.name for part in ability.parts if not part.found)
        note = f"  ({ability.note})" if ability.note else ""
        if ability.ready:
            typer.echo(f"yes  {ability.name:<{width}}  {found}{note}")
        else:
            typer.echo(f"no   {ability.name:<{width}}  missing: {missing}{note}")
            typer.echo(f"     {'':<{width}}  add it: {ability.remedy}")
