"""Many recipes at once: each an ordinary run with its own report, sharing what they have in common.

Stages are shared by their digests. Candidates of one model that are measured alike take turns with one baseline, as many as memory holds.
A recipe that was measured before is recognised by its digests, and its report is reused. So a sweep that was interrupted continues where
it was.
"""

import itertools
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress import pipeline
from compress.cluster import Workers
from compress.data import examples_digest
from compress.errors import CompressError, InputError, RecipeError, ReportError
from compress.execution import Execution
from compress.files import write_whole
from compress.forecast import machine, plan
from compress.judgement import Prepared
from compress.methods import quiet
from compress.nursery import nursery
from compress.process import Progress
from compress.recipe import Recipe, digest, load
from compress.report.numbers import duration
from compress.results.report import Report, read_report
from compress.yamlfile import Document, located

MOST = 1000  # recipes of a sweep
TOGETHER = 6  # candidates with one baseline: 7 measurements where pairs take 12; more would save little, and all would be lost at once
LONGEST = 150  # characters of a name, which is also a folder's; it may have more bytes
OWN = {"stages", "check", "calibration"}  # blocks in which recipes that are measured alike may differ


@dataclass(frozen=True)
class Outcome:
    """How one recipe of a sweep went: its report, or the reason why it has none or an incomplete one."""

    recipe: Recipe
    report: Report | None
    reason: str | None = None


def expand(files: Sequence[str | Path], grid: Sequence[str], overrides: Sequence[str] = ()) -> list[Recipe]:
    """Every recipe with every combination of the grid's values, which its name shows: quickstart+bits=4.

    grid   `stages.0.bits=3,4,8`, values as YAML

    Raises RecipeError with all mistakes of all recipes.
    """
    pairs = [values(assignment, "--grid") for assignment in grid]
    apart([key for key, _ in pairs], "--grid")
    keys = dict(pairs)
    if (count := len(files) * math.prod(map(len, keys.values()))) > MOST:
        raise RecipeError(f"--grid: that makes {count:,} recipes, and {MOST:,} are the most; compress search tries some of many")
    chosen = [dict(zip(keys, combination, strict=True)) for combination in itertools.product(*keys.values())]
    variants, mistakes = [], list[str]()
    for file, choice in itertools.product(files, chosen):
        try:
            variants.append(variant(file, overrides, choice))
        except RecipeError as error:
            mistakes += str(error).split("\n")
    if mistakes:
        raise RecipeError("\n".join(dict.fromkeys(mistakes)))
    return variants


def apart(keys: Sequence[str], option: str) -> None:
    """Raises RecipeError where two keys name the same place of the recipe, or one is within the other."""
    for key, other in itertools.permutations(keys, 2):
        place = located(key)
        if place == located(other):
            raise RecipeError(f"{option} {key}: it is given twice; list all of its values in one")
        if place == located(other)[: len(place)]:
            raise RecipeError(f"{option} {other}: it lies within {key}, which is given too; give one of them")


def values(assignment: str, option: str) -> tuple[str, list[Any]]:
    """The key and the values of `stages.0.bits=3,4,8`. Raises RecipeError."""
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip() or not text.strip():
        raise RecipeError(f"{option} {assignment}: give a key and values, as in {option} stages.0.bits=3,4,8")
    entries = Document(f"{option} {assignment[:200]}", f"values: [{text}]").data["values"]
    try:
        json.dumps(entries)
    except TypeError:  # dates and such
        entries = []
    if not entries:
        raise RecipeError(f"{option} {assignment}: give values, as in {option} stages.0.bits=3,4,8")
    return key.strip(), [entry for number, entry in enumerate(entries) if entry not in entries[:number]]


def variant(file: str | Path, overrides: Sequence[str], choice: Mapping[str, Any]) -> Recipe:
    """A recipe with these values, named by them. Raises RecipeError."""
    recipe = load(file, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in choice.items())])
    last = [key.rpartition(".")[2] for key in choice]
    names = [short if last.count(short) == 1 else key for short, key in zip(last, choice, strict=True)]
    parts = [f"{name}={value}" for name, value in zip(names, choice.values(), strict=True)]
    name = "+".join([recipe.name, *(re.sub(r"[^\w.=-]+", "_", part) for part in parts)])
    return recipe.called(name if len(name) <= LONGEST else f"{name[: LONGEST - 13]}-{digest(choice)}")


def refuse(recipes: Iterable[Recipe], device: str) -> None:
    """Check recipes before anything runs. Raises InputError with all mistakes, a line for each recipe."""
    mistakes = []
    for recipe in recipes:
        try:
            pipeline.refuse(recipe, device, 1)
        except CompressError as error:
            mistakes.append(f"{recipe.name}: {error}")
    if mistakes:
        raise InputError("\n".join(mistakes))


def run(
    recipes: Sequence[Recipe], out: Path = Path("reports"), device: str = "auto", progress: Progress = quiet, strict: bool = False,
    workers: Workers | None = None,
) -> list[Outcome]:  # fmt: skip
    """Run recipes, continuing after those that fail. Their reports are in `out`/<recipe>/<run>.

    workers   a cluster, on which each is a task of its own; None runs them here, as many as possible with one baseline

    Raises InputError for mistakes that show before anything runs.
    """
    pipeline.usable(out)
    refuse(recipes, device)
    execution = Execution(device, progress=progress, strict=strict)
    if workers is not None:
        return _spread(recipes, out.absolute(), execution, workers)
    return _here(recipes, out, execution)


def page(outcomes: Sequence[Outcome], out: Path) -> Path | None:
    """Write one page of all reports; a later page of the same recipes replaces it. None where there is no report."""
    from compress.report import html

    reports = [outcome.report for outcome in outcomes if outcome.report]
    if not reports:
        return None
    file = out / "sweeps" / f"{outcomes[0].recipe.name.partition('+')[0]}-{digest([outcome.recipe.digest for outcome in outcomes])}.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, html.render(reports))
    return file


