"""The contents of a page's sections, as plain rows for its template."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import yaml

from compress.errors import printable
from compress.metrics import METRICS
from compress.report import memory, steps, times, turns
from compress.report.layers import lost_most, remarkable, summary
from compress.report.markdown import FIGURES, shown
from compress.report.numbers import change, duration, figure, percent, scaled, share, verdict_words
from compress.report.verdict import baseline_key
from compress.report.why import at_run_time, open_points
from compress.results.report import Report
from compress.results.sides import Comparison, GateResult, Measurement, Side
from compress.results.stages import StageRecord

GIST = ("weight_bytes", "peak_run_bytes", "latency_p50")  # beside the headline metric
WORST = 10


@dataclass(frozen=True)
class Column:
    """A model of the page: its name there, its side of the report that measured it."""

    name: str
    report: Report
    side: Side

    @property
    def candidate(self) -> bool:
        return self.side.role == "candidate"

    def compared(self, point: tuple[str, int | None, int | None]) -> Comparison | None:
        """With its own baseline; None for a baseline and an original."""
        return next((c for c in self.report.comparisons if c.point == point), None) if self.candidate else None


def columns(reports: Sequence[Report]) -> list[Column]:
    """Baselines, of which the same model measured alike stands once, and then candidates."""
    baselines: dict[str, Column] = {}
    for report in reports:
        if side := report.side("baseline"):
            baselines.setdefault(baseline_key(report, side), Column(f"baseline {printable(short(side))}{report.inside}", report, side))
    baseline_columns = list(baselines.values())
    if len({column.name for column in baseline_columns}) < len(baseline_columns):
        baseline_columns = [replace(column, name=f"{column.name} #{number}") for number, column in enumerate(baseline_columns, 1)]
    if len(baseline_columns) == 1:
        baseline_columns = [Column(f"baseline{baseline_columns[0].report.inside}", baseline_columns[0].report, baseline_columns[0].side)]
    candidates = [Column(printable(name), report, report.candidate) for name, report in zip(_names(reports), reports, strict=True)]
    first = next((report for report in reports if report.original), None)
    original = [Column("original in transformers", first, first.original)] if first and first.original else []
    return [*original, *baseline_columns, *candidates]


def of(columns: Sequence[Column]) -> dict[str, Any]:
    """Everything that the template shows."""
    candidates = [column for column in columns if column.candidate]
    first, sides = candidates[0].report, [column.side for column in columns]
    return {
        "title": _title(candidates), "created": first.created[:16].replace("T", " "), "several": len(candidates) > 1,
        "machine": ", ".join(str(first.environment[key]) for key in ("gpu", "cpu") if first.environment.get(key)),
        "names": [column.name for column in columns], "percent": percent(first),
        "cards": [_card(column) for column in candidates],
        "gates": [(c.name, [(g, verdict_words(g.verdict), picture(g)) for g in c.report.gates]) for c in candidates if c.report.gates],
        "notes": [(c.name, lines) for c in candidates if (lines := _notes(c.report))],
        "figures": figures(columns), "figures_note": FIGURES,
        "memory": memory.held(sides), "checks": memory.checked(sides),
        "step_head": steps.HEAD, "step_note": steps.NOTE,
        "steps": [(c.name, rows, steps.ceilings(c.report.environment)) for c in candidates if (rows := steps.rows(c.report))],
        "stages": [(c.name, [_stage(record) for record in c.report.stages], _bought(c)) for c in candidates if c.report.stages],
        "layers": [(c.name, r.name, *_layers(r)) for c in candidates for r in c.report.stages if r.layers],
        "time_head": times.HEAD, "times": [(c.name, times.rows(c.report), times.sentence(c.report)) for c in candidates if c.report.phases],
        "turn_head": turns.HEAD, "turns": [(c.name, rows) for c in candidates if (rows := turns.rows(c.report))],
        "recipes": [(c.name, c.report, _recipe(c.report)) for c in candidates],
        "environments": [(c.name, [(k, _value(k, v)) for k, v in c.report.environment.items() if v is not None]) for c in candidates],
    }  # fmt: skip


def short(side: Side) -> str:
    """A model's name without the folders that it lies in."""
    return PurePath(side.model).name or side.model


def sentence(report: Report) -> str:
    """What decided, with its interval: of a pass the first gate on quality."""
    if report.verdict != "pass":
        return report.decided_by
    quality = [gate for gate in report.gates if gate.interval and METRICS[gate.metric].kind == "quality"]
    return "; ".join([report.decided_by, *(gate.sentence for gate in (quality or report.gates)[:1])])


def mark(compared: Comparison | None, undecided: set[tuple[str, int | None, int | None]]) -> str:
    """`better` or `worse` where the interval leaves no doubt and no gate is undecided there."""
    if compared is None or compared.low is None or compared.high is None or compared.point in undecided:
        return ""
    none, better = (0 if compared.kind == "difference" else 1), METRICS[compared.metric].better
    if better == "neither" or compared.low <= none <= compared.high:
        return ""
    return "better" if (compared.low > none) == (better == "higher") else "worse"


def picture(gate: GateResult) -> dict[str, float] | None:
    """Where estimate, interval and limit lie on a line, in per cent of its length, with what is allowed; None without an estimate."""
    if gate.estimate is None:
        return None
    low, high = gate.interval or (gate.estimate, gate.estimate)
    least, most = min(low, gate.limit), max(high, gate.limit)
    room = 0.15 * (most - least) or abs(gate.limit) or 1.0
    at = {
        name: 100 * (value - least + room) / (most - least + 2 * room)
        for name, value in (("low", low), ("high", high), ("at", gate.estimate), ("limit", gate.limit))
    }
    begin, end = (0.0, at["limit"]) if gate.limit_kind.startswith("max") else (at["limit"], 100.0)
    return {**at, "begin": begin, "end": end}


