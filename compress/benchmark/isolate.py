"""The harness seen from the parent: both models in fresh processes, measured in turns, so that a machine that slows down slows both.

A round starts new processes; within it the sides take turns in a random order, a block of timings each. Memory is read once a
round, speed every turn, quality in the first round. Nothing here needs torch.
"""

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.benchmark.statistics import corpus_value
from compress.data import Example
from compress.errors import OutOfMemory, RunError
from compress.model import Source
from compress.process import Child, Progress
from compress.recipe import Benchmark, Recipe
from compress.results import Measurement, Role, Side

Point = tuple[int, int]
Outputs = dict[str, Any]  # what `Worker.quality` gives


class Subject:
    """One side under measurement: its process while it runs, and what has been measured so far."""

    def __init__(self, role: Role, source: Source, recipe: Recipe, device: str, log: Path, progress: Progress):
        self.role, self.source, self._recipe, self._device = role, source, recipe, device
        self._log, self._progress = log, progress
        self._child: Child | None = None
        self.loads: list[dict[str, Any]] = []
        self.peaks: list[dict[str, int]] = []
        self.reasons: dict[Point, str] = {}
        self.turns: dict[Point, list[list[list[float]]]] = {point: [] for point in points(recipe.benchmark)}
        self.outputs: Outputs | None = None
        self.failures: list[str] = []

    @property
    def running(self) -> bool:
        return self._child is not None

    @property
    def usable(self) -> list[Point]:
        return [point for point in self.turns if point not in self.reasons]

    def start(self) -> None:
        """A fresh process with the model loaded and warmed up."""
        benchmark = self._recipe.benchmark
        self._child = Child("compress.benchmark.worker", self._log, self._tell, benchmark.threads)
        try:
            loaded = self.ask("load", source=asdict(self.source), device=self._device, threads=benchmark.threads)
            warm = self.ask("warm_up", points=self.usable, new_tokens=benchmark.new_tokens, repeats=benchmark.warmup)
        except BaseException:
            self.stop()
            raise
        for point, reason in zip(self.usable, warm["reasons"], strict=True):
            if reason:
                self.reasons[point] = reason
        self.loads.append(loaded)
        self.peaks.append(warm["peak"])

    def take_turn(self, usable: list[Point]) -> None:
        """Time every point once more."""
        benchmark = self._recipe.benchmark
        timings = self.ask("turn", points=usable, new_tokens=benchmark.new_tokens, iterations=benchmark.iterations)
        for point, block in zip(usable, timings, strict=True):
            self.turns[point].append(block)

    def answer(self, examples: list[Example]) -> None:
        """Do the examples."""
        recipe = self._recipe
        self.outputs = self.ask(
            "quality", examples=[asdict(e) for e in examples], groups=list(recipe.groups),
            generation=recipe.generation.model_dump(), chat=recipe.data.chat,
            batch_size=recipe.benchmark.quality_batch_size, max_tokens=recipe.data.max_tokens,
        )  # fmt: skip

    def ask(self, request: str, **arguments: Any) -> Any:
        assert self._child is not None
        return self._child.ask(request, limit_s=60 * self._recipe.benchmark.limit_minutes, **arguments)

    def stop(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _tell(self, what: str, done: int, total: int) -> None:
        self._progress(f"{self.role}: {what}", done, total)


def points(benchmark: Benchmark) -> list[Point]:
    """The grid, smallest first."""
    return [(batch, prompt) for prompt in sorted(set(benchmark.prompt_tokens)) for batch in sorted(set(benchmark.batch_sizes))]


def measure(
    sources: dict[Role, Source], recipe: Recipe, examples: list[Example], device: str, log: Path, progress: Progress
) -> tuple[list[Side], dict[Role, Outputs], dict[str, Any]]:
    """Measure one model or two alike. Returns the sides, their outputs on the examples, and the environment.

    A side whose process dies or runs out of memory has the reason under `failures`; what it had measured until then stays.
    """
    subjects = [Subject(role, source, recipe, device, log, progress) for role, source in sources.items()]
    try:
        _rounds(subjects, recipe, examples, progress)
    finally:
        for subject in subjects:
            subject.stop()
    environment: dict[str, Any] = next((s.loads[0]["environment"] for s in subjects if s.loads), {})
    outputs = {s.role: s.outputs for s in subjects if s.outputs is not None}
    return [_side(subject, recipe.benchmark) for subject in subjects], outputs, environment


def _rounds(subjects: list[Subject], recipe: Recipe, examples: list[Example], progress: Progress) -> None:
    benchmark, rng, total = recipe.benchmark, random.Random(0), recipe.benchmark.rounds * recipe.benchmark.turns
    alone = False  # whether memory holds one side at a time only
    for number in range(benchmark.rounds):
        for turn in range(benchmark.turns):
            for subject in rng.sample(subjects, len(subjects)):
                if subject.failures:
                    continue
                others = [s for s in subjects if s is not subject and s.running]
                try:
                    if alone:
                        _stop(others)
                    if not subject.running:
                        try:
                            subject.start()
                        except OutOfMemory:
                            if not others:
                                raise
                            alone = True
                            _stop(others)
                            subject.start()
                    if subject.outputs is None:
                        subject.answer(examples)
                    subject.take_turn(_common(subjects))
                except RunError as error:
                    subject.failures.append(f"{subject.role}: {error}")
                    subject.stop()
            progress("timing in turns", number * benchmark.turns + turn + 1, total)
        _stop(subjects)


def _stop(subjects: list[Subject]) -> None:
    for subject in subjects:
        subject.stop()


def _common(subjects: list[Subject]) -> list[Point]:
    """The points that no side is known to fail at."""
    return [point for point in subjects[0].turns if all(point not in subject.reasons for subject in subjects)]


def _side(subject: Subject, benchmark: Benchmark) -> Side:
    found: list[Measurement] = []
    if subject.loads:
        found += _sizes(subject)
        found += _memory(subject)
    for metric, samples in (subject.outputs or {}).get("samples", {}).items():
        found.append(_figure(metric, corpus_value(metric, samples), samples=samples))
    for (batch_size, prompt_tokens), turns in subject.turns.items():
        reason = subject.reasons.get((batch_size, prompt_tokens))
        if turns:
            found += _speeds(turns, batch_size, prompt_tokens)
        else:
            why = reason or "not reached"
            found.append(Measurement(metric="latency_p50", value=None, batch_size=batch_size, prompt_tokens=prompt_tokens, reason=why))
    return Side(role=subject.role, model=subject.source.id, measurements=found, failures=subject.failures)


def _sizes(subject: Subject) -> list[Measurement]:
    loaded = subject.loads[0]
    sizes = [_figure(metric, loaded[metric]) for metric in ("weight_bytes", "file_bytes", "parameters")]
    return [*sizes, _figure("bits_per_weight", 8 * loaded["weight_bytes"] / loaded["parameters"])]


def _memory(subject: Subject) -> list[Measurement]:
    series = {
        "peak_load_bytes": [load["peak"]["peak"] for load in subject.loads],
        "peak_run_bytes": [peak["peak"] for peak in subject.peaks],
        "peak_allocated_bytes": [peak["allocated"] for peak in subject.peaks if "allocated" in peak],
        "peak_reserved_bytes": [peak["reserved"] for peak in subject.peaks if "reserved" in peak],
        "process_gpu_bytes": [peak["process"] for peak in subject.peaks if "process" in peak],
    }
    return [_figure(m, statistics.median(v), samples=[[x] for x in v]) for m, v in series.items() if v]


def _speeds(turns: list[list[list[float]]], batch_size: int, prompt_tokens: int) -> list[Measurement]:
    """Every speed figure of a point from its token times: turns x iterations x tokens, in seconds from the start."""
    generated = len(turns[0][0])
    raw: dict[str, list[list[float]]] = {
        "latency": [[times[-1] for times in turn] for turn in turns],
        "ttft": [[times[0] for times in turn] for turn in turns],
        "tpot": [[(times[-1] - times[0]) / max(1, generated - 1) for times in turn] for turn in turns],
    }
    rate = "tokens_per_second" if generated > 1 else "examples_per_second"
    raw[rate] = [[batch_size * generated / seconds for seconds in turn] for turn in raw["latency"]]
    kinds: list[tuple[str, str, Callable[[list[float]], float]]] = [
        ("latency_p50", "latency", statistics.median),
        ("latency_p90", "latency", lambda values: _quantile(values, 0.90)),
        ("latency_p99", "latency", lambda values: _quantile(values, 0.99)),
        (rate, rate, statistics.median),
    ]
    if generated > 1:
        kinds += [("ttft", "ttft", statistics.median), ("tpot", "tpot", statistics.median)]
    found = []
    for metric, series, reduce in kinds:
        everything = [value for turn in raw[series] for value in turn]
        found.append(
            Measurement(
                metric=metric, value=reduce(everything), batch_size=batch_size, prompt_tokens=prompt_tokens,
                samples=[[reduce(turn)] for turn in raw[series]],
                raw=raw[series] if metric in ("latency_p50", "ttft", "tpot") else [],
            )
        )  # fmt: skip
    return found


def _quantile(values: list[float], share: float) -> float:
    """The quantile by linear interpolation between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _figure(metric: str, value: float, samples: list[list[float]] | None = None) -> Measurement:
    finite = math.isfinite(value)
    return Measurement(
        metric=metric, value=value if finite else None, samples=samples or [], reason=None if finite else f"the value is {value}"
    )
