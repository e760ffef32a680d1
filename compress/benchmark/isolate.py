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
from compress.errors import OutOfMemory, RunError
from compress.methods import Example
from compress.metrics import METRICS
from compress.model import Source
from compress.process import Child, Progress
from compress.recipe import Benchmark, Recipe
from compress.results import Measurement, Role, Side, Step

Point = tuple[int, int]  # batch size, prompt tokens
Round = list[list[list[float]]]  # turns x iterations x tokens: seconds from the start of a generation
Speed = tuple[str, Callable[[list[float]], float], float]  # a figure, its value from the marks of one timing, the quantile over timings
Outputs = dict[str, Any]  # what `Worker.quality` gives
OUT_OF_MEMORY = "out of memory"


class Subject:
    """One side under measurement: its process while it runs, and what has been measured so far."""

    def __init__(self, role: Role, source: Source, recipe: Recipe, device: str, log: Path, progress: Progress):
        self.role, self.source, self._recipe, self._device = role, source, recipe, device
        self._log, self._progress = log, progress
        self._child: Child | None = None
        self.loads: list[dict[str, Any]] = []
        self.peaks: list[dict[Point, dict[str, int]]] = []
        self.compiling: list[float] = []  # seconds a round, where steps are compiled
        self.reasons: dict[Point, str] = {}
        self.rounds: dict[Point, list[Round]] = {point: [] for point in points(recipe.benchmark)}
        self.joules: dict[Point, list[list[float]]] = {point: [] for point in self.rounds}  # rounds x turns; nothing without NVML
        self.outputs: Outputs | None = None
        self.explanation: dict[str, Any] | None = None  # what `Worker.explain` gives
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
        if benchmark.runtime.compile:
            self.compiling.append(sum(found["compile_seconds"] or 0 for found in warm))

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
        for point, block, joules in zip(usable, timings["seconds"], timings["joules"], strict=True):
            if number == len(self.rounds[point]):
                self.rounds[point].append([])
                self.joules[point].append([])
            self.rounds[point][number].append(block)
            if joules is not None:
                self.joules[point][number].append(joules)

    def answer(self, examples: list[Example]) -> None:
        """Do the examples."""
        recipe = self._recipe
        self.outputs = self.ask(
            "quality", examples=[asdict(e) for e in examples], groups=list(recipe.groups),
            generation=recipe.generation.model_dump(), chat=recipe.data.chat,
            batch_size=recipe.benchmark.quality_batch_size, max_tokens=recipe.data.max_tokens,
        )  # fmt: skip

    def explain(self, usable: list[Point]) -> None:
        """Look at what a step does at every point, after the last timing of a process."""
        self.explanation = self.ask("explain", points=usable, new_tokens=self._recipe.benchmark.new_tokens)

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
    ceilings = _ceilings(subjects)
    environment.update(ceilings)
    outputs = {s.role: s.outputs for s in subjects if s.outputs is not None}
    environment["inputs_cut"] = max((output["cut"] for output in outputs.values()), default=0)
    environment["generation_config"] = next((output["generation_config"] for output in outputs.values()), {})
    return [_side(subject, _common(subjects), ceilings) for subject in subjects], outputs, environment


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
                    if turn == benchmark.turns - 1 and subject.explanation is None:
                        subject.explain(_common(subjects))
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


def _ceilings(subjects: list[Subject]) -> dict[str, float]:
    """What the machine can do at best: the better where both sides measured the same, since only disturbances differ."""
    found: dict[str, float] = {}
    for subject in subjects:
        for name, value in (subject.explanation or {}).get("ceilings", {}).items():
            found[name] = max(value, found.get(name, 0))
    return found