def former(prepared: Prepared, out: Path) -> Report | None:
    """A former report of the same recipe, examples and artifacts that is complete; None where there is none."""
    artifacts = [Path(record.artifact).name for record in prepared.stages]
    for file in sorted((out / prepared.recipe.name).glob("*/report.json"), reverse=True):
        with suppress(ReportError):
            report = read_report(file, figures_only=True)
            same = report.digest == prepared.recipe.digest and report.examples_digest == examples_digest(prepared.examples)
            if same and [Path(record.artifact).name for record in report.stages] == artifacts and failure(report) is None:
                return read_report(file)
    return None


def failure(report: Report) -> str | None:
    """Why a report doesn't hold all that was to be measured; None where it does."""
    return next((failure for side in report.sides for failure in side.failures), None)


@nursery()
def attempt(recipe: Recipe, out: Path, execution: Execution) -> Report:
    """One recipe of a sweep as a task of its own. Raises CompressError."""
    prepared = pipeline.prepare(recipe, out, execution)
    return former(prepared, out) or pipeline.measure([prepared], out, execution)[0]


@nursery()
def _here(recipes: Sequence[Recipe], out: Path, execution: Execution) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    forecast = _Forecast(recipes)
    for group in _groups(recipes, forecast):
        ready: list[tuple[int, Prepared]] = []
        for number in group:
            recipe = recipes[number]
            what = f"recipe {number + 1} of {len(recipes)}: {recipe.name}{forecast.left(outcomes)}"
            execution.progress(what, 0, 1)
            try:
                prepared = pipeline.prepare(recipe, out, execution)
                report = former(prepared, out)
            except CompressError as error:
                outcomes[number] = Outcome(recipe, None, str(error))
            else:
                if report is not None:
                    outcomes[number] = Outcome(recipe, report)
                    forecast.seconds[number] = 0  # it took no time, so it tells nothing about the others
                else:
                    ready.append((number, prepared))
            execution.progress(what, 1, 1)
        if ready:
            what = f"measuring {len(ready)} of {len(recipes)} in turns with their baseline{forecast.left(outcomes)}"
            execution.progress(what, 0, 1)
            measured = _measured([prepared for _, prepared in ready], out, execution)
            outcomes.update(zip((number for number, _ in ready), measured, strict=True))
            execution.progress(what, 1, 1)
    return [outcomes[number] for number in range(len(recipes))]


def _spread(recipes: Sequence[Recipe], out: Path, execution: Execution, workers: Workers) -> list[Outcome]:
    apart = replace(execution, progress=quiet)
    begun = {workers.start(attempt, recipe, out, apart): number for number, recipe in enumerate(recipes)}
    outcomes: dict[int, Outcome] = {}
    start = time.monotonic()
    while begun:
        each = (time.monotonic() - start) / max(1, len(outcomes))
        left = f", about {duration(each * len(begun))} left" if outcomes else ""
        execution.progress(f"{len(outcomes)} of {len(recipes)} recipes done{left}", len(outcomes), len(recipes))
        task, answer = workers.first(list(begun))
        number = begun.pop(task)
        outcomes[number] = _outcome(recipes[number], answer)
    return [outcomes[number] for number in range(len(recipes))]


def _measured(prepared: list[Prepared], out: Path, execution: Execution) -> list[Outcome]:
    """Measure together, or one by one where one of the models can't be measured so."""
    try:
        reports = pipeline.measure(prepared, out, execution)
    except CompressError as error:
        if isinstance(error, InputError) and len(prepared) > 1:
            return [outcome for job in prepared for outcome in _measured([job], out, execution)]
        return [Outcome(job.recipe, None, str(error)) for job in prepared]
    return [_outcome(job.recipe, report) for job, report in zip(prepared, reports, strict=True)]


def _outcome(recipe: Recipe, answer: Report | CompressError) -> Outcome:
    if isinstance(answer, CompressError):
        return Outcome(recipe, None, str(answer))
    return Outcome(recipe, answer, failure(answer))


class _Forecast:
    """The time left: the forecast for what remains, corrected by how far it was off so far."""

    def __init__(self, recipes: Sequence[Recipe]):
        self.start, self.together = time.monotonic(), [1] * len(recipes)
        self.seconds = [0.0] * len(recipes)
        for number, recipe in enumerate(recipes):
            with suppress(CompressError):  # the recipe's run says why
                forecast = plan.plan(recipe, machine.here(recipe.benchmark.threads))
                peak = max(row.peak or row.weights for row in forecast.rows if row.dtype == forecast.dtype)
                self.together[number] = max(1, min(TOGETHER, forecast.machine.memory_bytes // peak - 1))
                self.seconds[number] = sum(forecast.seconds.values())

    def left(self, outcomes: Mapping[int, Outcome]) -> str:
        done = sum(self.seconds[number] for number in outcomes)
        rate = (time.monotonic() - self.start) / done if done else 1
        left = rate * sum(seconds for number, seconds in enumerate(self.seconds) if number not in outcomes)
        return f", about {duration(left)} left" if left else ""


def _groups(recipes: Sequence[Recipe], forecast: _Forecast) -> Iterator[list[int]]:
    """The numbers of the recipes that are measured together: same model, measured alike, and fitting into memory."""
    alike: dict[str, list[int]] = {}
    for number, recipe in enumerate(recipes):
        measured = {key: block for key, block in recipe.as_written().items() if key not in OWN}
        alike.setdefault(digest([str(recipe.folder), measured]), []).append(number)
    for numbers in alike.values():
        size = forecast.together[numbers[0]]
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))
