"""The demo's report: one self-contained HTML page with losses, answers side by side, counts, timings and commands."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from chaccu.artifact import atomic_file, read_manifest
from chaccu.demo.stages import StageResult
from chaccu.train.report import LOG_NAME, StepReport, read_log


class Comparison(msgspec.Struct, frozen=True):
    """One question with both models' answers; times in seconds."""

    question: str
    base: str
    tuned: str
    base_s: float
    tuned_s: float


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What the page says of training and data. `training`: facts of the adapter's manifest; `losses`: by step, or where those
    are not known the held-out ones along the way (`held_out`); `data`: counts; `about_data`: a page that says more."""

    training: dict[str, Any]
    losses: list[float]
    held_out: bool = False
    data: dict[str, int]
    about_data: str


def read_run(folder: Path) -> Run:
    """That of a demo that trained: `folder` holds its artifacts."""
    log = read_log(folder / "adapter" / "logs" / LOG_NAME)
    return Run(
        training=read_manifest(folder / "adapter").facts,
        losses=[record.loss for record in log if isinstance(record, StepReport) and record.loss is not None],
        data={key: value for key, value in read_manifest(folder / "data").facts.items() if isinstance(value, int)},
        about_data="data/report.html",
    )


def read_released(adapter: Path) -> Run:
    """That of a released adapter, trained elsewhere: what its manifest kept of it."""
    facts = read_manifest(adapter).facts
    sources = facts.get("data") or []
    return Run(
        training=facts,
        losses=[one["loss"] for one in facts.get("evaluations") or []],
        held_out=True,
        data={key: sum(source[key] for source in sources) for key in ("read", "kept")},
        about_data=(adapter.absolute() / "README.md").as_uri(),
    )


def write_report(path: Path, run: Run, rows: list[Comparison], commands: list[str], results: list[StageResult]) -> None:
    """Write the page to `path`, atomically."""
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (resources.files("chaccu.demo") / "report.html.jinja").read_text(encoding="utf-8")
    )
    losses = run.losses
    page = template.render(
        rows=rows,
        commands=commands,
        results=results,
        run=run,
        training=run.training,
        curve=_curve(losses, losses),
        smooth_curve=_curve(losses if run.held_out else _running_mean(losses), losses),
    )
    with atomic_file(path) as file:
        file.write(page.encode("utf-8"))


def _running_mean(losses: list[float], weight: float = 0.15) -> list[float]:
    """Exponentially weighted mean up to each step, unbiased at the beginning (as Adam corrects its moments)."""
    total, means = 0.0, []
    for step, loss in enumerate(losses, 1):
        total = (1 - weight) * total + weight * loss
        means.append(total / (1 - (1 - weight) ** step))
    return means


def _curve(losses: list[float], scale: list[float], width: int = 640, height: int = 160) -> str:
    """The losses as the points of an SVG polyline, on the scale from the least to the greatest of `scale`."""
    low, high = min(scale, default=0.0), max(scale, default=1.0)
    spread = (high - low) or 1.0
    step = width / max(1, len(losses) - 1)
    return " ".join(f"{index * step:.1f},{height - (loss - low) / spread * height:.1f}" for index, loss in enumerate(losses))
