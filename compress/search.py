"""The best recipe under gates: Optuna proposes, examples judge, and hopeless recipes end early.

A proposed recipe's model is made and evaluated on a few examples, then on more of them. It is given up where these already show beyond
doubt that a gate on quality is broken. The others are measured in full, as ordinary runs. The study is written to disk after every step, so
a search that was killed can continue.
"""

import itertools
import json
import math
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from compress import pipeline, sweep
from compress.cluster import Here, Workers
from compress.errors import CompressError, InputError, MissingPackage, NoSpace, RecipeError, is_disk_full
from compress.execution import Execution
from compress.extras import install_line
from compress.files import take_lock, write_whole
from compress.methods import quiet
from compress.metrics import GROUPS, METRICS
from compress.mistakes import suggest
from compress.model.source import user_path
from compress.nursery import nursery
from compress.process import Progress
from compress.recipe import Recipe, digest
from compress.report.numbers import duration
from compress.results.report import Report, read_report
from compress.screening import hopeless

NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
RANGE = re.compile(rf"{NUMBER}\.\.{NUMBER}(:log)?")
WEIGHT = {"pass": 0, "cannot_tell": 1, "fail": 2}  # what a gate adds to a recipe's distance from passing


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, whole ones where both are; `log` draws each power of ten as often."""

    low: float
    high: float
    log: bool = False


Space = dict[str, list[Any] | Range]


@dataclass(frozen=True)
class Tried:
    """One recipe of a search.

    choice   its values, by key
    report   where its report is; None where it was not measured in full (see `reason`)
    verdict  None where it could not be made or measured
    value    what is minimised: the ratio to the baseline's or, for quality, the difference
    """

    choice: dict[str, Any]
    report: str | None = None
    verdict: str | None = None
    value: float | None = None
    reason: str | None = None

    @property
    def failed(self) -> bool:
        """Whether it could not be made, or not all of it measured."""
        return self.verdict is None or (self.report is not None and self.reason is not None)


@dataclass(frozen=True)
class Found:
    """The outcome of a search. `best` is None where no recipe was shown to pass its gates."""

    tried: list[Tried]
    best: Tried | None
    file: Path


def gate(kept: str) -> str:
    """The override that sets a gate: `rougeL:-1.0` may drop by 1 point at most, `latency_p50:+5%` may rise by 5 %. Raises RecipeError."""
    metric, colon, text = kept.rpartition(":")  # metrics of lm_eval's tasks have colons too
    try:
        change, relative = float(text.removesuffix("%")), text.endswith("%")
    except ValueError:
        change = math.nan
    if not colon or not math.isfinite(change):
        raise RecipeError(f"--keep {kept}: give a metric and how much it may change, as in rougeL:-1.0 or latency_p50:+5%")
    if relative:
        return f"check.{metric}=" + json.dumps({"max_ratio" if change > 0 else "min_ratio": 1 + change / 100})
    return f"check.{metric}=" + json.dumps({"max_rise" if change > 0 else "max_drop": abs(change)})


def space(over: Sequence[str]) -> Space:
    """The search space: `stages.0.bits=2,3,4` is a list, `stages.0.sparsity=0.1..0.7` a range, `...=1e-5..1e-3:log` one by powers of ten.

    Raises RecipeError.
    """
    sweep.apart([assignment.partition("=")[0].strip() for assignment in over], "--over")
    domains: Space = {}
    for assignment in over:
        key, _, text = assignment.partition("=")
        if ends := RANGE.fullmatch(text.strip()):
            low, high = (int(end) if end.lstrip("+-").isdecimal() else float(end) for end in ends.group(1, 2))
            if low >= high or (ends[3] and low <= 0):
                raise RecipeError(f"--over {assignment}: not a range from low to high, as 0.1..0.7, 2..8 and 1e-5..1e-3:log are")
            domains[key.strip()] = Range(low, high, bool(ends[3]))
        else:
            domains |= [sweep.values(assignment, "--over")]
    return domains


class Search:
    """A recipe, its search space, and the aim of the search.

    file       of the recipe, or its name
    keep       gates, `rougeL:-1.0`, besides those of the recipe
    minimise   a metric
    over       the space, `stages.0.bits=2,3,4`
    overrides  `stages.0.group_size=64`

    Raises RecipeError where the recipe, or one with a value of the space, is wrong.
    """

    def __init__(self, file: str | Path, keep: Sequence[str], minimise: str, over: Sequence[str], overrides: Sequence[str] = ()):
        self.file, self.minimise, self.space = str(file), minimise, space(over)
        self.overrides = [*overrides, *map(gate, keep)]
        if minimise not in METRICS:
            raise RecipeError(f"--minimise {minimise}: there is no such metric{suggest(minimise, tuple(METRICS))}")
        if METRICS[minimise].better == "higher":
            raise RecipeError(f"--minimise {minimise}: higher is better; name a metric for which lower is better, or give it to --keep")
        ends = {key: [domain.low, domain.high] if isinstance(domain, Range) else domain for key, domain in self.space.items()}
        first = {key: each[0] for key, each in ends.items()}
        self.recipes = [self.variant({**first, key: value}) for key, each in ends.items() for value in each]
        measured = {name for group in self.recipes[0].groups for name in GROUPS.get(group, ())}
        if METRICS[minimise].kind == "quality" and minimise not in measured:
            raise RecipeError(f"--minimise {minimise}: the recipe doesn't measure it; its metrics are {', '.join(sorted(measured))}")
        if not self.recipes[0].check:
            raise RecipeError(f"{file}: has no gates; give one, as in --keep rougeL:-1.0")

    def variant(self, choice: Mapping[str, Any]) -> Recipe:
        return sweep.variant(self.file, self.overrides, choice)

    def place(self, out: Path) -> Path:
        """The search's folder."""
        base = sweep.variant(self.file, self.overrides, {})
        spaces = {key: str(domain) for key, domain in self.space.items()}
        return out / "searches" / f"{base.name}-{digest([base.digest, str(base.folder), spaces, self.minimise])}"

    def run(
        self, out: Path = Path("reports"), trials: int = 20, device: str = "auto", progress: Progress = quiet, strict: bool = False,
        workers: Workers | None = None,
    ) -> Found:  # fmt: skip
        """Try recipes, `trials` with those of earlier starts, or all there are; the best is written as a recipe.

        A recipe that could not be made or measured in an earlier start is tried again.

        Raises InputError for mistakes that show before anything runs.
        """
        pipeline.usable(out)
        sweep.refuse(self.recipes, device)
        out, workers, place = out.absolute(), workers or Here(), self.place(out)
        with _study(place, progress) as study, nursery() if isinstance(workers, Here) else nullcontext():
            self._go_on(study, trials, out, Execution(device, progress=progress, strict=strict), workers)
            tried = _tried(study)
        passed = [outcome for outcome in tried if outcome.verdict == "pass" and outcome.value is not None]
        best = min(passed, key=lambda outcome: outcome.value or 0, default=None)
        file = place / "best.yaml"
        if best is not None:
            write_whole(file, _as_yaml(self.variant(best.choice)))
        return Found(tried, best, file)

    def _go_on(self, study: Any, trials: int, out: Path, execution: Execution, workers: Workers) -> None:
        """Ask Optuna, try, and tell it, until so many recipes are tried."""
        everyone, start = self._everyone(trials), time.monotonic()
        former = _tried(study)
        again = [outcome.choice for outcome in former if outcome.failed]
        settled = [outcome.choice for outcome in former if not outcome.failed]
        before = len(settled)
        total = before + sum(choice not in settled for choice in everyone) if everyone else trials
        running: dict[Any, tuple[Any, dict[str, Any], str]] = {}
        done = before
        while done < total:
            while len(running) < workers.room and done + len(running) < total:
                taken = [*(outcome.choice for outcome in _tried(study)), *(choice for _, choice, _ in running.values())]
                trial = self._asked(study, again + [choice for choice in everyone if choice not in taken])
                choice = {key: _suggested(trial, key, domain) for key, domain in self.space.items()}
                again = [other for other in again if other != choice]
                each = (time.monotonic() - start) / (done - before) if done > before else 0
                left = f", about {duration(each * (total - done))} left" if each else ""
                what = f"recipe {done + len(running) + 1} of {total}: {', '.join(f'{key}={value}' for key, value in choice.items())}{left}"
                execution.progress(what, 0, 1)
                theirs = execution if isinstance(workers, Here) else replace(execution, progress=quiet)
                running[workers.start(_attempt, self, choice, out, theirs)] = trial, choice, what
            task, answer = workers.first(list(running))
            trial, choice, what = running.pop(task)
            _tell(study, trial, Tried(choice, reason=str(answer)) if isinstance(answer, CompressError) else answer)
            done += 1
            execution.progress(what, 1, 1)

    def _asked(self, study: Any, left: list[dict[str, Any]]) -> Any:
        """The next trial: one that a killed search was at, the next choice `left`, or what Optuna proposes."""
        from optuna.trial import TrialState

        if left and not study.get_trials(states=(TrialState.WAITING,)):
            categories = {key for key, domain in self.space.items() if isinstance(domain, list)}
            study.enqueue_trial({key: json.dumps(value) if key in categories else value for key, value in left[0].items()})
        return study.ask()

    def _everyone(self, most: int) -> list[dict[str, Any]]:
        """Every choice that there is; empty where there are more than `most`."""
        each = [domain for domain in self.space.values() if isinstance(domain, list)]
        if len(each) < len(self.space) or math.prod(map(len, each)) > most:
            return []
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*each)]


