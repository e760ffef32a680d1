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

from compress.benchmark import outputs as kept
from compress.benchmark.outputs import Outputs
from compress.benchmark.statistics import corpus_value
from compress.errors import OutOfMemory, RunError
from compress.methods import Example
from compress.metrics import METRICS
from compress.model import Source
from compress.process import Child, Progress
from compress.recipe import Benchmark, Recipe
from compress.results import Measurement, Role, Side

Point = tuple[int, int]  # batch size, prompt tokens
Round = list[list[list[float]]]  # turns x iterations x tokens: seconds from the start of a generation
OUT_OF_MEMORY = "out of memory"


class Subject:
    """One side under measurement: its process while it runs, and what has been measured so far."""

    def __init__(self, role: Role, source: Source, recipe: Recipe, device: str, log: Path, outputs: Path, progress: Progress):
        self.role, self.source, self._recipe, self._device = role, source, recipe, device
        self._log, self._kept, self._progress = log, outputs, progress
        self._child: Child | None = None
        self.loads: list[dict[str, Any]] = []
        self.peaks: list[dict[Point, dict[str, int]]] = []
        self.reasons: dict[Point, str] = {}
        self.rounds: dict[Point, list[Round]] = {point: [] for point in points(recipe.benchmark)}
        self.outputs: Outputs | None = None
        self.failures: list[str] = []

    @property
    def running(self) -> bool:
        return self._child is not None

    @property
    def usable(self) -> list[Point]:
        return [point for point in self.rounds if point not in self.reasons]

    def start(self) -> None:
        """A fresh process with the model loaded and warmed up."""
        benchmark = self._recipe.benchmark
        self._child = Child("compress.benchmark.worker", self._log, self._tell, benchmark.threads)
        try:
            loaded = self.ask(
                "load", source=asdict(self.source), device=self._device, threads=benchmark.threads, runtime=benchmark.runtime.model_dump()
            )
            warm = self.ask("warm_up", points=self.usable, new_tokens=benchmark.new_tokens, repeats=benchmark.warmup)
        except BaseException:
            self.stop()
            raise
        peaks = {}
        for point, found in zip(self.usable, warm, strict=True):
            if found["reason"] is None:
                peaks[point] = found["peak"]
            else:
                self.reasons[point] = found["reason"]
        self.loads.append(loaded)
        self.peaks.append(peaks)

    @property
    def short_of_memory(self) -> bool:
        """Whether a point could not be run for want of memory."""
        return OUT_OF_MEMORY in self.reasons.values()

    def start_alone(self) -> None:
        """Start again, now that memory is free, and forget what had no place in it."""
        self.stop()
        self.reasons = {point: reason for point, reason in self.reasons.items() if reason != OUT_OF_MEMORY}
        self.start()

    def take_turn(self, usable: list[Point], number: int) -> None:
        """Time every point once more, in the round of that number."""
        benchmark = self._recipe.benchmark
        timings = self.ask("turn", points=usable, new_tokens=benchmark.new_tokens, iterations=benchmark.iterations)
        for point, block in zip(usable, timings, strict=True):
            if number == len(self.rounds[point]):
                self.rounds[point].append([])
            self.rounds[point][number].append(block)

    def answer(self, examples: list[Example]) -> None:
        """Do the examples, or take what this model has made of them before."""
        recipe = self._recipe
        name = kept.name(self.source, recipe, examples, self.loads[0]["environment"])
        self.outputs = kept.find(self._kept, name)
        if self.outputs is not None:
            return
        self.outputs = self.ask(
            "quality", examples=[asdict(e) for e in examples], groups=list(recipe.groups),
            generation=recipe.generation.model_dump(), data=recipe.data.model_dump(mode="json"),
            batch_tokens=recipe.benchmark.quality_batch_tokens,
        )  # fmt: skip
        kept.keep(self._kept, name, self.outputs)

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
    sources: dict[Role, Source], recipe: Recipe, examples: list[Example], device: str, log: Path, kept_outputs: Path, progress: Progress
) -> tuple[list[Side], dict[Role, Outputs], dict[str, Any]]:
    """Measure one model or two alike. Returns the sides, their outputs on the examples, and the environment.

    kept_outputs   a folder where outputs are kept for later runs

    A side whose process dies or runs out of memory has the reason under `failures`; what it had measured until then stays.
    """
    subjects = [Subject(role, source, recipe, device, log, kept_outputs, progress) for role, source in sources.items()]
    try:
        _rounds(subjects, recipe, examples, progress)
    finally:
        for subject in subjects:
            subject.stop()
    environment: dict[str, Any] = next((s.loads[0]["environment"] for s in subjects if s.loads), {})
    outputs = {s.role: s.outputs for s in subjects if s.outputs is not None}
    environment["inputs_cut"] = max((output["cut"] for output in outputs.values()), default=0)
    environment["generation_config"] = next((output["generation_config"] for output in outputs.values()), {})
    return [_side(subject, _common(subjects)) for subject in subjects], outputs, environment


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
                        alone = _bring_up(subject, others) or alone
                    if subject.outputs is None:
                        subject.answer(examples)
                    subject.take_turn(_common(subjects), number)
                except RunError as error:
                    subject.failures.append(f"{subject.role}: {error}")
                    subject.stop()
            progress("timing in turns", number * benchmark.turns + turn + 1, total)
        _stop(subjects)


