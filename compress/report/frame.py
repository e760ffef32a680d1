"""Reports as pandas frames: tidy, one row a figure, with unit and direction in columns of their own."""

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import ReportError
from compress.results import Report, read_report

if TYPE_CHECKING:
    import pandas

COLUMNS = {
    "recipe": "string", "run": "string", "created": "string", "verdict": "string", "role": "string", "model": "string",
    "stages": "string", "metric": "string", "batch_size": "Int64", "prompt_tokens": "Int64", "value": "Float64", "unit": "string",
    "better": "string", "samples": "Int64", "reason": "string", "device": "string", "report": "string",
}  # fmt: skip
CURVE_COLUMNS = {
    "stage": "string", "step": "Int64", "tokens": "Int64", "loss": "Float64", "learning_rate": "Float64", "grad_norm": "Float64",
    "validation": "Float64",
}  # fmt: skip
LAYER_COLUMNS = {"stage": "string", "name": "string", "bits": "Int64", "error": "Float64", "sparsity": "Float64", "remark": "string"}


def load_reports(*places: str | Path) -> "pandas.DataFrame":
    """Every figure of every report, a row each.

    places   report folders, report.json files, folders that hold reports at any depth, or glob patterns of these

    Columns: recipe, run, created, verdict (of the run), role (baseline, candidate), model, stages (what made it), metric, batch_size and
    prompt_tokens (of speed figures), value, unit, better (higher, lower, neither), samples (how many the value rests on), reason (why
    there is no value), device, report (its folder). A missing value is NA, never zero.

    Raises ReportError when a report can't be read, or when there is none.
    """
    return frame(read_report(file) for file in find_reports(places))


def find_reports(places: Iterable[str | Path]) -> list[Path]:
    """The report.json files that places mean, each once. Raises ReportError for a place without any."""
    files: dict[Path, None] = {}
    for place in places:
        matched = [Path(p) for p in sorted(glob.glob(str(place), recursive=True))] or [Path(place)]
        for path in matched:
            inside = [path / "report.json"] if (path / "report.json").is_file() else []
            if path.is_dir() and not inside:
                inside = sorted(f for f in path.rglob("report.json") if not any(part.endswith(".partial") for part in f.parts))
            if path.is_file() and path.suffix == ".json":
                inside = [path]
            if path.suffix == ".log" and len(matched) > 1:
                continue  # a failed run's, beside the others
            if not inside:
                raise ReportError(f"{path}: there is no report here")
            files.update(dict.fromkeys(inside))
    return list(files)


def frame(reports: Iterable[Report]) -> "pandas.DataFrame":
    """The tidy frame of reports in memory."""
    import pandas

    rows = [row for report in reports for row in _rows(report)]
    return pandas.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def _rows(report: Report) -> list[dict[str, object]]:
    shared = {
        "recipe": report.recipe, "run": report.run, "created": report.created, "verdict": report.verdict,
        "device": report.environment.get("gpu") or report.environment.get("device"), "report": str(report.folder),
    }  # fmt: skip
    return [
        {
            **shared, "role": side.role, "model": side.model, "stages": report.line if side.role == "candidate" else "",
            "metric": m.metric, "batch_size": m.batch_size, "prompt_tokens": m.prompt_tokens, "value": m.value, "unit": m.unit,
            "better": m.better, "samples": len(m.samples) or 1, "reason": m.reason,
        }
        for side in report.sides for m in side.measurements
    ]  # fmt: skip


def layers(report: Report) -> "pandas.DataFrame":
    """A row a layer of every stage: stage, name, bits (NA where it was left out), error (a share of its output), remark."""
    import pandas

    rows = [{"stage": record.name, **layer.model_dump()} for record in report.stages for layer in record.layers]
    return pandas.DataFrame(rows, columns=list(LAYER_COLUMNS)).astype(LAYER_COLUMNS)


def curves(report: Report) -> "pandas.DataFrame":
    """A row a point of every stage's training: stage, step, tokens, loss, learning_rate, grad_norm, validation (NA where not taken)."""
    import pandas

    rows = [{"stage": record.name, **point.model_dump()} for record in report.stages for point in record.curve]
    return pandas.DataFrame(rows, columns=list(CURVE_COLUMNS)).astype(CURVE_COLUMNS)


def predictions(report: Report) -> "pandas.DataFrame":
    """A row an example: id, prompt, references, both outputs, both scores (of the report's headline metric)."""
    import pandas

    return pandas.DataFrame([prediction.model_dump() for prediction in report.predictions])