def _suggested(trial: Any, key: str, domain: list[Any] | Range) -> Any:
    if isinstance(domain, list):
        return json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in domain]))
    if isinstance(domain.low, int) and isinstance(domain.high, int):
        return trial.suggest_int(key, domain.low, domain.high, log=domain.log)
    return float(f"{trial.suggest_float(key, domain.low, domain.high, log=domain.log):.4g}")


def _tell(study: Any, trial: Any, outcome: Tried) -> None:
    from optuna.trial import TrialState

    trial.set_user_attr("tried", json.dumps(asdict(outcome)))
    if outcome.value is None or outcome.report is None:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        trial.set_constraint("gates", sum(WEIGHT[gate.verdict] for gate in read_report(outcome.report, figures_only=True).gates))
        study.tell(trial, outcome.value)


def _tried(study: Any) -> list[Tried]:
    """The recipes tried, each choice with its last outcome."""
    outcomes = [Tried(**json.loads(trial.user_attrs["tried"])) for trial in study.get_trials() if "tried" in trial.user_attrs]
    return list({json.dumps(outcome.choice): outcome for outcome in outcomes}.values())


@nursery()
def _attempt(search: Search, choice: dict[str, Any], out: Path, execution: Execution) -> Tried:
    """Make and judge one recipe."""
    prepared = pipeline.prepare(search.variant(choice), out, execution)
    report = sweep.former(prepared, out)
    if report is None:
        if (why := hopeless(prepared, out, execution)) is not None:
            return Tried(choice, verdict="fail", reason=f"given up {why}")
        report = pipeline.measure([prepared], out, execution)[0]
    return Tried(choice, str(report.folder), report.verdict, _value(report, search.minimise), sweep.failure(report))


