"""The card of an artifact: README.md with Hugging Face's metadata, for who finds the model without this package.

What was done, by which recipe, what was measured and where, how it is loaded, whose model it was. Several runs may share an artifact; its
card is of the newest that measured it. A card is no part of a model's `fingerprint`. It is replaced at once, so runs that read the
artifact meanwhile don't notice.
"""

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.metrics import GROUPS
from compress.model.folder import CARD
from compress.model.source import Source, fingerprint, locate, user_path
from compress.recipe import Recipe, digest
from compress.report import markdown as tables
from compress.report import usage
from compress.report.numbers import verdict_words
from compress.report.table import cell, table
from compress.report.why import at_run_time
from compress.results.report import Report
from compress.results.stages import StageRecord

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

RUN = "compress_run"  # in the metadata: recipe and run of the report that the figures are from
PIPELINES = {"causal-lm": "text-generation", "sequence-classification": "text-classification"}
METRIC = {figure: group for group, figures in GROUPS.items() for figure in figures if group != "generated_tokens"}  # as the hub calls it
LICENCE = ("license", "license_name", "license_link")
ABSOLUTE = re.compile(r"(?<![\w./~-])~?(?:/[^\s/:'\"`]+)+/(?=[^\s/])")


@dataclass(frozen=True)
class Origin:
    """A model that went in.

    role   what it was there
    name   what people call it
    """

    role: str
    name: str
    source: Source

    @cached_property
    def card(self) -> dict[str, Any] | None:
        """The metadata of its own card; None where there is none, or none to be had."""
        from huggingface_hub import ModelCard, hf_hub_download

        where = self.source
        try:
            with _quiet_hub():
                file = Path(where.id) / CARD if where.is_folder else Path(hf_hub_download(where.id, CARD, revision=where.revision))
                return dict(ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()) if file.is_file() else None
        except Exception:  # people write anything into a card, and the hub may not answer
            return None

    def stated(self, key: str) -> Any:
        """What its card states under this key."""
        return (self.card or {}).get(key)


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Within it the hub's library doesn't warn of a card without metadata, and draws no bars."""
    from logging import ERROR

    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    verbosity, drawn = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity(ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if drawn:
            enable_progress_bars()


def write(recipe: Recipe, source: Source, stages: list[StageRecord], report: Report | None = None) -> None:
    """Leave a card in the artifact of the last of these stages.

    source   the recipe's model
    report   what was measured; without one a card that is there stays

    Where the folder can't be written to it stays as it was: no run is lost for its card.
    """
    if not stages:
        return
    artifact = Path(stages[-1].artifact)
    with suppress(OSError):
        if report is None and (artifact / CARD).exists():
            return
        content = text(recipe, source, stages, report)
        fresh = artifact.with_name(f".{artifact.name}.{secrets.token_hex(4)}.card")  # outside, where nobody counts it as the model's
        try:
            fresh.write_text(content, encoding="utf-8")
            fresh.replace(artifact / CARD)
        finally:
            fresh.unlink(missing_ok=True)


def text(recipe: Recipe, source: Source, stages: list[StageRecord], report: Report | None) -> str:
    """The card, metadata and all. Absolute paths are cut to their last names: the machine's folders are nobody's business."""
    origins = _origins(recipe, source, len(stages))
    title = f"{origins[0].name.rsplit('/', 1)[-1]}, {', '.join(record.name for record in stages)}"
    first = [
        f"# {cell(title)}",
        f"Made from {cell(origins[0].name)} by the recipe {cell(recipe.name)} (digest {recipe.digest}) with compress {__version__}.",
        _verdict(recipe, report),
    ]
    then = [
        _done(stages),
        *([] if report is None else [tables.figures(report), tables.gates(report), _notes(report)]),
        _provenance(origins),
    ]
    before, behind = (ABSOLUTE.sub("", "\n\n".join(part for part in parts if part)) for parts in (first, then))
    body = "\n\n".join([before, usage.section(recipe, Path(stages[-1].artifact), report), behind])  # whose example stays as it is
    written = tables.indented(_without_folders(recipe.as_written()))
    return f"---\n{_metadata(recipe, origins, stages, report, title)}\n---\n\n{body}\n\n## Recipe\n\nDefaults filled in.\n\n{written}\n"


def _origins(recipe: Recipe, source: Source, stages: int) -> list[Origin]:
    """The recipe's model, and those that its stages name."""
    origins = [Origin("the recipe's model", _name(recipe.model.id), source)]
    for stage in recipe.stages[:stages]:
        for role, other in stage.settings.models().items():
            place = Source(locate(other.id, recipe.folder), source.task, revision=other.revision)
            origins.append(Origin(f"{role} of {stage}", _name(other.id), place))
    return origins


def _name(id: str) -> str:
    """A model or data set as a recipe names it, without the folders that lead to it from the root."""
    return Path(id).name if id.startswith(("/", "~")) else id


