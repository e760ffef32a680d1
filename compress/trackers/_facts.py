"""What trackers log of a report. Names keep to the characters that all of them allow."""

import json
from collections.abc import Iterator
from typing import Any

from compress.report.numbers import verdict_words
from compress.results.report import Report
from compress.results.sides import GateResult, Measurement, Side


def title(report: Report) -> str:
    return f"{report.recipe}/{report.run}"


def params(report: Report) -> dict[str, str | int | float]:
    """The recipe's settings by dotted keys: data.samples, stages.0.bits. Null is left out; lists and blocks further down are JSON."""
    flat: dict[str, Any] = {}
    for block, value in report.settings.items():
        parts = {block: value}
        if isinstance(value, dict):
            parts = {f"{block}.{key}": inner for key, inner in value.items()}
        elif block == "stages":
            parts = {f"{block}.{number}.{key}": inner for number, stage in enumerate(value) for key, inner in stage.items()}
        flat.update(parts)
    return {key: value if isinstance(value, str | int | float) else _json(value) for key, value in flat.items() if value is not None}


def figures(side: Side) -> dict[str, float]:
    """The figures of a side, by name with unit; missing ones are left out."""
    return {f"{_point(m)}{_unit(m.unit)}": m.value for m in side.measurements if m.value is not None}


def tags(report: Report) -> dict[str, str]:
    """The run's identity and its outcome, gate by gate."""
    gates = {f"gate {_point(gate)} {gate.limit_kind}": f"{verdict_words(gate.verdict)}: {gate.sentence}" for gate in report.gates}
    return {
        "recipe": report.recipe, "run": report.run, "digest": report.digest, "stages": report.line, "machine": str(report.machine),
        "verdict": report.verdict, "decided by": report.decided_by, **gates,
    }  # fmt: skip


def curves(report: Report) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Training curves: stage (stages.0), step, and the figures there."""
    for number, record in enumerate(report.stages):
        for point in record.curve:
            yield f"stages.{number}", point.step, point.model_dump(exclude={"step"}, exclude_none=True)


def _json(value: Any) -> str:
    kept = {key: inner for key, inner in value.items() if inner is not None} if isinstance(value, dict) else value
    return json.dumps(kept, ensure_ascii=False)


def _point(figure: Measurement | GateResult) -> str:
    return figure.metric if figure.batch_size is None else f"{figure.metric} batch {figure.batch_size} prompt {figure.prompt_tokens}"


def _unit(unit: str) -> str:
    """A unit as MLflow allows it: in words, since a slash groups metrics."""
    return "" if unit == "1" else f" in {unit.replace('%', 'percent').replace('/', ' per ')}"
