"""The order of events: a recipe is refused or accepted, the smaller model made, both models measured, the verdict written."""

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress import data, decoding, methods, model, preflight
from compress.benchmark import isolate, machine
from compress.benchmark.outputs import Outputs
from compress.benchmark.statistics import corpus_value
from compress.errors import DataError, DeviceError, InputError, ModelError, RunError
from compress.forecast.beside import foretold
from compress.inspection.findings import Inspection
from compress.methods import Example, TrainSettings, TuneSettings, quiet
from compress.metrics import COMPARED, GENERATED
from compress.model import Source
from compress.nursery import copied, nursery
from compress.phases import Phase, merged, phase, watching
from compress.process import Child, Progress, Team, take_lock
from compress.recipe import Gate, Recipe, Stage, digest, load, load_gates
from compress.report import card, quality, verdict, why, write
from compress.report.turns import disturbances
from compress.results import Cut, Prediction, Report, Role, Side, Split, StageRecord
from compress.scripts import shares

OUTPUTS = Path("artifacts") / "outputs"  # below a run's `out`: what models made of examples
MEASURED_ROWS, MEASURED_TOKENS = 8, 64  # on which methods that need no data measure what layers lose
HEADLINE = ("rougeL", "divergence", "perplexity", "accuracy", "chrf", "cer", "exact_match")  # single examples are ranked by


@dataclass(frozen=True)
class Prepared:
    """What is to be measured: a recipe's smaller model with its baseline, or a model alone, and the examples.

    name     what the report calls the candidate
    commit   git's, of the recipe
    splits   what was read of the data
    phases   where the time for it went
    """

    recipe: Recipe
    baseline: Source | None
    candidate: Source
    name: str
    examples: list[Example]
    stages: list[StageRecord]
    commit: str | None = None
    splits: list[Split] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)


@dataclass(frozen=True)
class Shown:
    """What a stage is shown of the data.

    examples     of the train split
    validation   what early stopping looks at
    max_tokens   each example's longest input
    """

    examples: list[Example]
    validation: list[Example]
    max_tokens: int
    chat: bool


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
    with watching() as watch:
        refuse(recipe, device, processes)
        wanted, commit = recipe.model, machine.commit(recipe.folder)
        baseline = model.pinned(Source(model.locate(wanted.id, recipe.folder), wanted.task, wanted.dtype, wanted.revision))
        _refuse_generation(recipe, baseline)
        _refuse_chat(recipe, baseline, progress)
        with phase("data"):
            dataset = data.Dataset(recipe.data, recipe.folder)
            examples = dataset.examples("evaluation", recipe.data.samples, recipe.data.seed)
            shown = _shown(recipe, dataset)
            splits = dataset.splits()
            del dataset  # with all of its rows
        with _place(recipe, Path(out)) as (_, log):
            stages = _stages(recipe, baseline, Path(out) / "artifacts", device, log, progress, processes, shown)
    candidate = Source(str(Path(stages[-1].artifact).resolve()), wanted.task) if stages else baseline
    name = stages[-1].artifact if stages else wanted.id
    return Prepared(_decided(recipe, examples), baseline, candidate, name, examples, stages, commit, splits, watch.phases())