def _metadata(recipe: Recipe, origins: list[Origin], stages: list[StageRecord], report: Report | None, title: str) -> str:
    """What the hub reads. A licence is only stated where all models have the same, a relation to the base model only where that is all."""
    from huggingface_hub import ModelCardData

    first, relation = origins[0], None
    hub = list(dict.fromkeys(origin.source.id for origin in origins if not origin.source.is_folder))
    if len(hub) == len(origins) == 1 and not any(record.stage.get("student") for record in stages):
        families = {next(iter(record.stage)) for record in stages}
        relation = "quantized" if "quantize" in families else "finetune" if families & {"finetune", "distill"} else None
    licence = {key: first.stated(key) for key in LICENCE}
    if (link := licence["license_link"]) and "://" not in str(link):  # a file beside the base model
        place = first.source
        licence["license_link"] = None if place.is_folder else f"https://huggingface.co/{place.id}/blob/{place.revision}/{link}"
    if len({str(origin.stated("license")) for origin in origins}) > 1:
        licence = {}
    task = first.stated("pipeline_tag") or PIPELINES.get(recipe.model.task)
    measured = {} if report is None else {m.metric: m.value for m in report.candidate.measurements if m.metric in METRIC}
    results = [] if report is None else _results(recipe, report, measured, task)
    metadata = ModelCardData(
        base_model=hub or None, base_model_relation=relation, library_name="transformers", **licence, language=first.stated("language"),
        pipeline_tag=task, tags=["compress", *(str(next(iter(record.stage.values()))) for record in stages)],
        metrics=sorted({METRIC[metric] for metric in measured}) or None, model_name=title if results else None,
        eval_results=results or None,
    )  # fmt: skip
    if report is not None:
        metadata[RUN] = f"{report.recipe}/{report.run}"
    return metadata.to_yaml()


def _results(recipe: Recipe, report: Report, measured: dict[str, float | None], task: str | None) -> list["EvalResult"]:
    """What the hub lists beside other models' figures: only what was measured on one of its own data sets."""
    from huggingface_hub import EvalResult

    data = recipe.data
    if data.source == "builtin" or (recipe.folder / user_path(data.source)).exists():
        return []
    return [
        EvalResult(
            task_type=task or "text-generation", dataset_type=data.source, dataset_name=data.source, dataset_config=data.subset,
            dataset_split=data.splits.get("evaluation", "test"), dataset_args={"samples": len(report.predictions), "seed": data.seed},
            metric_type=METRIC[metric], metric_name=metric, metric_value=value,
        )
        for metric, value in measured.items() if value is not None
    ]  # fmt: skip


def _verdict(recipe: Recipe, report: Report | None) -> str:
    if report is None:
        return "Not measured yet; its figures stand here once a run has measured it."
    where, data = report.environment, report.settings["data"]
    machine = [
        report.machine,
        f"CPU threads: {where['threads']}" if where.get("threads") else None,
    ]
    libraries = [f"{name} {where[name]}" for name in ("torch", "transformers") if where.get(name)]
    examples = [f"{len(report.predictions):,} examples of {_name(str(data.get('source')))}"] if report.predictions else []
    measured = ", ".join(str(part) for part in [*examples, *machine, *libraries] if part)
    by = usage.measured_with(recipe, where.get("device", "cpu"))
    return (
        f"May it replace the original? **{verdict_words(report.verdict)}**: {cell(report.decided_by)}.\n\n"
        f"Measured on {cell(measured)}; {report.created[:10]}, run {cell(f'{report.recipe}/{report.run}')}.\n\n"
        f"Runtime of both models: {by or 'plain transformers'}."
    )


def _done(stages: list[StageRecord]) -> str:
    rows = []
    for record in stages:
        _, *settings = _without_folders(record.stage).items()
        rows.append([record.name, ", ".join(f"{key}: {value}" for key, value in settings if value is not None), at_run_time(record) or "-"])
    lines = [f"- {cell(f'{record.name}: {sentence}')}" for record in stages for sentence in record.sentences]
    return "\n\n".join(["## What was done", table(["stage", "settings", "in use"], rows), *(["\n".join(lines)] if lines else [])])


def _notes(report: Report) -> str:
    lines = [f"- {cell(note)}" for note in [*report.notes, *(f for side in report.sides for f in side.failures)]]
    return "## Notes\n\n" + "\n".join(lines) if lines else ""


def _provenance(origins: list[Origin]) -> str:
    rows = []
    for origin in origins:
        where = f"huggingface.co, revision {origin.source.revision or 'main'}"
        if origin.source.is_folder:
            where = f"a folder whose files have the fingerprint {digest(fingerprint(origin.source)['files'])}"
            if base := origin.stated("base_model"):
                where += f"; by its card made from {base}"
        licence = [str(value) for key in ("license", "license_name", "license_link") if (value := origin.stated(key))]
        unknown = "not stated" if origin.card is not None else "not stated, it has no card that could be read"
        rows.append([origin.role, origin.name, where, ", ".join(licence) or unknown])
    return "## Where it comes from\n\n" + table(["what", "model", "from", "licence by its own card"], rows)


def _without_folders(value: Any, key: str = "") -> Any:
    """Plain data of a recipe in which models and data that lie in folders go by their names."""
    if isinstance(value, dict):
        return {name: _without_folders(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return _name(value) if key in ("id", "source") and isinstance(value, str) else value
