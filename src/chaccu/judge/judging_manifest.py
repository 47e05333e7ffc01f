"""The manifest of a judging folder: who was asked what, the counts, tokens and cost, and the judges' exact names.

Invariants: the counts are those of the files beside it and add up; the cache, which other runs may fill too, is not in it.
It ignores what the verdicts say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chaccu.artifact import MANIFEST_NAME, Manifest, library_versions, read_manifest, storage_errors, write_manifest
from chaccu.judge.asking import JudgeSession
from chaccu.judge.judging import Judged
from chaccu.judge.verdict_files import CACHE_NAME

KIND = "verdicts"


def read_judge_versions(folder: Path) -> dict[str, str]:
    """The names under which the judges of a folder have answered, by the names that were asked. Raises `ArtifactError`."""
    if not (folder / MANIFEST_NAME).is_file():
        return {}
    judges = read_manifest(folder, kind=KIND).facts.get("judges", {})
    return {name: judge["version"] for name, judge in judges.items() if judge.get("version")}


def drop_manifest(folder: Path) -> None:
    """Make the folder an unfinished run's, which it is until a manifest is written that speaks of it. Raises `StorageError`."""
    with storage_errors(folder):
        (folder / MANIFEST_NAME).unlink(missing_ok=True)


def write_judging_manifest(
    folder: Path,
    judged: Judged,
    sessions: Sequence[JudgeSession],
    *,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    spent_usd: float,
) -> Manifest:
    """Describe the folder. `inputs`: SHA-256 of the answers and questions; `spent_usd`: in this run. Raises `StorageError`."""
    facts = count_judged(judged, sessions)
    if any(session.judge.price for session in sessions):
        facts["spent_usd"] = round(spent_usd, 6)
    prompts = {verdict.prompt: verdict.prompt_sha256 for verdict in judged.verdicts}
    manifest = Manifest(
        kind=KIND,
        name=folder.name,
        inputs=dict(inputs),
        settings={**settings, "prompts": prompts},
        facts=facts,
        versions=library_versions("openai"),
    )
    return write_manifest(folder, manifest, without=CACHE_NAME)


def count_judged(judged: Judged, sessions: Sequence[JudgeSession]) -> dict[str, Any]:
    """Counts of a run, in all and by judge. Tokens and cost are of the verdicts on file, whenever they were made."""
    return {
        "asked": judged.asked,
        "parsed": judged.parsed,
        "unparsed": judged.unparsed,
        "failed": judged.failed,
        "over_budget": judged.over_budget,
        "reused": judged.reused,
        "causes": dict(sorted(Counter(one.cause for one in judged.failures).items())),
        "flags": dict(sorted(Counter(flag for one in judged.verdicts for flag in one.flags).items())),
        "judges": {session.judge.name: _count_judge(judged, session) for session in sessions},
    }


def _count_judge(judged: Judged, session: JudgeSession) -> dict[str, Any]:
    verdicts = [one for one in judged.verdicts if one.judge == session.judge.name]
    failures = [one for one in judged.failures if one.judge == session.judge.name]
    told = [(one.prompt_tokens, one.answer_tokens) for one in verdicts]
    prompt_tokens = sum(prompt for prompt, _ in told if prompt is not None)
    answer_tokens = sum(answer for _, answer in told if answer is not None)
    counts: dict[str, Any] = {
        "version": session.version,
        "parsed": sum(one.is_parsed for one in verdicts),
        "unparsed": sum(not one.is_parsed for one in verdicts),
        "not_judged": len(failures),
        "prompt_tokens": prompt_tokens,
        "answer_tokens": answer_tokens,
        "without_usage": sum(prompt is None for prompt, _ in told),
    }
    if session.judge.price is not None:
        counts["cost_usd"] = round(session.judge.price.cost_usd(prompt_tokens, answer_tokens), 6)
    if session.is_structured is not None:
        counts["structured"] = session.is_structured
    return counts
