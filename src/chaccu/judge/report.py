"""`build_report`: all that a run's verdicts come to, each figure with its n, as one value that is written and shown.

Invariants: asked = parsed + unparsed + failed + lost; equal folders and seed give an equal report; it carries no time and no
machine. What the data do not suffice for is said in `warnings`, or is empty. It ignores how it is laid out (`report_pages`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations

import msgspec

from chaccu.errors import UsageError, did_you_mean
from chaccu.judge.agreement import Agreement, Position, cohen_kappa, count_agreement, krippendorff_alpha, measure_position
from chaccu.judge.checking import CheckCount, count_checks, name_category
from chaccu.judge.intervals import RESAMPLES, Estimate, estimate_share
from chaccu.judge.judged_folder import JudgedFolders
from chaccu.judge.tallies import (
    ALL,
    Compared,
    Grade,
    Tally,
    Total,
    compare_all,
    tally_grades,
    tally_pairs,
    total_scores,
)
from chaccu.judge.verbosity import EqualLength, MeanLength, Verbosity, control_lengths, mean_lengths, measure_verbosity
from chaccu.judge.verdicts import Comparison, Verdict
from chaccu.rank import FEW_QUESTIONS, Ranking, parse_battles, rank_battles


class JudgeCounts(msgspec.Struct, frozen=True, kw_only=True):
    """One judge: what it was asked, under which exact names it answered, and with which prompts (name → each SHA-256)."""

    judge: str
    versions: list[str]
    prompts: dict[str, list[str]]
    asked: int
    parsed: int
    unparsed: int
    failed: int
    causes: dict[str, int]
    flags: dict[str, int]
    position: Position | None


class JudgePair(msgspec.Struct, frozen=True, kw_only=True):
    """Two judges on the comparisons that both settled. A judge that has judged a thing by several prompts is one for each."""

    judge: str
    other: str
    with_ties: Agreement
    no_ties: Agreement
    kappa: float | None


class Ensemble(msgspec.Struct, frozen=True, kw_only=True):
    """Several judges among themselves; Krippendorff's alpha of winners (nominal) and of grades (interval)."""

    pairs: list[JudgePair]
    alpha: float | None
    grades_alpha: float | None


class CategoryFigure(msgspec.Struct, frozen=True, kw_only=True):
    """A model in a category over all its opponents and judges: its win rate."""

    model: str
    category: str
    win_rate: Estimate


class JudgeReport(msgspec.Struct, frozen=True, kw_only=True):
    """See `build_report`. `baseline`: the model that others are set against, None where there is none."""

    folders: list[str]
    baseline: str | None
    level: float
    resamples: int
    seed: int
    asked: int
    parsed: int
    unparsed: int
    failed: int
    lost: int
    repeated: int
    warnings: list[str]
    judges: list[JudgeCounts]
    pairs: list[Tally]
    by_category: list[CategoryFigure]
    totals: list[Total]
    grades: list[Grade]
    ensemble: Ensemble | None
    ranking: Ranking | None
    lengths: list[MeanLength]
    verbosity: list[Verbosity]
    length_controlled: list[EqualLength]
    checks: list[CheckCount]


def build_report(judged: JudgedFolders, *, baseline: str | None = None, seed: int = 0) -> JudgeReport:
    """Raises `UsageError` for a baseline that is not among the models."""
    models = sorted({model for one in judged.everything for model in one.models})
    if baseline is not None and baseline not in models:
        raise UsageError(f"no verdict is on the model {baseline!r}.", remedy=did_you_mean(baseline, models))
    compared = compare_all(judged.verdicts, judged.failures)
    parsed = sum(one.is_parsed for one in judged.verdicts)
    report = JudgeReport(
        folders=list(judged.folders),
        baseline=baseline,
        level=0.95,
        resamples=RESAMPLES,
        seed=seed,
        asked=len(judged.verdicts) + len(judged.failures) + judged.lost,
        parsed=parsed,
        unparsed=len(judged.verdicts) - parsed,
        failed=len(judged.failures),
        lost=judged.lost,
        repeated=judged.repeated,
        warnings=[],
        judges=_count_judges(judged, seed),
        pairs=tally_pairs(compared, baseline=baseline, seed=seed),
        by_category=_by_category(compared, seed),
        totals=total_scores(judged.verdicts, baseline=baseline, seed=seed),
        grades=tally_grades(judged.verdicts, judged.failures, seed=seed),
        ensemble=_compare_judges(compared, judged.verdicts),
        ranking=_rank(compared, seed),
        lengths=mean_lengths(judged.answers.values()),
        verbosity=measure_verbosity(compared, judged.answers, seed=seed),
        length_controlled=control_lengths(compared, judged.answers, baseline=baseline),
        checks=count_checks(judged.checks),
    )
    return msgspec.structs.replace(report, warnings=_warn(report, judged))


def _count_judges(judged: JudgedFolders, seed: int) -> list[JudgeCounts]:
    counts = []
    for judge in sorted({one.judge for one in judged.everything}):
        own = [one for one in judged.verdicts if one.judge == judge]
        failed = [one for one in judged.failures if one.judge == judge]
        parsed = sum(one.is_parsed for one in own)
        counts.append(
            JudgeCounts(
                judge=judge,
                versions=sorted({one.judge_version for one in own if one.judge_version}),
                prompts={
                    name: sorted({one.prompt_sha256 for one in own if one.prompt == name})
                    for name in sorted({one.prompt for one in own})
                },
                asked=len(own) + len(failed),
                parsed=parsed,
                unparsed=len(own) - parsed,
                failed=len(failed),
                causes=dict(sorted(Counter(one.cause for one in failed).items())),
                flags=dict(sorted(Counter(flag for one in own for flag in one.flags).items())),
                position=measure_position(own, seed=seed) if any(one.is_comparison for one in own) else None,
            )
        )
    return counts


