"""The demo's report: one self-contained HTML page with losses, answers side by side, counts, timings and commands."""

from __future__ import annotations

from pathlib import Path

import jinja2
import msgspec

from chaccu.artifact import atomic_file, read_manifest
from chaccu.demo.stages import StageResult


class Comparison(msgspec.Struct, frozen=True):
    """One question with both models' answers; times in seconds."""

    question: str
    base: str
    tuned: str
    base_s: float
    tuned_s: float


def write_report(path: Path, folder: Path, rows: list[Comparison], commands: list[str], results: list[StageResult]) -> None:
    """Write the page to `path`, atomically; `folder` holds the demo's artifacts."""
    training = read_manifest(folder / "adapter").facts
    data = read_manifest(folder / "data").facts
    losses = [step["loss"] for step in training["log"]]
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    page = template.render(
        rows=rows, commands=commands, results=results, training=training, data=data, curve=_curve(losses), losses=losses
    )
    with atomic_file(path) as file:
        file.write(page.encode("utf-8"))


def _curve(losses: list[float], width: int = 640, height: int = 160) -> str:
    """The losses as the points of an SVG polyline."""
    low, high = min(losses, default=0.0), max(losses, default=1.0)
    spread = (high - low) or 1.0
    step = width / max(1, len(losses) - 1)
    return " ".join(f"{index * step:.1f},{height - (loss - low) / spread * height:.1f}" for index, loss in enumerate(losses))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Chaccu demo</title><style>
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --accent: #b5651d; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; vertical-align: top; padding: .5rem; border-bottom: 1px solid var(--line) }
td.answer { white-space: pre-wrap; width: 36% } pre { background: var(--soft); padding: 1rem; overflow-x: auto; border-radius: .5rem }
.figures { display: flex; flex-wrap: wrap; gap: 1rem } .figures div { background: var(--soft); padding: .75rem 1.25rem; border-radius: .5rem }
.figures b { display: block; font-size: 1.4rem } svg { width: 100%; height: 10rem } polyline { fill: none; stroke: var(--accent); stroke-width: 2; vector-effect: non-scaling-stroke }
</style></head><body>
<h1>From conversations to a chat model</h1><p>One run of <code>chaccu demo</code>.</p>
<div class="figures">
{% if training.loss_before %}<div>held-out loss<b>{{ "%.3f"|format(training.loss_before) }} → {{ "%.3f"|format(training.loss_after) }}</b></div>{% endif %}
<div>steps<b>{{ training.steps }}</b></div><div>tokens seen an epoch<b>{{ "{:,}".format(training.tokens) }}</b></div>
<div>rows filled<b>{{ "%.1f"|format(100 * training.fill) }} %</b></div><div>training time<b>{{ "%.0f"|format(training.seconds) }} s</b></div></div>
<h2>Training loss</h2><svg viewBox="0 0 640 160" preserveAspectRatio="none" role="img" aria-label="training loss by step"><polyline points="{{ curve }}"/></svg>
<p>{{ "%.3f"|format(losses[0]) }} at the first step, {{ "%.3f"|format(losses[-1]) }} at the last (nats a trained token).</p>
<h2>Answers side by side</h2><table><tr><th>question</th><th>base</th><th>tuned</th></tr>
{% for row in rows %}<tr><td>{{ row.question }}</td><td class="answer">{{ row.base }}<br><small>{{ "%.1f"|format(row.base_s) }} s</small></td><td class="answer">{{ row.tuned }}<br><small>{{ "%.1f"|format(row.tuned_s) }} s</small></td></tr>{% endfor %}
</table>
<h2>Data</h2><p>Every conversation read is kept or dropped by name; the whole story is in <a href="data/report.html">the data report</a>.</p>
<table>{% for key, value in data.items() if value is number %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
<h2>Time</h2><table>{% for result in results %}<tr><td>{{ result.stage.title }}</td><td>{{ "%.1f"|format(result.seconds) }} s</td></tr>{% endfor %}</table>
<h2>Each stage by hand</h2><pre>{% for command in commands %}{{ command }}
{% endfor %}</pre></body></html>
"""
