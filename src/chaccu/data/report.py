"""`report.html`: one self-contained page that shows what became of every record.

Invariants: no script, no foreign host, every text out of the data escaped; light and dark follow the reader's system. The
page carries no time, so equal runs give equal bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from chaccu.artifact import Manifest
from chaccu.data.show import MaskRun

_SAMPLES_A_REASON = 3


class Sample(msgspec.Struct, frozen=True):
    """The beginning of one dropped record."""

    step: str
    reason: str
    id: str
    origin: str
    text: str


class Samples:
    """Keeps the first few samples of each drop reason."""

    def __init__(self) -> None:
        self.taken: list[Sample] = []
        self._counts: dict[tuple[str, str], int] = {}

    def offer(self, sample: Sample) -> None:
        """Take `sample` unless its reason has enough."""
        key = (sample.step, sample.reason)
        self._counts[key] = self._counts.get(key, 0) + 1
        if self._counts[key] <= _SAMPLES_A_REASON:
            self.taken.append(sample)


class FunnelStage(msgspec.Struct, frozen=True):
    """One step: records that came in and went on, and its reasons with their counts, most first."""

    step: str
    before: int
    after: int
    dropped: list[tuple[str, int]]
    changed: list[tuple[str, int]]


def build_funnel(steps: Sequence[str], facts: dict[str, Any]) -> list[FunnelStage]:
    """The stages in order; the last one's `after` is the number of kept records."""
    stages = []
    left = facts["read"]
    for step in steps:
        dropped, changed = _most_first(facts["dropped"].get(step, {})), _most_first(facts["changed"].get(step, {}))
        after = left - sum(count for _, count in dropped)
        stages.append(FunnelStage(step, left, after, dropped, changed))
        left = after
    return stages


def _most_first(reasons: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda item: (-item[1], item[0]))


def write_report(
    path: Path,
    manifest: Manifest,
    facts: dict[str, Any],
    steps: Sequence[str],
    warnings: Sequence[str],
    samples: Sequence[Sample],
    preview: Sequence[MaskRun],
) -> None:
    """Write the page for one dataset. `preview`: a kept conversation as training sees it; empty without a tokenizer."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = "{:,}".format
    template = environment.from_string((resources.files("chaccu.data") / "report.html.jinja").read_text(encoding="utf-8"))
    grouped: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        grouped.setdefault((sample.step, sample.reason), []).append(sample)
    order = {step: place for place, step in enumerate(steps)}
    stats = facts["stats"]
    text = template.render(
        name=manifest.name,
        facts=facts,
        stats=stats,
        funnel=build_funnel(steps, facts),
        warnings=warnings,
        inputs=manifest.inputs,
        versions=manifest.versions,
        settings=msgspec.json.format(msgspec.json.encode(manifest.settings), indent=2).decode(),
        histograms=[
            ("Turns a conversation", _labelled(stats["turns_histogram"])),
            ("Characters a conversation", _labelled(stats["chars_histogram"])),
            *([("Tokens a conversation", _labelled(stats["tokens_histogram"]))] if stats["tokens_histogram"] else []),
            ("Languages", _top(stats["languages"], 12)),
        ],
        preview=preview,
        samples=sorted(grouped.items(), key=lambda item: (order.get(item[0][0], len(order)), item[0][1])),
    )
    path.write_text(text, encoding="utf-8")


def _labelled(histogram: dict[str, int]) -> list[tuple[str, int]]:
    """Buckets as ranges: "3–4" from the edges 2 and 4."""
    labelled = []
    previous = 0
    for edge, count in histogram.items():
        labelled.append((f"over {previous:,}" if edge == "more" else f"to {int(edge):,}", count))
        previous = previous if edge == "more" else int(edge)
    return labelled


def _top(counts: dict[str, int], limit: int) -> list[tuple[str, int]]:
    items = list(counts.items())
    rest = sum(count for _, count in items[limit:])
    return items[:limit] + ([("others", rest)] if rest else [])
