"""What the plots of a page are drawn from."""

import re
from collections.abc import Sequence
from typing import Any

from compress.errors import printable
from compress.report import memory, plots
from compress.report.html.sections import Column
from compress.report.layers import summary
from compress.results.stages import Layer, StageRecord

TIMED = ("latency_p50", "ttft", "tpot")
TICKS = 100  # of a side's timings at one point; the page holds every one of them besides
CURVES = ("loss", "validation", "learning_rate", "grad_norm")


def of(columns: Sequence[Column]) -> dict[str, Any]:
    """Vega-Lite by name of the chart, of those that there is something to draw for."""
    names = [column.name for column in columns]
    specs: dict[str, Any] = {}
    if rows := _timings(columns):
        specs["latency"] = plots.latencies(rows, names)
    if held := [
        {"name": c.name, "part": part, "bytes": size} for c in columns for part, size in memory.parts(c.side).items() if part != memory.ALL
    ]:
        specs["memory"] = plots.memory(held, names, list(memory.PARTS))
    if rows := _layers(columns):
        specs["layers"] = plots.sensitivity(rows)
    if rows := _curves(columns):
        specs["training"] = plots.curves(rows, list(dict.fromkeys(row["name"] for row in rows)))
    points = [
        {"name": c.name, "role": c.side.role, "figures": c.side.values(), "ranges": _ranges(c),
         "missing": {m.label: m.missing for m in c.side.measurements if m.missing}} for c in columns
    ]  # fmt: skip
    if len(plots.axes(points)) > 1:
        specs["tradeoff"] = plots.tradeoff(points).to_dict(validate=False)
    return specs


def _ranges(column: Column) -> dict[str, tuple[float, float]]:
    """Where a candidate's figures may lie: the intervals of its changes, set upon its baseline's figures."""
    ranges = {}
    for m in column.side.measurements:
        c = column.compared(m.point)
        if c and c.low is not None and c.high is not None and c.low < c.high:
            ranges[m.label] = (
                (c.baseline + c.low, c.baseline + c.high) if c.kind == "difference" else (c.baseline * c.low, c.baseline * c.high)
            )
    return ranges


def _timings(columns: Sequence[Column]) -> list[dict[str, Any]]:
    rows = []
    for column in columns:
        for m in column.side.measurements:
            if m.metric in TIMED and m.raw:
                timings = sorted(1000 * seconds for turn in m.raw for seconds in turn)
                shown = {"what": m.label, "name": column.name, "figure": 1000 * (m.value or 0.0)}
                rows += [{**shown, "ms": float(f"{ms:.4g}")} for ms in _spread(timings)]
    return rows


def _spread(values: list[float]) -> list[float]:
    """At most TICKS of sorted values, from the least to the most."""
    last = len(values) - 1
    return values if last < TICKS else [values[round(place * last / (TICKS - 1))] for place in range(TICKS)]


def _layers(columns: Sequence[Column]) -> list[dict[str, Any]]:
    return [
        {"stage": stage, "layer": name, **_place(name), "error": layer.error, "text": printable(_now(layer))}
        for stage, record in _stages(columns) for layer in record.layers if layer.error is not None and (name := printable(layer.name))
    ]  # fmt: skip


def _place(name: str) -> dict[str, Any]:
    """The number of a layer's block, which is the first in its name, and the name without it."""
    number = re.search(r"(?<![^.])\d+(?![^.])", name)
    if number is None:
        return {"kind": name, "block": None}
    return {"kind": f"{name[: number.start()]}*{name[number.end() :]}", "block": int(number[0])}


def _now(layer: Layer) -> str:
    return summary([layer]).partition(": ")[2].removeprefix("1 ") + (f"; {layer.remark}" if layer.remark else "")


def _curves(columns: Sequence[Column]) -> list[dict[str, Any]]:
    return [
        {"what": what, "name": stage, "step": point.step, "value": float(f"{value:.5g}")}
        for what in CURVES
        for stage, record in _stages(columns) for point in record.curve if (value := getattr(point, what)) is not None
    ]  # fmt: skip


def _stages(columns: Sequence[Column]) -> list[tuple[str, StageRecord]]:
    """Every stage of every candidate; its name includes the candidate's where there are several."""
    candidates = [column for column in columns if column.candidate]
    return [(printable(r.name if len(candidates) == 1 else f"{c.name}: {r.name}"), r) for c in candidates for r in c.report.stages]
