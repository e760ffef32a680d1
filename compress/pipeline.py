"""The order of events: a recipe is refused or accepted, the smaller model made, both models measured, the verdict written."""

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from compress import artifacts, border, data, decoding, exports, judgement, methods, preflight
from compress.benchmark import isolate, machine
from compress.errors import DeviceError, InputError, ModelError, RunError
from compress.execution import Execution
from compress.inspection.findings import Inspection
from compress.judgement import Prepared
from compress.methods import Example, quiet
from compress.metrics import GENERATED
from compress.model.loading import AUTO
from compress.model.source import Source, locate, pinned
from compress.nursery import copied, nursery
from compress.phases import Phase, merged, phase, watching
from compress.process import Child, Progress
from compress.recipe import PLAIN, ChosenEngine, Recipe, load, load_gates
from compress.report import card, verdict, write
from compress.requests import Inspect, SeeTemplate
from compress.results.report import Report
from compress.results.sides import Side

OUTPUTS = Path("artifacts") / "outputs"  # below a run's `out`: what models made of examples


@nursery()
def run(
    recipe: Recipe | str | Path, out: str | Path = "reports", device: str = "auto", progress: Progress = quiet, processes: int = 1,
    strict: bool = False,
) -> Report:  # fmt: skip
    """Compress the recipe's model, measure both and write the report to `out`/<recipe>/<run>.

    processes   how many train together in stages that train; a step takes a batch from each. Everything else runs in a single process
    strict      refuse to measure on a GPU that another process uses

    Raises CompressError: InputError before anything is loaded where a mistake shows by then, RunError where the work fails. A side that
    can't be measured to the end doesn't raise; the report has the reason and the verdict `cannot_tell`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    execution = Execution(device, progress=progress, strict=strict)
    prepared = [prepare(recipe.in_engine(engine), out, execution, processes) for engine in recipe.engines]
    if len(prepared) == 1:
        return measure(prepared, out, execution)[0]
    return _in_engines(recipe, prepared, Path(out), execution)


def prepare(recipe: Recipe, out: str | Path, execution: Execution, processes: int = 1) -> Prepared:
    """The first half of a run: make the smaller model, or reuse it, and convert both to the format of the recipe's first engine.

    Raises CompressError.
    """
    with watching() as watch:
        refuse(recipe, execution.device, processes)
        model, commit = recipe.model, machine.commit(recipe.folder)
        baseline = pinned(Source(locate(model.id, recipe.folder), model.task, model.dtype, model.revision))
        _refuse_generation(recipe, baseline)
        _refuse_chat(recipe, baseline, execution.progress)
        with phase("data"):
            dataset = data.Dataset(recipe.data, recipe.folder)
            examples = dataset.examples("evaluation", recipe.data.samples, recipe.data.seed)
            carried = artifacts.carried(recipe)
            lines = [recipe.with_stages(stages) for stages in (carried.candidate, carried.baseline)]
            shown = [artifacts.shown_to_stages(line, dataset) for line in lines]
            splits = dataset.splits()
            del dataset  # with all of its rows
        with _place(recipe, Path(out)) as (_, log):
            how = (Path(out) / "artifacts", replace(execution, log=log), processes)
            stages, plain = (artifacts.make(line, baseline, *how, seen) for line, seen in zip(lines, shown, strict=True))
    candidate = Source(str(Path(stages[-1].artifact).resolve()), model.task) if stages else baseline
    original = None if recipe.engine.is_plain else baseline
    if plain:
        baseline = Source(str(Path(plain[-1].artifact).resolve()), model.task)
    name = stages[-1].artifact if stages else model.id
    return Prepared(_decided(recipe, examples), baseline, candidate, name, examples, stages, commit, splits, watch.phases(), original)


def measure(prepared: Sequence[Prepared], out: str | Path, execution: Execution) -> list[Report]:
    """The second half: measure, and write a report of each candidate.

    Several candidates take turns with one baseline; they share model, data, metrics, generation and benchmark. Each report says where the
    time of all of them went. Raises CompressError.
    """
    with ExitStack() as stack:
        watch = stack.enter_context(watching())
        places, logs = zip(*(stack.enter_context(_place(job.recipe, Path(out))) for job in prepared), strict=True)
        reports = _measured(prepared, replace(execution, log=logs[0]))
        with phase("report"):
            written = [
                _written(report, job.commit, place, lambda own=job.phases: merged(own, watch.phases()))  # type: ignore[misc]
                for job, report, place in zip(prepared, reports, places, strict=True)
            ]
        for job, report in zip(prepared, written, strict=True):
            card.write(job.recipe, job.baseline or job.candidate, job.stages, report)
        return written


def _in_engines(recipe: Recipe, prepared: Sequence[Prepared], out: Path, execution: Execution) -> Report:
    """One report of a recipe's engines, measured in turns: the first engine's, which contains the others'."""
    with ExitStack() as stack:
        watch = stack.enter_context(watching())
        place, log = stack.enter_context(_place(recipe, out))
        first, *others = _measured(prepared, replace(execution, log=log))
        whole = first.model_copy(update={"others": others, "settings": recipe.as_written(), "digest": recipe.digest})
        spent = [job.phases for job in prepared]
        with phase("report"):
            report = _written(whole, prepared[0].commit, place, lambda: merged(*spent, watch.phases()))
        for job, part in zip(prepared, report.parts, strict=True):
            card.write(job.recipe, job.baseline or job.candidate, job.stages, part)
        return report