def _bring_up(subject: Subject, others: list[Subject]) -> bool:
    """Start a side beside the others, or, where memory doesn't hold them together, without them. Says whether being alone helped.

    A point that doesn't fit alone either is no reason to measure the sides apart, nor is one that was known before.
    """
    known, loaded = subject.short_of_memory, True
    try:
        subject.start()
    except OutOfMemory:
        if not others:
            raise
        loaded = False
    if loaded and (known or not others or not subject.short_of_memory):
        return False
    _stop(others)
    subject.start_alone()
    return not (loaded and subject.short_of_memory)


def _stop(subjects: list[Subject]) -> None:
    for subject in subjects:
        subject.stop()


def _common(subjects: list[Subject]) -> list[Point]:
    """The points that no side is known to fail at."""
    return [point for point in subjects[0].rounds if all(point not in subject.reasons for subject in subjects)]


def _side(subject: Subject, common: list[Point]) -> Side:
    found: list[Measurement] = []
    if subject.loads:
        found += _sizes(subject)
        found += _memory(subject, common)
    for metric, samples in (subject.outputs or {}).get("samples", {}).items():
        found.append(_figure(metric, corpus_value(metric, samples), samples=samples))
    for (batch_size, prompt_tokens), rounds in subject.rounds.items():
        reason = subject.reasons.get((batch_size, prompt_tokens), "not reached on both sides")
        found += _speeds(rounds, batch_size, prompt_tokens) if rounds else _unmeasured(reason, batch_size, prompt_tokens)
    return Side(
        role=subject.role,
        model=subject.source.id,
        measurements=found,
        failures=subject.failures,
        said=(subject.outputs or {}).get("said", []),
    )


def _sizes(subject: Subject) -> list[Measurement]:
    loaded = subject.loads[0]
    sizes = [_figure(metric, loaded[metric]) for metric in ("weight_bytes", "file_bytes", "parameters")]
    return [*sizes, _figure("bits_per_weight", 8 * loaded["weight_bytes"] / loaded["parameters"])]


def _memory(subject: Subject, common: list[Point]) -> list[Measurement]:
    """Peaks a round; while running, that of the most demanding point that both sides can run."""
    running = {
        name: [[max(peaks[point][name] for point in common)] for peaks in subject.peaks if all(point in peaks for point in common)]
        for name in ("peak", "reserved", "process")
        if common and all(name in peaks[point] for peaks in subject.peaks for point in common if point in peaks)
    }
    series = {
        "peak_load_bytes": [[load["peak"]["peak"]] for load in subject.loads],
        "peak_run_bytes": running.get("peak", []),
        "peak_reserved_bytes": running.get("reserved", []),
        "process_gpu_bytes": running.get("process", []),
    }
    return [_figure(metric, statistics.median(row[0] for row in rows), samples=rows) for metric, rows in series.items() if rows]


def _speeds(rounds: list[Round], batch_size: int, prompt_tokens: int) -> list[Measurement]:
    """Every speed figure of a point. Its samples are a row a round: medians a turn, high percentiles over the round's timings."""
    generated = len(rounds[0][0][0])
    series: dict[str, Callable[[list[float]], float]] = {
        "latency": lambda marks: marks[-1],
        "ttft": lambda marks: marks[0],
        "tpot": lambda marks: (marks[-1] - marks[0]) / (generated - 1),
        "rate": lambda marks: batch_size * generated / marks[-1],
    }
    kinds = [("latency_p50", "latency", 0.5), ("latency_p90", "latency", 0.9), ("latency_p99", "latency", 0.99)]
    if generated > 1:
        kinds += [("ttft", "ttft", 0.5), ("tpot", "tpot", 0.5), ("tokens_per_second", "rate", 0.5)]
    else:
        kinds += [("examples_per_second", "rate", 0.5)]
    found = []
    for metric, name, share in kinds:
        raw = [[[series[name](marks) for marks in turn] for turn in turns] for turns in rounds]
        flat = [[value for turn in turns for value in turn] for turns in raw]
        if share == 0.5:
            samples = [[_quantile(turn, share) for turn in turns] for turns in raw]
        else:
            samples = [[_quantile(values, share)] for values in flat]
        value = _quantile([value for values in flat for value in values], share)
        keep = flat if metric in ("latency_p50", "ttft", "tpot") else []
        found.append(Measurement(metric=metric, value=value, batch_size=batch_size, prompt_tokens=prompt_tokens, samples=samples, raw=keep))
    return found


def _unmeasured(reason: str, batch_size: int, prompt_tokens: int) -> list[Measurement]:
    """What stands in the place of a point's figures."""
    names = [name for name, metric in METRICS.items() if metric.kind == "speed"]
    return [Measurement(metric=n, value=None, batch_size=batch_size, prompt_tokens=prompt_tokens, reason=reason) for n in names]


def _quantile(values: list[float], share: float) -> float:
    """The quantile by linear interpolation between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _figure(metric: str, value: float, samples: list[list[float]] | None = None) -> Measurement:
    if not math.isfinite(value):
        return Measurement(metric=metric, value=None, reason=f"its value is {value}")
    return Measurement(metric=metric, value=value, samples=samples or [])