def measure(
    prepared: Sequence[Prepared], out: str | Path, device: str = "auto", progress: Progress = quiet, strict: bool = False
) -> list[Report]:
    """The second half: measure, and write a report of each. Several take turns with one baseline; they have the same model, data, metrics,
    generation and benchmark; each report tells where the time of all of them went. Raises CompressError.
    """
    with ExitStack() as stack:
        watch = stack.enter_context(watching())
        places, logs = zip(*(stack.enter_context(_place(one.recipe, Path(out))) for one in prepared), strict=True)
        reports = _measured(prepared, device, logs[0], progress, strict)
        with phase("report"):
            written = [
                _written(report, one.commit, place, lambda own=one.phases: merged(own, watch.phases()))  # type: ignore[misc]
                for one, report, place in zip(prepared, reports, places, strict=True)
            ]
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
    preflight.look(recipe, stages=False).end()
    source, commit = model.pinned(Source(model.locate(model_id, Path()), recipe.model.task)), machine.commit(recipe.folder)
    _refuse_generation(recipe, source)
    _refuse_chat(recipe, source, progress)
    dataset = data.Dataset(recipe.data, recipe.folder)
    examples = dataset.examples("evaluation", recipe.data.samples, recipe.data.seed)
    alone = Prepared(_decided(recipe, examples), None, source, model_id, examples, [], commit, dataset.splits())
    return measure([alone], out, device, progress, strict)[0]


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
    preflight.look(recipe).end()
    for stage in recipe.stages:
        method = methods.find(stage.family, stage.method)
        if device != "auto" and device not in method.ABOUT.devices:
            raise DeviceError(f"{stage} runs on {', '.join(method.ABOUT.devices)}, not on {device}")
        if stage.settings.sharded() and processes == 1:
            raise InputError(f"{stage}: shard: true splits models over processes, and there is one; give --processes 2, or leave shard out")


def _decided(recipe: Recipe, examples: Sequence[Example]) -> Recipe:
    """The recipe with the tokenizers that the references call for, which both sides' texts are then cut with."""
    return recipe.decided_by([example.references for example in examples])


def _refuse_generation(recipe: Recipe, source: Source) -> None:
    """Raises ModelError where texts are to be written and the model's generation config says what can't be done."""
    if GENERATED & set(recipe.groups):
        decoding.check(source, sampled=recipe.generation.do_sample and recipe.generation.temperature is None)


def _refuse_chat(recipe: Recipe, source: Source, progress: Progress) -> None:
    """Raises DataError where prompts are a user's turns and the model's chat template can't serve, in a working process."""
    if not recipe.data.chat:
        return
    with tempfile.TemporaryDirectory() as folder, Child("compress.prompts", Path(folder) / "log", progress, start=copied) as child:
        child.ask("look", source=asdict(source))


def _cut(measured: isolate.Measured, recipe: Recipe, examples: int) -> Cut | None:
    """How many prompts of the evaluation were cut, on the side where they were most; None where nothing limits them."""
    most = max(measured.outputs.values(), key=lambda output: int(output["cut"]), default=None)
    if most is None or most["limit"] is None:
        return None
    key = "data.max_tokens" if most["limit"] == recipe.data.max_tokens else None
    return Cut(where="the evaluation", cut=most["cut"], all=examples, limit=most["limit"], key=key)


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
    recipe: Recipe, source: Source, artifacts: Path, device: str, log: Path, progress: Progress, processes: int = 1,
    shown: Sequence[Shown] | None = None,
) -> list[StageRecord]:  # fmt: skip
    """Make the artifact of every stage, or find it made. Each is `shown` its examples, which are read now where there are none.

    An artifact's name holds the digest of all that went into it: the model's content, every stage so far with its code, the calibration
    examples, the versions of what it was made with, how many processes trained where they were several. So recipes that share a beginning
    share its artifacts.
    """
    original = source
    records: list[StageRecord] = []
    name = Path(source.id).name if source.is_folder else source.id.rsplit("/", 1)[-1]
    history: list[Any] = [model.fingerprint(source), device]
    shown = _shown(recipe, data.Dataset(recipe.data, recipe.folder)) if shown is None else shown
    for stage, seen in zip(recipe.stages, shown, strict=True):
        method = methods.find(stage.family, stage.method)
        if seen.examples:
            history.append([data.examples_digest(seen.examples), seen.max_tokens, seen.chat])
        if seen.validation:
            history.append(data.examples_digest(seen.validation))
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
        if reused:
            progress(f"{stage}; made before", 1, 1)
        else:
            models = {"original": original, **others}
            with phase("stages"):
                _make(stage, source, models, asdict(seen), target, device, log, progress, together)
        seconds = time.monotonic() - start
        noted = write.read_notes(target)
        record = StageRecord(stage=stage.as_written(), artifact=str(target), seconds=seconds, reused=reused, **noted)
        key = "the stage's max_tokens" if isinstance(stage.settings, TrainSettings) else "calibration.max_tokens"
        records.append(record.model_copy(update={"cut": write.read_cut(target, record.name, key)}))
        card.write(recipe, original, records)
        source = Source(str(target.resolve()), source.task)
    return records