def bench(
    model_id: str, recipe: Recipe | str | Path, out: str | Path = "reports", device: str = "auto", progress: Progress = quiet,
    strict: bool = False,
) -> Report:  # fmt: skip
    """Measure a single model, a folder or a hub id, as the recipe says. The report has it as the candidate, without a baseline.

    It is loaded as stored; the recipe's dtype and revision are for the recipe's own model.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    execution = Execution(device, progress=progress, strict=strict)
    preflight.look(recipe, stages=False).end()
    source, commit = pinned(Source(locate(model_id, Path()), recipe.model.task)), machine.commit(recipe.folder)
    _refuse_generation(recipe, source)
    _refuse_chat(recipe, source, progress)
    dataset = data.Dataset(recipe.data, recipe.folder)
    examples = dataset.examples("evaluation", recipe.data.samples, recipe.data.seed)
    line = recipe.with_stages(() if _is_exported(source, recipe.engine) else artifacts.carried(recipe.with_stages(())).candidate)
    if line.stages:
        with _place(recipe, Path(out)) as (_, log):
            shown = artifacts.shown_to_stages(line, dataset)
            records = artifacts.make(line, source, Path(out) / "artifacts", replace(execution, log=log), shown=shown)
        source = Source(str(Path(records[-1].artifact).resolve()), source.task)
    prepared = Prepared(_decided(recipe, examples), None, source, model_id, examples, [], commit, dataset.splits())
    return measure([prepared], out, execution)[0]


def check(report: Report, against: Report | None = None, gates: str | Path | None = None) -> Report:
    """Apply the gates of a report's recipe again; with `against`, its candidate is compared with the candidate of that report.

    gates   a YAML file of limits by metric, or the name of a shipped one, instead of the recipe's gates

    Raises ReportError where the two were not measured alike, RecipeError for mistakes in the file.
    """
    if gates is not None:
        limits = {metric: gate.model_dump() for metric, gate in load_gates(gates).items()}
        report = report.model_copy(update={"settings": {**report.settings, "check": limits}})
    if against is None:
        return judgement.judged(report, report.side("baseline"), report.candidate, same_run=True)
    verdict.require_comparable(report, against)
    judged = judgement.judged(report, against.candidate.model_copy(update={"role": "baseline"}), report.candidate, same_run=False)
    return judged.model_copy(update={"notes": [f"The baseline is the candidate of {against.folder}.", *judged.notes]})


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
            raise InputError(f"{name} {value}: must be 1 or more")
    if task is not None and task not in AUTO:
        raise InputError(f"--task {task}: there is no such task; allowed are {', '.join(AUTO)}")
    source = pinned(Source(locate(model_id, Path()), task or ""))
    with tempfile.TemporaryDirectory() as folder, Child("compress.inspection.measure", Path(folder) / "log", progress) as child:
        findings = border.ask(child, Inspect(source, device, batch_size, tokens))
    return Inspection.model_validate({"model": model_id, **findings})


def refuse(recipe: Recipe, device: str, processes: int) -> None:
    """Raise the mistakes that show before anything is loaded, as InputError."""
    if processes < 1:
        raise InputError(f"--processes {processes}: must be 1 or more")
    preflight.look(recipe).end()
    for stage in recipe.stages:
        method = methods.find(stage.family, stage.method)
        if device != "auto" and device not in method.ABOUT.devices:
            raise DeviceError(f"{stage} runs on {', '.join(method.ABOUT.devices)}, not on {device}")
        if stage.settings.sharded() and processes == 1:
            raise InputError(f"{stage}: shard: true splits models over processes, and there is one; give --processes 2, or leave shard out")


def _decided(recipe: Recipe, examples: Sequence[Example]) -> Recipe:
    """The recipe with the tokenizers that the references call for, which then serve both sides' texts."""
    return recipe.decided_by([example.references for example in examples])


