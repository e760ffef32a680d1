"""A report on disk, all files or none: report.json, report.md, report.html, and as parquet measurements, predictions, layers, curves of
training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.files import whole_folder
from compress.phases import Phase
from compress.report import markdown
from compress.report.frame import curves, frame, layers, predictions
from compress.results.report import Report
from compress.results.stages import NOTES, Account, Cut, Layer, Point


def write(report: Report, folder: Path, phases: Callable[[], list[Phase]] = list) -> Report:
    """Write all files of a report into `folder`, which appears whole or not at all. Returns the report with its place.

    phases   where the time has gone until now; report.json comes last and has that of the other files too
    """
    from compress.report import html

    placed = report.model_copy(update={"folder": folder, "phases": phases()})
    with whole_folder(folder) as partial:
        frame(placed.parts).to_parquet(partial / "measurements.parquet", index=False)
        predictions(report).to_parquet(partial / "predictions.parquet", index=False)
        if any(record.layers for record in report.stages):
            layers(report).to_parquet(partial / "layers.parquet", index=False)
        if any(record.curve for record in report.stages):
            curves(report).to_parquet(partial / "curves.parquet", index=False)
        (partial / "report.md").write_text(markdown.whole(placed), encoding="utf-8")
        (partial / "report.html").write_text(html.render(placed.parts), encoding="utf-8")
        placed = placed.model_copy(update={"phases": phases()})
        (partial / "report.json").write_text(placed.model_dump_json(indent=1), encoding="utf-8")
    return placed


def read_notes(artifact: Path) -> dict[str, Any]:
    """A stage's notes in its artifact: `layers`, their `account`, what it `said`, and the `curve` of its training."""
    file = artifact / NOTES
    noted = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"layers": [], "said": []}
    account = Account.model_validate(noted["account"]) if noted.get("account") else None
    layers, curve = ([kind.model_validate(entry) for entry in noted.get(key, [])] for key, kind in (("layers", Layer), ("curve", Point)))
    return {"layers": layers, "account": account, "said": noted["said"], "curve": curve}


def read_cut(artifact: Path, where: str, key: str) -> Cut | None:
    """The reading of a stage in which most prompts were cut, `key` being what the recipe limits them by; None where it read none."""
    file = artifact / NOTES
    noted = json.loads(file.read_text(encoding="utf-8")).get("cut", []) if file.is_file() else []
    readings = [
        Cut(where=where, key=key if entry["by_key"] else None, **{name: entry[name] for name in ("cut", "all", "limit")}) for entry in noted
    ]
    return max(readings, key=lambda reading: reading.share, default=None)