def _shown(recipe: Recipe, dataset: data.Dataset) -> list[Shown]:
    """The examples of every stage, drawn as its settings or the recipe's calibration block say; few beginnings where they only measure."""
    shown = []
    for stage in recipe.stages:
        settings, about = stage.settings, methods.find(stage.family, stage.method).ABOUT
        wanted = settings if isinstance(settings, TrainSettings) else recipe.calibration
        max_tokens, seen, watched = wanted.max_tokens, list[Example](), list[Example]()
        if stage.needs_examples:
            seen = dataset.examples("train", wanted.samples, wanted.seed)
        elif about.measured:
            max_tokens = min(max_tokens, MEASURED_TOKENS)
            with suppress(DataError):  # there is no such split, and it isn't needed
                seen = dataset.examples("train", min(wanted.samples or MEASURED_ROWS, MEASURED_ROWS), wanted.seed)
        if isinstance(settings, TuneSettings) and settings.early_stopping is not None:
            watched = dataset.examples("validation", settings.early_stopping.samples, settings.seed)
        shown.append(Shown(seen, watched, max_tokens, recipe.data.chat))
    return shown


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
    with phase("judging"):
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
    if COMPARED & set(recipe.groups):
        tokenizers, scripts = recipe.tokenizers, shares([example.references for example in one.examples])
        environment = {
            **environment, "rouge_tokenizer": tokenizers.rouge, "bleu_tokenizer": tokenizers.bleu, "reference_scripts": scripts,
        }  # fmt: skip
    score = next((name for name in HEADLINE if any(name in o["samples"] for o in measured.outputs.values())), None)
    report = Report(
        recipe=recipe.name, run="", created=datetime.now(UTC).isoformat(timespec="seconds"),
        digest=recipe.digest,
        examples_digest=data.examples_digest(one.examples), settings=recipe.as_written(), environment=environment, stages=one.stages,
        sides=list(sides.values()), splits=data.compared(one.splits), turns=measured.turns,
        verdict="cannot_tell", decided_by="", cut=_cut(measured, recipe, len(one.examples)), score=score,
        predictions=_predictions(one.examples, measured.outputs, score),
    )  # fmt: skip
    return _judged(report, sides.get("baseline"), sides["candidate"], same_run=True)


def _written(report: Report, commit: str | None, place: Path, phases: Callable[[], list[Phase]]) -> Report:
    """The report in its place, with what git says of its recipe."""
    return write.write(
        report.model_copy(update={"run": place.name, "environment": {**report.environment, "commit": commit}}), place, phases
    )


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
                *why.notes(report.stages, comparisons, report.environment, sides, gates),
                *quality.notes(sides, compared, [example.id for example in report.predictions], report.environment),
                *quality.left_out(report.splits),
                *disturbances(report.turns),
            ],
        }
    )  # fmt: skip


def _predictions(examples: Sequence[Example], outputs: dict[Role, Outputs], score: str | None) -> list[Prediction]:
    windows = next((output["windows"] for output in outputs.values() if output["windows"] is not None), None)
    if windows is not None:  # what counts as an example where texts are joined
        examples = [Example(f"window {number}", text, []) for number, text in enumerate(windows, 1)]
    found = []
    for index, example in enumerate(examples):
        row: dict[str, Any] = {"id": example.id, "prompt": example.prompt, "references": example.references}
        for role, output in outputs.items():
            row[role] = output["texts"][index] if output["texts"] is not None else None
            if score is not None and isinstance(sample := output["samples"][score][index], list):
                row[f"{role}_score"] = corpus_value(score, [sample])
        found.append(Prediction(**row))
    return found
