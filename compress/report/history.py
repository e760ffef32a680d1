"""A folder of reports as a time line: one metric over runs that were measured alike, and where it changed.

PELT looks for changes (Killick, Fearnhead and Eckley 2012; the package ruptures), with absolute errors. Levels are medians and last two
runs at least, so a single odd run is no change. Values are in units of the mean difference between neighbours, which a change enters only
once. With the penalty below, about 5 of 100 lines without a change show one where noise is normal, on 6 to 100 runs. They are fewer where
its tails are heavier.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from compress.errors import InputError, ReportError
from compress.metrics import METRICS, Better, Metric, named
from compress.mistakes import suggest
from compress.report.verdict import differing, measured_how
from compress.results.report import Report
from compress.results.sides import Measurement, Verdict

FEWEST = 6  # runs, below which no change is looked for
PENALTY = 4.0  # of each change, in mean differences between neighbours
ROUNDING = 1e-6  # the least such difference that counts, as a share of the values' mean: what another version of a library may change


@dataclass(frozen=True)
class Run:
    """One report's place on a line; `value` is the candidate's, None with its `reason` where there is none."""

    created: str
    commit: str | None
    value: float | None
    reason: str | None
    verdict: Verdict
    report: str


@dataclass(frozen=True)
class Change:
    """A change of level: the number of the first run since; the median of the runs before, back to the last change, and of those since."""

    first: int
    before: float
    since: float


@dataclass(frozen=True)
class Line:
    """Runs of one recipe that were measured alike, in time order.

    apart     what was measured otherwise than on the recipe's first line
    changes   None where there are too few runs to look for any
    """

    recipe: str
    figure: str
    unit: str
    better: Better
    machine: str
    apart: list[str]
    runs: list[Run]
    changes: list[Change] | None


def lines(reports: Iterable[Report], metric: str, recipe: str | None = None) -> list[Line]:
    """The time lines of a metric: one for each recipe, way of measuring and grid point.

    metric   a metric's name, for all of its grid points, or the label of one: latency_p50 [batch 8, prompt 128]

    Raises InputError where there is no such metric or recipe, ReportError where no report has it.
    """
    _metric(metric)
    reports = list(reports)
    selection = [report for report in reports if recipe in (None, report.recipe)]
    if recipe and not selection:
        raise InputError(f"--recipe {recipe}: there is no report of it{suggest(recipe, sorted({report.recipe for report in reports}))}")
    groups: dict[tuple[str, str, str], list[tuple[Report, Measurement]]] = {}
    first: dict[str, Report] = {}
    for report in sorted(selection, key=lambda report: (report.recipe, report.created, report.run)):
        for figure in _figures(report, metric):
            groups.setdefault((report.recipe, figure.label, json.dumps(measured_how(report), sort_keys=True)), []).append((report, figure))
            first.setdefault(report.recipe, report)
    if not groups:
        raise ReportError(f"none of {len(selection)} reports has {metric}; what one has stands in its report.md")
    return [_line(group, first[name]) for (name, _, _), group in groups.items()]


def best(report: Report, others: Iterable[Report], metric: str) -> Report:
    """Of the others that passed and were measured as this report was, the one whose candidate has the best figure.

    Raises InputError for a metric without a best figure, ReportError where there is no such report.
    """
    better, figures = _metric(metric).better, _figures(report, metric)
    if better == "neither":
        raise InputError(f"--best {metric}: neither more nor less of it is better; name another metric")
    if len(figures) > 1:
        raise InputError(f"--best {metric}: it is measured at {len(figures)} points; name one of {', '.join(f.label for f in figures)}")
    contenders = [
        (figure.value, other)
        for other in others
        if other.verdict == "pass"
        and (other.recipe, other.run) != (report.recipe, report.run)
        and measured_how(other) == measured_how(report)
        for figure in _figures(other, metric)
        if figure.value is not None
    ]
    if not contenders:
        raise ReportError(f"--best {metric}: no other report there passed, was measured as {report.folder} was, and has {metric}")
    return (max if better == "higher" else min)(contenders, key=lambda pair: pair[0])[1]


def changes(values: Sequence[float]) -> list[int]:
    """Where the level of values, in time order, changes: the numbers of the first ones of each new level."""
    import numpy as np
    import ruptures

    series = np.asarray(values, dtype=np.float64)
    noise = max(float(np.abs(np.diff(series)).mean()), ROUNDING * abs(float(series.mean())))
    if not noise:
        return []
    search = ruptures.Pelt(model="l1", jump=1).fit(series / noise)
    return [int(place) for place in search.predict(pen=PENALTY)[:-1]]


def _metric(name: str) -> Metric:
    """The metric of a name or label."""
    if (metric := named(name)) not in METRICS:
        raise InputError(f"{name!r} is not a metric{suggest(name, tuple(METRICS))}")
    return METRICS[metric]


def _figures(report: Report, metric: str) -> list[Measurement]:
    """The candidate's figures of that name or label."""
    return [figure for figure in report.candidate.measurements if metric in (figure.metric, figure.label)]


def _line(pairs: Sequence[tuple[Report, Measurement]], first: Report) -> Line:
    runs = [
        Run(report.created, report.environment.get("commit"), figure.value, figure.reason, report.verdict, str(report.folder))
        for report, figure in pairs
    ]
    report, figure = pairs[0]
    machine = report.machine or "an unknown machine"
    apart = differing(measured_how(first), measured_how(report))
    return Line(report.recipe, figure.label, figure.unit, figure.better, machine, apart, runs, _changes(runs))


def _changes(runs: Sequence[Run]) -> list[Change] | None:
    measured_runs = [(number, run.value) for number, run in enumerate(runs) if run.value is not None]
    if len(measured_runs) < FEWEST:
        return None
    values = [value for _, value in measured_runs]
    starts = [0, *changes(values), len(values)]
    medians = [median(values[start:end]) for start, end in pairwise(starts)]
    return [Change(measured_runs[start][0], *levels) for start, levels in zip(starts[1:-1], pairwise(medians), strict=True)]