def _value(report: Report, metric: str) -> float | None:
    """What is minimised: the geometric mean over grid points of the ratio to the baseline or, for quality, the difference."""
    comparisons = [comparison for comparison in report.comparisons if comparison.metric == metric and comparison.estimate is not None]
    if not comparisons:
        return None
    if comparisons[0].kind == "difference":
        return comparisons[0].estimate
    return math.exp(fmean(math.log(comparison.estimate) for comparison in comparisons if comparison.estimate))


@contextmanager
def _study(place: Path, progress: Progress) -> Iterator[Any]:
    """The study in a folder, locked for this process. The trials that a killed search was at come first. Raises InputError."""
    try:
        import optuna
        from optuna.trial import TrialState
    except ImportError:
        raise MissingPackage(f"compress search: Optuna isn't installed here. Install with: {install_line('search')}") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("a") as lock, warnings.catch_warnings():
        take_lock(lock, "start of the same search", progress)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=5)
        file = place.absolute() / "study.sqlite"
        try:
            study = optuna.create_study(storage=f"sqlite:///{file}", sampler=sampler, study_name="search", load_if_exists=True)
        except Exception as error:  # of Optuna, SQLAlchemy or sqlite3
            first = next(iter(str(error).splitlines()), type(error).__name__)
            if is_disk_full(error):
                raise NoSpace(f"the disk filled while {file} was made; free some space and run again") from None
            raise InputError(f"{file}: the study can't be read: {first}; move it away to search anew") from None
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
            if trial.params:
                study.enqueue_trial(trial.params)
        yield study


def _as_yaml(recipe: Recipe) -> str:
    """The recipe with defaults filled in and absolute folders, so that its file may be anywhere."""
    written = recipe.as_written()
    models = [
        written["model"],
        *(block for stage in written["stages"] for block in stage.values() if isinstance(block, dict) and "id" in block),
    ]
    for block, key in [(written["data"], "source"), *((model, "id") for model in models)]:
        place = recipe.folder / user_path(str(block[key]))
        if place.exists():
            block[key] = str(place.resolve())
    return yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=110)
