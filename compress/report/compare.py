"""Many models in one table: a row a model, and beside each figure how it compares with the model's own baseline."""

import csv
import html
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from compress.errors import ReportError, printable
from compress.metrics import METRICS, Better, named
from compress.mistakes import suggest
from compress.report.numbers import change, figure, verdict_words
from compress.report.table import cell, fitted, html_table, latex, latex_table, table
from compress.report.tradeoff import pareto
from compress.report.verdict import baseline_key, differing, measured_how
from compress.results.record import Role
from compress.results.report import Report
from compress.results.sides import Comparison, GateResult, Measurement, Side, Verdict

HEAD = (
    "rougeL",
    "bleu",
    "chrf",
    "cer",
    "exact_match",
    "perplexity",
    "divergence",
    "accuracy",
    "weight_bytes",
    "peak_run_bytes",
    "latency_p50",
    "tokens_per_second",
)
REVERSED = ":reverse"
ABOUT_EQUAL = "≈"
Style = Literal["table", "md", "csv", "json", "latex", "html"]
HTML = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Models compared</title>
<style>
:root { color-scheme: light dark } body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem 1rem }
table { display: block; overflow-x: auto; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #8886; text-align: right; vertical-align: bottom }
:is(th, td):nth-child(-n+2) { text-align: left } td:nth-child(n+3) { white-space: nowrap }
</style>"""


@dataclass(frozen=True)
class Row:
    """One model.

    figures   every figure by its label
    compared  how each figure compares with the baseline of the same run; empty for a baseline
    unlike    in what way it was measured unlike most others
    """

    name: str
    role: Role
    verdict: Verdict | None
    recipe: str
    run: str
    report: str
    model: str
    figures: dict[str, Measurement]
    compared: dict[str, Comparison]
    unlike: list[str]


def rows(reports: Sequence[Report]) -> list[Row]:
    """A row a model, baselines first.

    A baseline that several reports share (the same model, measured alike) stands once, as the first of them measured it.
    """
    ways = [measured_how(report) for report in reports]
    counted = Counter(_name(report, report.candidate) for report in reports)
    baselines: dict[str, Row] = {}
    candidates = []
    for report, differs in zip(reports, _differences(ways), strict=True):
        if baseline := report.side("baseline"):
            baselines.setdefault(baseline_key(report, baseline), _row(report, baseline, _name(report, baseline), differs))
        name = _name(report, report.candidate)
        candidates.append(_row(report, report.candidate, f"{name} {report.folder.name}" if counted[name] > 1 else name, differs))
    return [*baselines.values(), *candidates]


def require_alike(models: Sequence[Row]) -> None:
    """Raise ReportError unless all were measured alike."""
    candidates = [row for row in models if row.role == "candidate"]
    unlike = [row for row in candidates if row.unlike]
    if unlike:
        first, more = unlike[0], f", and {len(unlike) - 1} more" if len(unlike) > 1 else ""
        raise ReportError(
            f"not all of the {len(candidates)} reports were measured alike: {first.report} was not as most were "
            f"({'; '.join(first.unlike)}){more}; name only those that were, or give --unlike for a table that says what differs"
        )


def labels(models: Sequence[Row], names: Sequence[str] = ()) -> list[str]:
    """The labels of these figures, or without names of those that a deployment turns on; a metric's name means all its grid points.

    Raises ReportError for a figure that no row has.
    """
    every = {label: m.point for row in models for label, m in row.figures.items()}

    def points(name: str) -> list[str]:
        here = [label for label, point in every.items() if name in (label, point[0])]
        return sorted(here, key=lambda label: (every[label][2] or 0, every[label][1] or 0))

    for name in names:
        if not points(name):
            raise ReportError(f"no report has a figure {name!r}{suggest(name, list({point[0]: None for point in every.values()}))}")
    return list({label: None for name in names or HEAD for label in points(name)})


def decisive(models: Sequence[Row], reports: Sequence[Report], minimised: str | None = None) -> list[str]:
    """The labels of all figures that gates of the reports limit, of what is minimised, and of those that a deployment turns on."""
    measured = {m.metric for row in models for m in row.figures.values()}
    gated = dict.fromkeys(metric for report in reports for metric in report.settings["check"])
    metrics = [name for name in [*gated, *([minimised] if minimised else [])] if name in measured]
    return list(dict.fromkeys([*(labels(models, metrics) if metrics else []), *labels(models)]))


def gates(reports: Sequence[Report]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: for each recipe how every gate of any of them came out, with what it bounds and the interval."""
    every = list(dict.fromkeys(gate.label for report in reports for gate in report.gates))
    body = []
    for report in reports:
        results = {gate.label: gate for gate in report.gates}
        body.append([report.recipe, verdict_words(report.verdict), *(_gate(results.get(label)) for label in every)])
    return ["recipe", "verdict", *(label.replace(" [", ", ").replace("]: ", ", ").replace(": ", ", ") for label in every)], body


def _gate(result: GateResult | None) -> str:
    """FAIL 1.21 (1.15 to 1.28)"""
    if result is None:
        return "-"
    parts = [verdict_words(result.verdict), *([] if result.estimate is None else [f"{result.estimate:.4g}"])]
    if result.interval and result.interval[0] < result.interval[1]:
        parts.append(f"({result.interval[0]:.4g} to {result.interval[1]:.4g})")
    return " ".join(parts)


def ranked(models: Sequence[Row], by: str) -> list[Row]:
    """The rows by one figure, the best first, or the smallest where neither is better; `:reverse` turns that round. Rows without the
    figure are last.

    Raises ReportError where the figure is unknown, or is one at several grid points.
    """
    name = by.removesuffix(REVERSED)
    label, *more = labels(models, [name])
    if more:
        raise ReportError(f"--sort {name}: it was measured at several points; name one of {', '.join(map(repr, [label, *more]))}")
    there = [row for row in models if _value(row, label) is not None]
    highest_first = (_better(label) == "higher") != by.endswith(REVERSED)
    there.sort(key=lambda row: _value(row, label) or 0.0, reverse=highest_first)
    return [*there, *(row for row in models if _value(row, label) is None)]


def unbeaten(models: Sequence[Row], figures: Sequence[str]) -> list[Row]:
    """The Pareto front: the rows that no other beats on these figures."""
    kept = pareto([[_value(row, label) for label in figures] for row in models], [_better(label) for label in figures])
    return [row for row, keep in zip(models, kept, strict=True) if keep]


def as_text(models: Sequence[Row], figures: Sequence[str], style: Style, width: int | None = None) -> str:
    """The rows in one style.

    width   of a `table` in a terminal: it is turned on its side where that makes it fit, and else comes in pieces below each other
    """
    if style == "json":
        return json.dumps([_plain(row, figures) for row in models], indent=1, allow_nan=False)
    if style == "csv":
        return _csv(models, figures)
    header, body = cells(models, figures)
    remarks = _remarks(models)
    if style == "table":
        lines = fitted(header, body, width)
        return "\n".join([*lines, *([""] if remarks else []), *map(printable, remarks)])
    if style == "md":
        return "\n\n".join([table(header, body), *(cell(remark) for remark in remarks)])
    if style == "latex":
        return "\n".join([latex_table(header, body), *(f"\\par {latex(remark)}" for remark in remarks)])
    return "\n".join([HTML, html_table(header, body), *(f"<p>{html.escape(printable(remark))}</p>" for remark in remarks)])


def cells(models: Sequence[Row], figures: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text, for people. A model that was measured unlike most has a number behind its name."""
    numbers = _numbers(models)
    body = []
    for row in models:
        name = f"{row.name} [{numbers[tuple(row.unlike)]}]" if row.unlike else row.name
        body.append([name, verdict_words(row.verdict) if row.verdict else "", *(_shown(row, label) for label in figures)])
    return ["model", "verdict", *figures], body


def _differences(ways: Sequence[dict[str, Any]]) -> list[list[str]]:
    """How each way of measuring differs from the commonest."""
    keys = [_key(way) for way in ways]
    usual = ways[keys.index(Counter(keys).most_common(1)[0][0])] if ways else {}
    return [
        [f"{what} {way.get(what, 'not set')}, elsewhere {usual.get(what, 'not set')}" for what in differing(way, usual)] for way in ways
    ]


def _key(data: Any) -> str:
    return json.dumps(data, sort_keys=True, default=str)


def _name(report: Report, side: Side) -> str:
    if side.role == "candidate":
        return f"{report.recipe}{report.inside} ({report.line or 'as it is'})"
    recipe = report.settings.get("model")
    model = str(recipe.get("id", side.model)) if isinstance(recipe, dict) else side.model
    return f"baseline {model.rstrip('/').rsplit('/', 1)[-1]}{report.inside}"


def _row(report: Report, side: Side, name: str, unlike: list[str]) -> Row:
    candidate = side.role == "candidate"
    figures = {m.label: m for m in side.measurements}
    by_point = {c.point: c for c in report.comparisons} if candidate else {}
    compared = {label: by_point[m.point] for label, m in figures.items() if m.point in by_point}
    verdict = report.verdict if candidate and report.side("baseline") else None
    return Row(name, side.role, verdict, report.recipe, report.run, str(report.folder), side.model, figures, compared, unlike)


def _value(row: Row, label: str) -> float | None:
    return row.figures[label].value if label in row.figures else None


def _better(label: str) -> Better:
    return METRICS[named(label)].better


def _shown(row: Row, label: str) -> str:
    text, compared = figure(row.figures.get(label)), row.compared.get(label)
    if compared is None or compared.estimate is None:
        return text
    same = 0 if compared.kind == "difference" else 1
    equal = (
        compared.low is not None and compared.high is not None and compared.low <= same <= compared.high and compared.low < compared.high
    )
    return f"{text} ({f'{ABOUT_EQUAL} ' if equal else ''}{change(compared, interval=False)})"


def _numbers(models: Sequence[Row]) -> dict[tuple[str, ...], int]:
    """The ways of measuring that are unlike most, numbered."""
    return {way: number for number, way in enumerate(dict.fromkeys(tuple(row.unlike) for row in models if row.unlike), 1)}


def _remarks(models: Sequence[Row]) -> list[str]:
    """What a reader must know of a table."""
    remarks = [f"[{number}] not measured as most were: {'; '.join(way)}" for way, number in _numbers(models).items()]
    if any(row.compared for row in models):
        remarks.append(f"(in brackets) against the baseline as the same run measured it; {ABOUT_EQUAL} the interval includes no change")
    return remarks


def _csv(models: Sequence[Row], figures: Sequence[str]) -> str:
    """Figures in base units, how they compare in columns of their own; what is missing is empty."""
    lines = []
    for row in models:
        plain = _plain(row, figures)
        line = {key: plain[key] for key in ("name", "role", "verdict", "recipe", "run", "report", "model")}
        for label in figures:
            line[f"{label} ({METRICS[label.partition(' [')[0]].unit})"] = plain["figures"][label]
            line |= {f"{label} {key}": plain["compared"].get(label, {}).get(key) for key in ("kind", "estimate", "low", "high")}
        lines.append({**line, "unlike": "; ".join(row.unlike)})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().rstrip("\n")


def _plain(row: Row, figures: Sequence[str]) -> dict[str, Any]:
    compared = {label: row.compared[label] for label in figures if label in row.compared}
    return {
        "name": row.name, "role": row.role, "verdict": row.verdict, "recipe": row.recipe, "run": row.run, "report": row.report,
        "model": row.model, "figures": {label: _value(row, label) for label in figures},
        "compared": {label: c.model_dump(include={"kind", "estimate", "low", "high"}) for label, c in compared.items()},
        "unlike": row.unlike,
    }  # fmt: skip
