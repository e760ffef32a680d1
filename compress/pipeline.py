"""The order of events: a recipe is refused or accepted, the smaller model made, both models measured, the verdict written."""

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress import data, methods, model
from compress.benchmark import isolate, machine
from compress.benchmark.outputs import Outputs
from compress.benchmark.statistics import corpus_value
from compress.errors import DataError, DeviceError, InputError, MissingPackage, ModelError, RunError
from compress.extras import install_line
from compress.forecast.beside import foretold
from compress.inspection.findings import Inspection
from compress.methods import Example, TrainSettings, TuneSettings, quiet
from compress.metrics import TASK
from compress.model import Source
from compress.nursery import copied, nursery
from compress.process import Child, Progress, Team, take_lock
from compress.recipe import Gate, Recipe, Stage, digest, load, load_gates
from compress.report import card, quality, verdict, why, write
from compress.report.turns import disturbances
from compress.results import Prediction, Report, Role, Side, StageRecord

OUTPUTS = Path("artifacts") / "outputs"  # below a run's `out`: what models made of examples
MEASURED_ROWS, MEASURED_TOKENS = 8, 64  # on which methods that need no data measure what layers lose
HEADLINE = ("rougeL", "perplexity", "accuracy")  # the metric by which single examples are ranked


@dataclass(frozen=True)
class Prepared:
    """What is to be measured: a recipe's smaller model with its baseline, or a model alone, and the examples.

    name     what the report calls the candidate
    commit   git's, of the recipe
    """

    recipe: Recipe
    baseline: Source | None
    candidate: Source
    name: str
    examples: list[Example]
    stages: list[StageRecord]
    commit: str | None = None


@nursery()
def run(
    recipe: Recipe | str | Path, out: str | Path = "reports", device: str = "auto", progress: Progress = quiet, processes: int = 1,
    strict: bool = False,
) -> Report:  # fmt: skip
    """Compress the recipe's model, measure both and write the report to `out`/<recipe>/<run>.

    processes   how many train together in stages that train; each step takes a batch from each. Everything else is done by one
    strict      refuse to measure on a GPU that another process uses

    Raises CompressError: InputError before anything is loaded where that can be seen, RunError where the work fails. A side that can't be
    measured to the end doesn't raise; the report has the reason and the verdict `cannot_tell`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    return measure([prepare(recipe, out, device, progress, processes)], out, device, progress, strict)[0]


def prepare(recipe: Recipe, out: str | Path, device: str = "auto", progress: Progress = quiet, processes: int = 1) -> Prepared:
    """The first half of a run: make the smaller model, or find it made. Raises CompressError."""
    refuse(recipe, device, processes)
    wanted, commit = recipe.model, machine.commit(recipe.folder)
    baseline = model.pinned(Source(model.locate(wanted.id, recipe.folder), wanted.task, wanted.dtype, wanted.revision))
    examples = data.examples(recipe.data, recipe.folder, "evaluation", recipe.data.samples, recipe.data.seed)
    with _place(recipe, Path(out)) as (_, log):
        stages = _stages(recipe, baseline, Path(out) / "artifacts", device, log, progress, processes)
    candidate = Source(str(Path(stages[-1].artifact).resolve()), wanted.task) if stages else baseline
    return Prepared(recipe, baseline, candidate, stages[-1].artifact if stages else wanted.id, examples, stages, commit)


def measure(
    prepared: Sequence[Prepared], out: str | Path, device: str = "auto", progress: Progress = quiet, strict: bool = False
) -> list[Report]:
    """The second half: measure, and write a report of each. Several take turns with one baseline; they have the same model, data, metrics,
    generation and benchmark. Raises CompressError.
    """
    with ExitStack() as stack:
        places, logs = zip(*(stack.enter_context(_place(one.recipe, Path(out))) for one in prepared), strict=True)
        reports = _measured(prepared, device, logs[0], progress, strict)
        written = [_written(report, one.commit, place) for one, report, place in zip(prepared, reports, places, strict=True)]
        for one, report in zip(prepared, written, strict=True):
            card.write(one.recipe, one.baseline or one.candidate, one.stages, report)
        return written


def bench(
    model_id: str, recipe: Recipe | str | Path, out: str | Path = "reports", device: str = "auto", progress: Progress = quiet,
    strict: bool = False,
) -> Report:  # fmt: skip
    """Measure one model, a folder or a hub id, as the recipe says. It stands in the report as the candidate, without a baseline.

    It is loaded as it is stored; the recipe's dtype and revision are for the recipe's own model.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    _require_packages(recipe)
    source, commit = model.pinned(Source(model.locate(model_id, Path()), recipe.model.task)), machine.commit(recipe.folder)
    examples = data.examples(recipe.data, recipe.folder, "evaluation", recipe.data.samples, recipe.data.seed)
    return measure([Prepared(recipe, None, source, model_id, examples, [], commit)], out, device, progress, strict)[0]