def _side(subject: Subject, common: list[Point], ceilings: dict[str, float]) -> Side:
    found: list[Measurement] = []
    if subject.loads:
        found += _sizes(subject)
        found += _memory(subject, common)
    if subject.compiling:  # inductor keeps on disk what it compiled, so that later rounds take less
        found.append(_figure("compile_seconds", max(subject.compiling), samples=[[seconds] for seconds in subject.compiling]))
    for metric, samples in (subject.outputs or {}).get("samples", {}).items():
        found.append(_figure(metric, corpus_value(metric, samples), samples=samples))
    explained = subject.explanation or {"dtype": None, "steps": []}
    steps = {(step["batch_size"], step["prompt_tokens"]): Step(**step) for step in explained["steps"]}
    for point, rounds in subject.rounds.items():
        reason = subject.reasons.get(point, "not reached on both sides")
        if not rounds:
            found += _unmeasured(reason, *point)
            continue
        found += _speeds(rounds, _rates(rounds, point[0]), *point)
        found += _energy(rounds, subject.joules[point], *point)
        if point in steps:
            found += _speeds(rounds, _utilisations(steps[point], ceilings, explained["dtype"]), *point)
    return Side(
        role=subject.role, model=subject.source.id, dtype=explained["dtype"], measurements=found, steps=list(steps.values()),
        failures=subject.failures,
    )  # fmt: skip


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


def _rates(rounds: list[Round], batch_size: int) -> list[Speed]:
    """The speed figures of a point: their names, their values from the marks of one timing, and the quantile over timings."""
    generated = len(rounds[0][0][0])

    def rate(marks: list[float]) -> float:
        return batch_size * generated / marks[-1]

    whole: list[Speed] = [(f"latency_p{share}", lambda marks: marks[-1], share / 100) for share in (50, 90, 99)]
    if generated == 1:
        return [*whole, ("examples_per_second", rate, 0.5)]
    return [*whole, ("ttft", lambda marks: marks[0], 0.5), ("tpot", _tpot, 0.5), ("tokens_per_second", rate, 0.5)]


def _utilisations(step: Step, ceilings: dict[str, float], dtype: str) -> list[Speed]:
    """What a model must read and compute, over the time it took, as shares of what the machine can; see `compress.metrics`."""
    read, bandwidth = step.weight_bytes + step.cache_bytes, ceilings["copy_bytes_per_second"]
    flops, rate = step.flops if step.prefill_flops is None else step.prefill_flops, ceilings[f"{dtype}_flops_per_second"]
    prefill: Speed = ("mfu", lambda marks: flops / marks[0] / rate, 0.5)
    return [prefill] if step.prefill_flops is None else [("mbu", lambda marks: read / _tpot(marks) / bandwidth, 0.5), prefill]


def _tpot(marks: list[float]) -> float:
    return (marks[-1] - marks[0]) / (len(marks) - 1)


def _speeds(rounds: list[Round], figures: list[Speed], batch_size: int, prompt_tokens: int) -> list[Measurement]:
    """Speed figures of a point. Samples are a row a round: medians a turn, high percentiles over the round's timings."""
    found = []
    for metric, of_marks, share in figures:
        raw = [[[of_marks(marks) for marks in turn] for turn in turns] for turns in rounds]
        flat = [[value for turn in turns for value in turn] for turns in raw]
        if share == 0.5:
            samples = [[_quantile(turn, share) for turn in turns] for turns in raw]
        else:
            samples = [[_quantile(values, share)] for values in flat]
        value = _quantile([value for values in flat for value in values], share)
        keep = flat if metric in ("latency_p50", "ttft", "tpot") else []
        found.append(Measurement(metric=metric, value=value, batch_size=batch_size, prompt_tokens=prompt_tokens, samples=samples, raw=keep))
    return found


def _energy(rounds: list[Round], joules: list[list[float]], batch_size: int, prompt_tokens: int) -> list[Measurement]:
    """Joules a token written, a row a round with a number a turn; nothing where a turn lacks them or nothing is written."""
    generated = len(rounds[0][0][0])
    if generated == 1 or any(len(drawn) != len(turns) for drawn, turns in zip(joules, rounds, strict=True)):
        return []
    tokens = batch_size * generated * len(rounds[0][0])
    samples = [[drawn / tokens for drawn in turns] for turns in joules]
    value = statistics.median(drawn for turns in samples for drawn in turns)
    return [Measurement(metric="energy_per_token", value=value, batch_size=batch_size, prompt_tokens=prompt_tokens, samples=samples)]


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