def figures(columns: Sequence[Column]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The figures of all columns in groups: those of the model as a whole, then those of each grid point."""
    groups: dict[str, dict[str, Measurement]] = {}
    for column in columns:
        for theirs, ours, _ in shown(column.report):
            if measurement := theirs or ours:
                point = "" if measurement.batch_size is None else f"batch {measurement.batch_size}, prompt {measurement.prompt_tokens}"
                groups.setdefault(point, {}).setdefault(measurement.metric, measurement)
    return [(point, [_row(measurement, columns) for measurement in group.values()]) for point, group in groups.items()]


def _row(measurement: Measurement, columns: Sequence[Column]) -> dict[str, Any]:
    cells = [{**_change(column, measurement.point), "value": figure(column.side.figure(measurement.point))} for column in columns]
    return {"metric": measurement.metric, "better": measurement.better, "about": METRICS[measurement.metric].about, "cells": cells}


def _change(column: Column, point: tuple[str, int | None, int | None]) -> dict[str, str]:
    compared = column.compared(point)
    return {"change": change(compared) if compared else "", "mark": mark(compared, open_points(column.report.gates))}


def _names(reports: Sequence[Report]) -> list[str]:
    """A name for each report: its recipe, its stages or its run, the first that differs between all of them."""
    engines = [f"{r.recipe} in {r.engine}" for r in reports]
    kinds = ([r.recipe for r in reports], engines, [r.line for r in reports], [f"{r.recipe} {r.run}" for r in reports])
    numbered = [f"{report.recipe} #{number}" for number, report in enumerate(reports, 1)]
    return next((names for names in kinds if all(names) and len(set(names)) == len(names)), numbered)


def _title(candidates: Sequence[Column]) -> str:
    first, is_single = candidates[0], len(candidates) == 1
    name = f"{first.name}{first.report.inside}" if is_single else f"{len(candidates)} models"
    if (baseline := first.report.side("baseline")) is None:
        return f"{name}, without a baseline"
    if len({column.report.recipe for column in candidates}) == 1 and len({column.report.engine for column in candidates}) > 1:
        return f"May {printable(first.report.recipe)} replace {short(baseline)}, and in which engine?"
    return f"May {name if is_single else f'any of these {len(candidates)}'} replace {short(baseline)}?"


def _card(column: Column) -> dict[str, Any]:
    """The verdict on one candidate with the figures that matter most."""
    report = column.report
    quality = [report.score] if report.score else [m.metric for m in column.side.measurements if METRICS[m.metric].kind == "quality"][:1]
    gist = []
    for metric in [*quality, *GIST]:
        measurements = [m for m in column.side.measurements if m.metric == metric]
        if measurement := min(measurements, key=lambda m: (m.prompt_tokens or 0, m.batch_size or 0), default=None):
            gist.append({"label": measurement.label, "value": figure(measurement), **_change(column, measurement.point)})
    timed = [c for c in report.against_original if c.metric == "latency_p50"]
    if fastest := min(timed, key=lambda c: (c.prompt_tokens or 0, c.batch_size or 0), default=None):
        value, _, interval = change(fastest).partition(" ")
        gist.append({"label": "latency against plain transformers", "value": value, "change": interval, "mark": ""})
    return {
        "name": column.name, "verdict": report.verdict, "words": verdict_words(report.verdict), "sentence": sentence(report),
        "line": "" if report.line == column.name else report.line,
        "gist": gist, "cautions": report.cautions,
    }  # fmt: skip


def _notes(report: Report) -> list[str]:
    return [*(failure for side in report.sides for failure in side.failures), *report.notes]


def _stage(record: StageRecord) -> dict[str, Any]:
    """A stage's cost, and its gain as far as it was measured."""
    bought = [*([summary(record.layers)] if record.layers else []), *record.sentences]
    return {
        "name": record.name, "settings": ", ".join(f"{key}: {value}" for key, value in list(record.stage.items())[1:] if value is not None),
        "took": "reused" if record.reused else duration(record.seconds), "bought": bought or ["–"], "in_use": at_run_time(record),
    }  # fmt: skip


def _bought(column: Column) -> str:
    """What all stages together changed."""
    compared = {c.metric: c for c in column.report.comparisons if c.batch_size is None}
    metrics = [metric for metric in (column.report.score, "weight_bytes", "file_bytes") if metric in compared]
    return "; ".join(f"{metric} {change(compared[metric])}" for metric in metrics if metric)


def _layers(record: StageRecord) -> tuple[str, list[list[str]], list[list[str]]]:
    """The summary, the layers to remark upon, those that lost most."""
    odd = [[name, "full" if bits is None else str(bits), remark] for name, bits, remark in remarkable(record.layers)]
    worst = [
        [layer.name, share(layer.sparsity) if layer.sparsity is not None else f"{layer.bits} bits", share(layer.error)]
        for layer in lost_most(record.layers, WORST)
    ]
    return summary(record.layers), odd, worst


def _recipe(report: Report) -> str:
    return yaml.safe_dump(report.settings, sort_keys=False, allow_unicode=True, width=100)


def _value(key: str, value: Any) -> str:
    return scaled(value, "bytes") if key.endswith("_bytes") and isinstance(value, (int, float)) else str(value)