def check(report: Report, against: Report | None = None, gates: str | Path | None = None) -> Report:
    """The gates of a report's recipe again; with `against`, this report's candidate is held against that one's.

    gates   a YAML file of limits by metric, or the name of a shipped one, instead of the recipe's gates

    Raises ReportError when the two were not measured alike, RecipeError for mistakes in the file.
    """
    if gates is not None:
        limits = {metric: gate.model_dump() for metric, gate in load_gates(gates).items()}
        report = report.model_copy(update={"settings": {**report.settings, "check": limits}})
    if against is None:
        return _judged(report, report.side("baseline"), report.candidate, same_run=True)
    verdict.require_comparable(report, against)
    found = _judged(report, against.candidate.model_copy(update={"role": "baseline"}), report.candidate, same_run=False)
    return found.model_copy(update={"notes": [f"The baseline is the candidate of {against.folder}.", *found.notes]})


def inspect(
    model_id: str, task: str | None = None, device: str = "auto", batch_size: int = 1, tokens: int | None = None, progress: Progress = quiet
) -> Inspection:
    """Look at a model, a folder or a hub id: where its parameters are, how many are near zero, where the time of a forward pass goes.

    task      seq2seq, causal-lm or sequence-classification; None takes what the model's config says
    tokens    the length of each input, the decoder's too; None takes 128, or all that fit where the model has less room

    Raises CompressError.
    """
    for name, value in (("--batch-size", batch_size), ("--tokens", tokens)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: a number from 1 on is wanted")
    if task is not None and task not in model.AUTO:
        raise InputError(f"--task {task}: there is no such task; allowed are {', '.join(model.AUTO)}")
    source = model.pinned(Source(model.locate(model_id, Path()), task or ""))
    with tempfile.TemporaryDirectory() as folder, Child("compress.inspection.measure", Path(folder) / "log", progress) as child:
        found = child.ask("inspect", source=asdict(source), device=device, batch_size=batch_size, tokens=tokens)
    return Inspection.model_validate({"model": model_id, **found})


def refuse(recipe: Recipe, device: str, processes: int) -> None:
    """What can be seen to go wrong before anything is loaded."""
    if processes < 1:
        raise InputError(f"--processes {processes}: a number from 1 on is wanted")
    _require_packages(recipe)
    for stage in recipe.stages:
        method = methods.require(stage.family, stage.method, stage.settings)
        if device != "auto" and device not in method.ABOUT.devices:
            raise DeviceError(f"{stage} runs on {', '.join(method.ABOUT.devices)}, not on {device}")
        if stage.settings.sharded() and processes == 1:
            raise InputError(f"{stage}: shard: true splits models over processes, and there is one; give --processes 2, or leave shard out")
        for other in stage.settings.models().values():
            model.locate(other.id, recipe.folder)


def _require_packages(recipe: Recipe) -> None:
    """Raises MissingPackage where what measuring needs isn't there: lm_eval for its tasks, the C++ compiler that torch.compile calls."""
    compiler = os.environ.get("CXX", "g++")
    if recipe.benchmark.runtime.compile and shutil.which(compiler) is None:
        raise MissingPackage(
            f"benchmark.runtime.compile: torch.compile calls the C++ compiler {compiler}, which isn't here; install it "
            "(apt-get install g++), name another in the environment variable CXX, or leave compile out"
        )
    if any(group.startswith(TASK) for group in recipe.groups) and find_spec("lm_eval") is None:
        raise MissingPackage(f"metrics: lm_eval's tasks need lm-eval, not installed here. Install with: {install_line('lm_eval')}")


def usable(out: Path) -> None:
    """Raises InputError where reports can't be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: can't be written to: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise InputError(f"--out {out}: can't be written to")


@contextmanager
def _place(recipe: Recipe, out: Path) -> Iterator[tuple[Path, Path]]:
    """reports/<recipe>/<run> for the report, and a log beside it for what the working processes print.

    The log is kept only when the run fails, and the error then names it.
    """
    place = out / recipe.name / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    log = place.with_name(f"{place.name}.log")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        log.touch()  # what can't be written to is said now
    except OSError as error:
        raise InputError(f"--out {out}: can't be written to: {error.strerror}") from None
    keep = False
    try:
        yield place, log
    except RunError as error:
        keep = log.exists() and log.stat().st_size > 0
        raise type(error)(f"{error}; the log is {log}" if keep else str(error)) from None
    finally:
        if not keep:
            log.unlink(missing_ok=True)


def _stages(
    recipe: Recipe, source: Source, artifacts: Path, device: str, log: Path, progress: Progress, processes: int = 1
) -> list[StageRecord]:
    """Make the artifact of every stage, or find it made.

    An artifact's name holds the digest of all that went into it: the model's content, every stage so far with its code, the calibration
    examples, the versions of what it was made with, how many processes trained where they were several. So recipes that share a beginning
    share its artifacts.
    """
    original = source
    records: list[StageRecord] = []
    name = Path(source.id).name if source.is_folder else source.id.rsplit("/", 1)[-1]
    history: list[Any] = [model.fingerprint(source), device]
    for stage in recipe.stages:
        method = methods.find(stage.family, stage.method)
        seen, max_tokens = _seen(stage, recipe)
        if seen:
            history.append([data.examples_digest(seen), max_tokens, recipe.data.chat])
        watched = _watched(stage, recipe)
        if watched:
            history.append(data.examples_digest(watched))
        others = {
            role: model.pinned(Source(model.locate(other.id, recipe.folder), source.task, other.dtype, other.revision, other.bits))
            for role, other in stage.settings.models().items()
        }
        history.extend([role, model.fingerprint(other)] for role, other in others.items())
        history.append([stage.as_written(), methods.made_with(method)])
        together = processes if method.ABOUT.trains else 1
        if together > 1:  # a step takes so many times the examples
            history.append({"processes": together})
        target = artifacts / f"{name}-{stage.method}-{digest(history)}"
        start, reused = time.monotonic(), _is_whole(target)
        if not reused:
            models = {"original": original, **others}
            shown = {
                "examples": [asdict(e) for e in seen], "validation": [asdict(e) for e in watched], "max_tokens": max_tokens,
                "chat": recipe.data.chat,
            }  # fmt: skip
            _make(stage, source, models, shown, target, device, log, progress, together)
        seconds = time.monotonic() - start
        noted = write.read_notes(target)
        records.append(StageRecord(stage=stage.as_written(), artifact=str(target), seconds=seconds, reused=reused, **noted))
        card.write(recipe, original, records)
        source = Source(str(target.resolve()), source.task)
    return records


def _seen(stage: Stage, recipe: Recipe) -> tuple[list[Example], int]:
    """The examples of the train split that a stage is shown, and how many tokens of each: a few beginnings where they only measure."""
    about = methods.find(stage.family, stage.method).ABOUT
    wanted = stage.settings if isinstance(stage.settings, TrainSettings) else recipe.calibration
    if about.calibrated or stage.settings.needs_examples():
        return data.examples(recipe.data, recipe.folder, "train", wanted.samples, wanted.seed), wanted.max_tokens
    few, short = min(wanted.samples or MEASURED_ROWS, MEASURED_ROWS), min(wanted.max_tokens, MEASURED_TOKENS)
    if about.measured:
        with suppress(DataError):  # there is no such split, and it isn't needed
            return data.examples(recipe.data, recipe.folder, "train", few, wanted.seed), short
    return [], short


def _watched(stage: Stage, recipe: Recipe) -> list[Example]:
    """The examples of the validation split that early stopping looks at."""
    settings = stage.settings
    if not isinstance(settings, TuneSettings) or settings.early_stopping is None:
        return []
    return data.examples(recipe.data, recipe.folder, "validation", settings.early_stopping.samples, settings.seed)


def _is_whole(artifact: Path) -> bool:
    """Whether an artifact is there to be used again; a damaged one is put away."""
    if not artifact.exists():
        return False
    try:
        model.check_folder(artifact)
    except ModelError:
        shutil.rmtree(artifact) if artifact.is_dir() else artifact.unlink()
        return False
    return True


def _make(
    stage: Stage, source: Source, models: dict[str, Source], shown: dict[str, Any], target: Path, device: str, log: Path,
    progress: Progress, processes: int = 1,
) -> None:  # fmt: skip
    written = {"family": stage.family, "method": stage.method, "settings": stage.settings.model_dump(mode="json")}
    scratch = target.with_name(f".{target.name}.scratch")  # a stage that was killed finds its checkpoints there
    alone = processes == 1
    with _one_at_a_time(target, progress):
        if _is_whole(target):  # another run made it meanwhile
            return
        with Child("compress.stage", log, progress, start=copied) if alone else Team("compress.stage", log, progress, processes) as worker:
            worker.ask(
                "run", source=asdict(source), stage=written, shown=shown, target=str(target), scratch=str(scratch), device=device,
                cache=str(target.parent / "teachers"), models={role: asdict(other) for role, other in models.items()}, processes=processes,
            )  # fmt: skip
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _one_at_a_time(target: Path, progress: Progress) -> Iterator[None]:
    """Runs that make the same artifact would write each other's checkpoints: the second waits. The kernel lets go where one is killed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    while True:
        with lock.open("a") as file:
            take_lock(file, "run that makes the same", progress)
            if not lock.exists() or lock.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue  # it was another's, who removed it
            try:
                yield
            finally:
                for partial in target.parent.glob(f".{target.name}.*.partial"):  # a killed process could not tidy up after itself
                    shutil.rmtree(partial, ignore_errors=True)
                lock.unlink(missing_ok=True)
            return


def _measured(prepared: Sequence[Prepared], device: str, log: Path, progress: Progress, strict: bool) -> list[Report]:
    first = prepared[0]
    baseline: list[tuple[Role, Source]] = [] if first.baseline is None else [("baseline", first.baseline)]
    sources = [*baseline, *(("candidate", one.candidate) for one in prepared)]

    def clear(sides: list[Side]) -> bool:
        candidates = zip(prepared, sides[len(baseline) :], strict=True)
        return all(verdict.is_clear(one.recipe.check, [*sides[: len(baseline)], side]) for one, side in candidates)

    found, environment = isolate.measure(
        sources, first.recipe, first.examples, device, log, log.parent.parent / OUTPUTS, progress, clear, strict
    )
    return [_reported(one, measured, environment) for one, measured in zip(prepared, found, strict=True)]


def _reported(one: Prepared, measured: isolate.Measured, environment: dict[str, Any]) -> Report:
    recipe = one.recipe
    names = {"baseline": recipe.model.id, "candidate": one.name}
    sources = {"baseline": one.baseline or one.candidate, "candidate": one.candidate}
    sides = {
        side.role: side.model_copy(
            update={
                "model": names[side.role],
                "measurements": [*side.measurements, *foretold(side, sources[side.role], recipe, environment.get("device", "cpu"))],
            }
        )
        for side in measured.sides
    }
    score = next((name for name in HEADLINE if any(name in o["samples"] for o in measured.outputs.values())), None)
    report = Report(
        recipe=recipe.name, run="", created=datetime.now(UTC).isoformat(timespec="seconds"),
        digest=recipe.digest,
        examples_digest=data.examples_digest(one.examples), settings=recipe.as_written(), environment=environment, stages=one.stages,
        sides=list(sides.values()), turns=measured.turns,
        verdict="cannot_tell", decided_by="", score=score, predictions=_predictions(one.examples, measured.outputs, score),
    )  # fmt: skip
    return _judged(report, sides.get("baseline"), sides["candidate"], same_run=True)


def _written(report: Report, commit: str | None, place: Path) -> Report:
    """The report in its place, with what git says of its recipe."""
    return write.write(report.model_copy(update={"run": place.name, "environment": {**report.environment, "commit": commit}}), place)


def _judged(report: Report, baseline: Side | None, candidate: Side, same_run: bool) -> Report:
    """The report with comparisons, gates, verdict and explanations for these two sides."""
    limits = {metric: Gate.model_validate(gate) for metric, gate in report.settings["check"].items()}
    compared = verdict.pairs(baseline, candidate, same_run) if baseline else []
    level = report.confidence
    gates = verdict.gates(limits, compared, baseline, candidate, level)
    sides = [side for side in (baseline, candidate) if side]
    decision, reason = verdict.decide(gates, [failure for side in sides for failure in side.failures])
    comparisons = [verdict.compare(pair, level) for pair in compared]
    return report.model_copy(
        update={
            "sides": sides, "comparisons": comparisons, "gates": gates, "verdict": decision, "decided_by": reason,
            "notes": [
                *why.notes(report.stages, comparisons, gates, report.environment, sides), *quality.notes(sides, compared),
                *disturbances(report.turns),
            ],
        }
    )  # fmt: skip


def _predictions(examples: Sequence[Example], outputs: dict[Role, Outputs], score: str | None) -> list[Prediction]:
    found = []
    for index, example in enumerate(examples):
        row: dict[str, Any] = asdict(example)
        for role, output in outputs.items():
            row[role] = output["texts"][index] if output["texts"] is not None else None
            if score is not None:
                row[f"{role}_score"] = corpus_value(score, [output["samples"][score][index]])
        found.append(Prediction(**row))
    return found
