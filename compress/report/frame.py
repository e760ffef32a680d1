"""Reports as pandas frames: tidy, one row a figure, with unit and direction in columns of their own."""

import glob
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import ReportError
from compress.results.report import Report, read_report
from compress.results.sides import GateResult

if TYPE_CHECKING:
    import pandas

COLUMNS = {
    "recipe": "string", "run": "string", "created": "datetime64[us, UTC]", "verdict": "string", "role": "string", "model": "string",
    "stages": "string", "metric": "string", "batch_size": "Int64", "prompt_tokens": "Int64", "value": "Float64", "unit": "string",
    "better": "string", "samples": "Int64", "missing": "Int64", "reason": "string", "kind": "string", "estimate": "Float64",
    "low": "Float64", "high": "Float64", "gate": "string", "device": "string", "digest": "string", "examples": "string", "report": "string",
}  # fmt: skip
CURVE_COLUMNS = {
    "stage": "string", "step": "Int64", "tokens": "Int64", "loss": "Float64", "learning_rate": "Float64", "grad_norm": "Float64",
    "validation": "Float64",
}  # fmt: skip
LAYER_COLUMNS = {"stage": "string", "name": "string", "bits": "Int64", "error": "Float64", "sparsity": "Float64", "remark": "string"}


def load_reports(*places: str | Path) -> "pandas.DataFrame":
    """Every figure of every report, a row each.

    places   report folders, report.json files, folders that hold reports at any depth, or glob patterns of these

    Columns on the run: recipe and run (strings), created (a time in UTC), verdict (of the run: pass, fail, cannot_tell), device, digest (of
    the recipe), examples (their digest), report (its folder).

    Columns on the figure: role (baseline, candidate), model, stages (what made it), metric, batch_size, prompt_tokens (of speed figures).
    On its number: value, unit (base units: s, bytes, points), better (higher, lower, neither), samples (how many the value rests on),
    missing (how many examples have none), reason (why there is no value).

    Columns on how a candidate compares with its run's baseline: kind (difference, ratio), estimate, low and high (the interval), gate (the
    worst verdict of the gates at this figure). A missing value is NA, never zero.

    A report that can't be read is warned of and left out. Raises ReportError when there is none, or none can be read.
    """
    reports, damaged = read_reports(find_reports(places))
    for problem in damaged:
        warnings.warn(problem, stacklevel=2)
    return frame(reports)


def read_reports(files: Sequence[Path]) -> tuple[list[Report], list[str]]:
    """Reports without their raw numbers, and what is wrong with those that can't be read. Raises ReportError where none can."""
    reports, damaged = [], []
    for file in files:
        try:
            reports.append(read_report(file, figures_only=True))
        except ReportError as error:
            damaged.append(str(error))
    if not reports:
        raise ReportError("\n".join(damaged[:10]))
    return reports, damaged


def find_reports(places: Iterable[str | Path], out: Path | None = None, newest_only: bool = True) -> list[Path]:
    """The report.json files that places mean, each once.

    out           where recipes' reports are; with it a recipe, as a file or by its name, is a place too
    newest_only   a recipe means its newest report, not all

    Raises ReportError for a place without any.
    """
    files: dict[Path, None] = {}
    for place in places if out is None else [_of_recipe(place, out, newest_only) for place in places]:
        matched = [Path(p) for p in sorted(glob.glob(str(place), recursive=True))] or [Path(place)]
        for path in matched:
            try:
                inside = [path / "report.json"] if (path / "report.json").is_file() else []
                if path.is_dir() and not inside:  # hidden folders are left out
                    inside = [Path(file) for file in sorted(glob.glob(f"{glob.escape(str(path))}/**/report.json", recursive=True))]
                if path.is_file() and path.suffix == ".json":
                    inside = [path]
            except OSError as error:
                raise ReportError(f"{path}: can't be looked at: {error.strerror}") from None
            if path.suffix == ".log" and len(matched) > 1:
                continue  # a failed run's, beside the others
            if not inside:
                raise ReportError(f"{path}: there is no report here")
            files.update(dict.fromkeys(inside))
    return list(files)


def _of_recipe(place: str | Path, out: Path, newest_only: bool) -> str | Path:
    """A place of reports as it is; for a recipe that of its newest report, or of all. Its runs are named by their time."""
    text = str(place)
    if not text.endswith((".yaml", ".yml")) and (glob.glob(text, recursive=True) or Path(text).name != text):
        return place
    folder = out / Path(text).stem
    newest = max(folder.glob("*/report.json"), default=None)
    if newest is None:
        raise ReportError(f"{place}: there is no report here, and none of such a recipe in {folder}; name --out, or run it")
    return newest if newest_only else folder


def frame(reports: Iterable[Report]) -> "pandas.DataFrame":
    """The tidy frame of reports in memory."""
    import pandas

    rows = [row for report in reports for row in _rows(report)]
    figures = pandas.DataFrame(rows, columns=list(COLUMNS))
    return figures.assign(created=pandas.to_datetime(figures["created"], utc=True, errors="coerce", format="ISO8601")).astype(COLUMNS)


def pivot(frame: "pandas.DataFrame") -> "pandas.DataFrame":
    """A row a model, a column a figure: `rougeL`, `latency_p50 [batch 1, prompt 64]`. Values are in base units, NA where there is none.

    frame   what load_reports gives, or some of its rows
    """
    model = ["recipe", "run", "role", "model", "stages", "verdict", "report"]
    labelled = frame.assign(figure=labels(frame))
    wide = labelled.set_index([*model, "figure"])["value"].unstack("figure")
    return wide[labelled["figure"].unique()].reindex(labelled.set_index(model).index.unique())


def labels(frame: "pandas.DataFrame") -> "pandas.Series[str]":
    """What each row's figure is called: its metric, and its grid point where it has one."""
    point = " [batch " + frame["batch_size"].astype("string") + ", prompt " + frame["prompt_tokens"].astype("string") + "]"
    return frame["metric"] + point.fillna("")


def _rows(report: Report) -> list[dict[str, object]]:
    shared = {
        "recipe": report.recipe, "run": report.run, "created": report.created, "verdict": report.verdict, "digest": report.digest,
        "examples": report.examples_digest, "device": report.environment.get("gpu") or report.environment.get("device"),
        "report": str(report.folder),
    }  # fmt: skip
    rows = []
    for side in report.sides:
        candidate = side.role == "candidate"
        compared = {c.point: c.model_dump(include={"kind", "estimate", "low", "high"}) for c in report.comparisons if candidate}
        gates = [gate for gate in report.gates if candidate]
        rows += [
            {
                **shared, "role": side.role, "model": side.model, "stages": report.line if candidate else "", "metric": m.metric,
                "batch_size": m.batch_size, "prompt_tokens": m.prompt_tokens, "value": m.value, "unit": m.unit, "better": m.better,
                "samples": (len(m.present) if m.rows is None else m.rows) or 1, "missing": m.missing, "reason": m.reason,
                **compared.get(m.point, {}),
                "gate": _worst([gate for gate in gates if (gate.metric, gate.batch_size, gate.prompt_tokens) == m.point]),
            }
            for m in side.measurements
        ]  # fmt: skip
    return rows


def _worst(gates: Sequence[GateResult]) -> str | None:
    verdicts = [gate.verdict for gate in gates]
    return next((verdict for verdict in ("fail", "cannot_tell", "pass") if verdict in verdicts), None)


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
