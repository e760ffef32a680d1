"""The order of events: a recipe is refused or accepted, the smaller model made, both models measured, the verdict written."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress import data, methods, model
from compress.benchmark import isolate
from compress.benchmark.statistics import corpus_value
from compress.errors import DeviceError
from compress.model import Source
from compress.process import Child, Progress
from compress.recipe import Gate, Recipe, Stage, digest, load
from compress.report import verdict, why, write
from compress.results import Example, Report, Role, Side, StageRecord

HEADLINE = ("rougeL", "perplexity", "accuracy")  # the metric by which single examples are ranked


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def run(recipe: Recipe | str | Path, out: str | Path = "reports", device: str = "auto", progress: Progress = quiet) -> Report:
    """Compress the recipe's model, measure both and write the report to `out`/<recipe>/<run>.

    Raises CompressError: InputError before anything is loaded where that can be seen, RunError where the work fails. A side that can't be
    measured to the end doesn't raise; the report has the reason and the verdict `cannot_tell`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    _refuse(recipe, device)
    wanted = recipe.model
    baseline = Source(model.locate(wanted.id, recipe.folder), wanted.task, wanted.dtype, wanted.revision)
    examples = data.examples(recipe.data, recipe.folder, "evaluation", recipe.data.samples, recipe.data.seed)
    place = _place(recipe, Path(out))
    log = _log(place)
    stages = _stages(recipe, baseline, Path(out) / "artifacts", device, log, progress)
    candidate = Source(stages[-1].artifact if stages else baseline.id, recipe.model.task, "auto" if stages else baseline.dtype)
    report = _measured({"baseline": baseline, "candidate": candidate}, recipe, examples, stages, device, log, progress)
    return _written(report, place, log)


def bench(
    model_id: str, recipe: Recipe | str | Path, out: str | Path = "reports", device: str = "auto", progress: Progress = quiet
) -> Report:
    """Measure one model, a folder or a hub id, as the recipe says. It stands in the report as the candidate, without a baseline.

    It is loaded as it is stored; the recipe's dtype and revision are for the recipe's own model.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    examples = data.examples(recipe.data, recipe.folder, "evaluation", recipe.data.samples, recipe.data.seed)
    source = Source(model.locate(model_id, Path()), recipe.model.task)
    place = _place(recipe, Path(out))
    log = _log(place)
    return _written(_measured({"candidate": source}, recipe, examples, [], device, log, progress), place, log)


def check(report: Report, against: Report | None = None) -> Report:
    """The gates of a report's recipe again; with `against`, this report's candidate is held against that one's.

    Raises ReportError when the two were measured on different examples.
    """
    candidate = report.side("candidate")
    assert candidate is not None, "a report always has a candidate"
    baseline = report.side("baseline")
    if against is not None:
        verdict.require_same_examples(report, against)
        other = against.side("candidate")
        assert other is not None, "a report always has a candidate"
        baseline = other.model_copy(update={"role": "baseline"})
    return _judged(report, baseline, candidate, paired=against is None)


def _refuse(recipe: Recipe, device: str) -> None:
    """What can be seen to go wrong before anything is loaded."""
    for stage in recipe.stages:
        method = methods.require(stage.family, stage.method)
        if device != "auto" and device not in method.ABOUT.devices:
            raise DeviceError(f"{stage} runs on {', '.join(method.ABOUT.devices)}, not on {device}")


def _place(recipe: Recipe, out: Path) -> Path:
    """reports/<recipe>/<run>; a run is named by its time and its recipe's digest."""
    return out / recipe.name / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{recipe.digest[:6]}"


def _log(place: Path) -> Path:
    """Where working processes write what they have to say; kept only when the run fails."""
    place.parent.mkdir(parents=True, exist_ok=True)
    return place.with_name(f"{place.name}.log")


def _stages(recipe: Recipe, source: Source, artifacts: Path, device: str, log: Path, progress: Progress) -> list[StageRecord]:
    """Make the artifact of every stage, or find it made. An artifact's name holds the digest of all that went into it."""
    records: list[StageRecord] = []
    history: list[Any] = [model.fingerprint(source)]
    for stage in recipe.stages:
        method = methods.find(stage.family, stage.method)
        history.append([stage.as_written(), digest(methods.source(method).hex())])
        target = artifacts / f"{recipe.name}-{stage.method}-{digest(history)}"
        start, reused = time.monotonic(), target.is_dir()
        if not reused:
            _make(stage, source, target, device, log, progress)
        seconds = time.monotonic() - start
        records.append(StageRecord(stage=stage.as_written(), artifact=str(target), seconds=seconds, reused=reused))
        source = Source(str(target.resolve()), source.task)
    return records


def _make(stage: Stage, source: Source, target: Path, device: str, log: Path, progress: Progress) -> None:
    written = {"family": stage.family, "method": stage.method, "settings": stage.settings.model_dump(mode="json")}
    with Child("compress.stage", log, progress) as child:
        child.ask("run", source=asdict(source), stage=written, target=str(target), device=device)


def _measured(
    sources: dict[Role, Source], recipe: Recipe, examples: list[data.Example], stages: list[StageRecord], device: str, log: Path,
    progress: Progress,
) -> Report:  # fmt: skip
    sides, outputs, environment = isolate.measure(sources, recipe, examples, device, log, progress)
    score = next((name for name in HEADLINE if any(name in o["samples"] for o in outputs.values())), None)
    report = Report(
        recipe=recipe.name, run="", created=datetime.now(UTC).isoformat(timespec="seconds"), digest=recipe.digest,
        examples_digest=data.examples_digest(examples), recipe_text=recipe.text, settings=recipe.as_written(),
        environment=environment, stages=stages, sides=sides, verdict="pass", decided_by="", score=score,
        examples=_examples(examples, outputs, score),
    )  # fmt: skip
    by_role = {side.role: side for side in sides}
    return _judged(report, by_role.get("baseline"), by_role["candidate"], paired=True)


def _judged(report: Report, baseline: Side | None, candidate: Side, paired: bool) -> Report:
    """The report with comparisons, gates, verdict and explanations for these two sides."""
    limits = {metric: Gate.model_validate(gate) for metric, gate in report.settings["check"].items()}
    if baseline is None:  # only limits on the model itself can be checked
        limits = {m: verdict.absolute_part(gate) for m, gate in limits.items() if gate.min is not None or gate.max is not None}
    compared = verdict.comparisons(baseline, candidate, paired) if baseline else []
    gates = verdict.gates(limits, compared, candidate)
    failures = [failure for side in (baseline, candidate) if side for failure in side.failures]
    decision, reason = verdict.decide(gates, failures)
    return report.model_copy(
        update={
            "sides": [side for side in (baseline, candidate) if side], "comparisons": compared, "gates": gates, "verdict": decision,
            "decided_by": reason, "notes": why.notes(report.stages, compared),
        }
    )  # fmt: skip


def _examples(examples: Sequence[data.Example], outputs: dict[Role, isolate.Outputs], score: str | None) -> list[Example]:
    found = []
    for index, example in enumerate(examples):
        row: dict[str, Any] = asdict(example)
        for role, output in outputs.items():
            row[role] = output["texts"][index] if output["texts"] is not None else None
            if score is not None:
                row[f"{role}_score"] = corpus_value(score, [output["samples"][score][index]])
        found.append(Example(**row))
    return found


def _written(report: Report, place: Path, log: Path) -> Report:
    written = write.write(report.model_copy(update={"run": place.name}), place)
    if not any(side.failures for side in report.sides):
        log.unlink(missing_ok=True)
    return written