def _refuse_generation(recipe: Recipe, source: Source) -> None:
    """Raises ModelError where the recipe needs generated text and the model's generation config asks for what can't be done."""
    if GENERATED & set(recipe.groups):
        decoding.check(source, sampled=recipe.generation.do_sample and recipe.generation.temperature is None)


def _refuse_chat(recipe: Recipe, source: Source, progress: Progress) -> None:
    """Raises DataError where prompts are a user's turns and the model's chat template doesn't work, by a working process."""
    if not recipe.data.chat:
        return
    with tempfile.TemporaryDirectory() as folder, Child("compress.prompts", Path(folder) / "log", progress, start=copied) as child:
        border.ask(child, SeeTemplate(source))


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
        log.touch()  # a place that can't be written to raises now
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


def _measured(prepared: Sequence[Prepared], execution: Execution) -> list[Report]:
    first = prepared[0]

    def clear(sides: list[list[Side]]) -> bool:
        return all(verdict.is_clear(job.recipe.check, pair) for job, pair in zip(prepared, sides, strict=True))

    measurements, environment = isolate.measure(
        [_match(job) for job in prepared], first.recipe, first.examples, execution, execution.log.parent.parent / OUTPUTS, clear
    )
    with phase("judging"):
        return [judgement.reported(job, measured, environment) for job, measured in zip(prepared, measurements, strict=True)]


def _is_exported(source: Source, engine: ChosenEngine) -> bool:
    """Whether a model is in the engine's format. Raises ModelError where it is in another engine's."""
    export = exports.read(Path(source.id)) if source.is_folder else None
    if export is not None and export.format != engine.about.opens:
        raise ModelError(f"{source.id}: it is in the format {export.format}, which {engine.name} doesn't open; give --engine one that does")
    return export is not None


def _match(prepared: Prepared) -> isolate.Match:
    engine = prepared.recipe.engine
    original = ChosenEngine(name=PLAIN, settings=methods.Settings())
    return isolate.Match(
        isolate.Party("candidate", prepared.candidate, engine),
        isolate.Party("baseline", prepared.baseline, engine) if prepared.baseline else None,
        isolate.Party("original", prepared.original, original) if prepared.original else None,
    )


def _written(report: Report, commit: str | None, place: Path, phases: Callable[[], list[Phase]]) -> Report:
    """The report in its place, with what git says of its recipe."""
    return write.write(
        report.model_copy(update={"run": place.name, "environment": {**report.environment, "commit": commit}}), place, phases
    )