def _by_category(compared: Iterable[Compared], seed: int) -> list[CategoryFigure]:
    shares: dict[tuple[str, str], list[tuple[float, Hashable]]] = defaultdict(list)
    for entry in compared:
        if entry.share is not None:
            one = entry.one
            for category in (ALL, name_category(one.category)):
                shares[category, one.model_a].append((entry.share, one.question_id))
                shares[category, one.model_b].append((1 - entry.share, one.question_id))
    return [
        CategoryFigure(
            model=model,
            category=category,
            win_rate=estimate_share([share for share, _ in own], [question for _, question in own], seed=seed),
        )
        for (category, model), own in sorted(shares.items(), key=lambda item: (item[0][0] != ALL, item[0]))
    ]


def _find_mixed(verdicts: Iterable[Verdict]) -> dict[str, set[str]]:
    """The judges that have judged one thing by several prompts, and these prompts."""
    used: dict[tuple[Hashable, ...], set[str]] = defaultdict(set)
    for one in verdicts:
        used[one.judge, str(one.question_id), one.turn, frozenset(one.models)].add(one.prompt)
    mixed: dict[str, set[str]] = defaultdict(set)
    for (judge, *_), prompts in used.items():
        if len(prompts) > 1:
            mixed[str(judge)] |= prompts
    return mixed


def _compare_judges(compared: Iterable[Compared], verdicts: Sequence[Verdict]) -> Ensemble | None:
    mixed = _find_mixed(verdicts)

    def rater(one: Comparison | Verdict) -> str:
        return f"{one.judge} by {one.prompt}" if one.judge in mixed else one.judge

    labels: dict[Hashable, dict[str, str | None]] = defaultdict(dict)
    for entry in compared:
        one = entry.one
        labels[str(one.question_id), one.turn, one.model_a, one.model_b][rater(one)] = (
            one.winner if entry.share is not None else None
        )
    grades: dict[Hashable, dict[str, float]] = defaultdict(dict)
    for verdict in verdicts:
        if len(verdict.models) == 1 and verdict.scores:
            grades[str(verdict.question_id), verdict.turn, verdict.models][rater(verdict)] = verdict.scores[0]
    judges = sorted({judge for found in (labels, grades) for said in found.values() for judge in said})
    if len(judges) < 2:
        return None
    pairs = []
    for judge, other in combinations(judges, 2):
        both = [(said[judge], said[other]) for said in labels.values() if judge in said and other in said]
        pairs.append(
            JudgePair(
                judge=judge,
                other=other,
                with_ties=count_agreement(both),
                no_ties=count_agreement(both, ties=False),
                kappa=cohen_kappa(both),
            )
        )
    return Ensemble(
        pairs=pairs,
        alpha=krippendorff_alpha([list(said.values()) for said in labels.values()]),
        grades_alpha=krippendorff_alpha([list(said.values()) for said in grades.values()], "interval"),
    )


def _rank(compared: Iterable[Compared], seed: int) -> Ranking | None:
    rows = [
        (entry.one.model_a, entry.one.model_b, str(entry.one.winner), str(entry.one.question_id))
        for entry in compared
        if entry.share is not None
    ]
    return rank_battles(parse_battles(rows), seed=seed) if rows else None


def _warn(report: JudgeReport, judged: JudgedFolders) -> list[str]:
    warnings = []
    if not report.parsed:
        warnings.append("No verdict could be read: there is nothing to report but the counts.")
    if report.lost:
        warnings.append(f"{report.lost} of {report.asked} verdicts that a manifest speaks of are not in the files.")
    if judged.unfinished:
        names = ", ".join(judged.unfinished)
        warnings.append(f"No manifest.json in {names}: whether its run came to an end is not known.")
    if judged.replaced:
        warnings.append(
            f"{judged.replaced} verdicts are on a question id, models and prompt that an earlier folder has too, and asked "
            "otherwise: the later ones count. Folders of different question sets want reports of their own."
        )
    for judge in report.judges:
        if len(judge.versions) > 1:
            warnings.append(f"The judge {judge.judge} answered under {len(judge.versions)} names: {', '.join(judge.versions)}.")
        for name, hashes in judge.prompts.items():
            if len(hashes) > 1:
                warnings.append(f"The prompt {name} of {judge.judge} is {len(hashes)} texts of that name, counted together.")
    for judge_name, prompts in sorted(_find_mixed(judged.verdicts).items()):
        warnings.append(
            f"{judge_name} judged the same answers by several prompts ({', '.join(sorted(prompts))}): each counts; "
            "a report of one folder tells them apart."
        )
    questions = {str(one.question_id) for one in judged.verdicts if one.is_parsed}
    if 0 < len(questions) < FEW_QUESTIONS:
        warnings.append(
            f"The verdicts are on {len(questions)} questions; with fewer than {FEW_QUESTIONS} intervals say little."
        )
    one_order = sum(tally.one_order for tally in report.pairs if tally.category == ALL and tally.judge != ALL)
    if one_order:
        warnings.append(f"{one_order} comparisons were shown in one order only, and its place may have decided.")
    if report.ranking and len(report.ranking.components) > 1:
        warnings.append(f"{len(report.ranking.components)} groups of models never met; ratings compare within one only.")
    for entry in report.verbosity:
        if entry.unknown:
            warnings.append(
                f"The answers to {entry.unknown} comparisons by {entry.judge} are not on file; --answers names them."
            )
    return warnings
