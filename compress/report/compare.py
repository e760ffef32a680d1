"""Several reports in one table: a row a model, baselines first, ratios beside figures."""

import json
from collections.abc import Sequence
from typing import Any

from compress.metrics import METRICS
from compress.report.numbers import figure, verdict_words
from compress.report.table import table
from compress.report.write import shown
from compress.results import Measurement, Report, Side

HEAD = ("rougeL", "bleu", "perplexity", "accuracy", "weight_bytes", "peak_run_bytes", "latency_p50", "tokens_per_second")


def rows(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """A row a model: what it is, its figures, and for candidates each figure's ratio to its own baseline.

    A baseline that several reports share (same model and dtype, same examples, same benchmark, same machine) stands once.
    """
    found, seen = [], set()
    for report in reports:
        baseline = report.side("baseline")
        if baseline is not None and (key := _measured_as(report, baseline)) not in seen:
            seen.add(key)
            found.append(_row(report, baseline, None))
    for report in reports:
        candidate = report.side("candidate")
        if candidate is not None:
            found.append(_row(report, candidate, report.side("baseline")))
    return found


def columns(reports: Sequence[Report]) -> list[str]:
    """The labels of the figures worth a column, in order."""
    labels: dict[str, None] = {}
    for head in HEAD:
        for report in reports:
            for theirs, ours, _ in shown(report):
                one = ours or theirs
                if one is not None and one.metric == head:
                    labels[one.label] = None
    return list(labels)


def as_text(reports: Sequence[Report], style: str) -> str:
    """The table as `md`, `csv` or `json`."""
    found, labels = rows(reports), columns(reports)
    if style == "json":
        return json.dumps([_plain(row) for row in found], indent=1, allow_nan=False)
    if style == "csv":
        import pandas

        return pandas.DataFrame([_flat(row, labels) for row in found]).to_csv(index=False).rstrip("\n")
    header, body = cells(found, labels)
    return table(header, body)


def cells(found: Sequence[dict[str, Any]], labels: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text, for people."""
    header = ["model", "verdict", *labels]
    return header, [[row["name"], row["verdict"], *(_with_ratio(row, label) for label in labels)] for row in found]


def _measured_as(report: Report, side: Side) -> str:
    """What makes two measurements of one model the same kind of thing."""
    environment = [report.environment.get(key) for key in ("device", "gpu", "cpu", "threads")]
    settings = [report.settings[key] for key in ("model", "generation", "benchmark")]
    return json.dumps([side.model, report.examples_digest, settings, environment])


def _row(report: Report, side: Side, baseline: Side | None) -> dict[str, Any]:
    figures = {m.label: m for m in side.measurements}
    theirs = {m.label: m.value for m in baseline.measurements} if baseline else {}
    ratios = {label: m.value / theirs[label] for label, m in figures.items() if m.value is not None and theirs.get(label)}  # type: ignore[operator]
    candidate = side.role == "candidate"
    return {
        "name": f"{report.recipe} ({report.line or 'as it is'})" if candidate else f"baseline {side.model.rsplit('/', 1)[-1]}",
        "role": side.role, "verdict": verdict_words(report.verdict) if candidate and baseline else "", "report": str(report.folder),
        "model": side.model, "figures": figures, "ratios": ratios,
    }  # fmt: skip


def _with_ratio(row: dict[str, Any], label: str) -> str:
    measurement: Measurement | None = row["figures"].get(label)
    text = figure(measurement)
    return f"{text} (x{row['ratios'][label]:.2f})" if label in row["ratios"] else text


def _flat(row: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    flat = {key: row[key] for key in ("name", "role", "verdict", "model", "report")}
    for label in labels:
        measurement = row["figures"].get(label)
        unit = METRICS[label.split(" ")[0]].unit
        flat[f"{label} ({unit})"] = measurement.value if measurement else None
        flat[f"{label} ratio"] = row["ratios"].get(label)
    return flat


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "figures": {label: m.value for label, m in row["figures"].items()}}
