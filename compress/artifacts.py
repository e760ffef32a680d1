"""Artifacts: what stages make of a model, each in a folder whose name holds the digest of all that went into it."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from compress import border, data, methods
from compress.errors import DataError, ModelError
from compress.execution import Execution
from compress.files import take_lock
from compress.methods import Example, TrainSettings, TuneSettings
from compress.model.folder import check_folder
from compress.model.source import Source, fingerprint, locate, pinned
from compress.nursery import copied
from compress.phases import phase
from compress.process import Child, Progress
from compress.recipe import Recipe, Stage, digest
from compress.report import card, write
from compress.requests import Make, Shown
from compress.results.stages import StageRecord
from compress.team import Team

MEASURED_ROWS, MEASURED_TOKENS = 8, 64  # what methods that need no data measure their layers' errors on


def make(
    recipe: Recipe, source: Source, folder: Path, execution: Execution, processes: int = 1, shown: Sequence[Shown] | None = None
) -> list[StageRecord]:  # fmt: skip
    """Make the artifact of every stage, or reuse it. `shown` has each stage's examples, which are read here where it is None.

    An artifact's name holds the digest of all that went into it: the model's content, every stage so far with its code, and the calibration
    examples. The versions of the libraries count too, and the number of processes where several trained. So recipes whose first stages are
    the same share the artifacts of these.
    """
    original = source
    records: list[StageRecord] = []
    name = Path(source.id).name if source.is_folder else source.id.rsplit("/", 1)[-1]
    history: list[Any] = [fingerprint(source), execution.device]
    shown = shown_to_stages(recipe, data.Dataset(recipe.data, recipe.folder)) if shown is None else shown
    for stage, seen in zip(recipe.stages, shown, strict=True):
        method = methods.find(stage.family, stage.method)
        if seen.examples:
            history.append([data.examples_digest(seen.examples), seen.max_tokens, seen.chat])
        if seen.validation:
            history.append(data.examples_digest(seen.validation))
        others = {
            role: pinned(Source(locate(other.id, recipe.folder), source.task, other.dtype, other.revision, other.bits))
            for role, other in stage.settings.models().items()
        }
        history.extend([role, fingerprint(other)] for role, other in others.items())
        history.append([stage.as_written(), methods.made_with(method)])
        together = processes if method.ABOUT.trains else 1
        if together > 1:  # a step takes so many times the examples
            history.append({"processes": together})
        target = folder / f"{name}-{stage.method}-{digest(history)}"
        start, reused = time.monotonic(), is_whole(target)
        if reused:
            execution.progress(f"{stage}; made before", 1, 1)
        else:
            models = {"original": original, **others}
            with phase("stages"):
                _make_one(stage, source, models, seen, target, execution, together)
        seconds = time.monotonic() - start
        noted = write.read_notes(target)
        record = StageRecord(stage=stage.as_written(), artifact=str(target), seconds=seconds, reused=reused, **noted)
        key = "the stage's max_tokens" if isinstance(stage.settings, TrainSettings) else "calibration.max_tokens"
        records.append(record.model_copy(update={"cut": write.read_cut(target, record.name, key)}))
        card.write(recipe, original, records)
        source = Source(str(target.resolve()), source.task)
    return records


class Carried(NamedTuple):
    """The stages of each side, with those that convert its model to an engine's format."""

    candidate: tuple[Stage, ...]
    baseline: tuple[Stage, ...]


def carried(recipe: Recipe) -> Carried:
    """The recipe's stages and the export that its first engine needs: the candidate as it is, the baseline in plain numbers."""
    form = recipe.engine.about.opens
    if form is None:
        return Carried(recipe.stages, ())
    module = methods.find("export", form)
    last = recipe.stages[-1:]
    ends = last and last[0].family == "export"
    candidate = recipe.stages if ends else (*recipe.stages, Stage(family="export", method=form, settings=module.Settings()))
    return Carried(candidate, (Stage(family="export", method=form, settings=module.PLAIN),))  # type: ignore[attr-defined]


def shown_to_stages(recipe: Recipe, dataset: data.Dataset) -> list[Shown]:
    """The examples of every stage, drawn by its settings or the recipe's calibration block; a few short ones if it only measures."""
    shown = []
    for stage in recipe.stages:
        settings, about = stage.settings, methods.find(stage.family, stage.method).ABOUT
        sampling = settings if isinstance(settings, TrainSettings) else recipe.calibration
        max_tokens, seen, watched = sampling.max_tokens, list[Example](), list[Example]()
        if stage.needs_examples:
            seen = dataset.examples("train", sampling.samples, sampling.seed)
        elif about.measured:
            max_tokens = min(max_tokens, MEASURED_TOKENS)
            with suppress(DataError):  # there is no such split, and it isn't needed
                seen = dataset.examples("train", min(sampling.samples or MEASURED_ROWS, MEASURED_ROWS), sampling.seed)
        if isinstance(settings, TuneSettings) and settings.early_stopping is not None:
            watched = dataset.examples("validation", settings.early_stopping.samples, settings.seed)
        shown.append(Shown(seen, watched, max_tokens, recipe.data.chat))
    return shown


def is_whole(artifact: Path) -> bool:
    """Whether an artifact can be reused; a damaged one is deleted."""
    if not artifact.exists():
        return False
    try:
        check_folder(artifact)
    except ModelError:
        shutil.rmtree(artifact) if artifact.is_dir() else artifact.unlink()
        return False
    return True


def _make_one(
    stage: Stage, source: Source, models: dict[str, Source], shown: Shown, target: Path, execution: Execution, processes: int = 1
) -> None:  # fmt: skip
    scratch = target.with_name(f".{target.name}.scratch")  # a stage that was killed finds its checkpoints there
    device, log, progress, single = execution.device, execution.log, execution.progress, processes == 1
    with _one_at_a_time(target, progress):
        if is_whole(target):  # another run made it meanwhile
            return
        with Child("compress.stage", log, progress, start=copied) if single else Team("compress.stage", log, progress, processes) as worker:
            border.ask(
                worker,
                Make(
                    source, stage.family, stage.method, stage.settings.model_dump(mode="json"), shown, str(target), device, str(scratch),
                    str(target.parent / "teachers"), models, processes,
                ),
            )  # fmt: skip
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _one_at_a_time(target: Path, progress: Progress) -> Iterator[None]:
    """Runs of the same artifact would overwrite each other's checkpoints, so the second waits. The kernel frees a killed run's lock."""
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
