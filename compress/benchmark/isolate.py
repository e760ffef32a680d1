"""The harness seen from the parent: both models in fresh processes, measured in turns, so that a machine that slows down slows both.

A round starts new processes; within it the sides take turns in a random order, a block of timings each. Memory is read once a
round, speed every turn, quality in the first round. Rounds follow until the latencies are known as precisely as is wanted. Nothing here
needs torch.
"""

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.benchmark.machine import Machine, alone, facts
from compress.benchmark.sampler import Sampler
from compress.benchmark.statistics import corpus_value, geometric_mean, paired_ratio
from compress.errors import DeviceError, Killed, OutOfMemory, RunError
from compress.methods import Example
from compress.metrics import METRICS
from compress.model import Source
from compress.process import Child, Progress
from compress.recipe import Benchmark, Recipe
from compress.results import Conditions, Measurement, Role, Side, Turn

Point = tuple[int, int]  # batch size, prompt tokens
Round = list[list[list[float]]]  # turns x iterations x tokens: seconds from the start of a generation
Outputs = dict[str, Any]  # what `Worker.quality` gives
Clear = Callable[[list[Side]], bool]  # whether nothing that could still be measured would change what the gates on speed say
OUT_OF_MEMORY = "out of memory"
FEWEST = 3  # rounds, below which no gate is clear
AGAIN = 0.5  # of the fewest turns, how many may be taken again, each once


class Subject:
    """One side under measurement: its process while it runs, and what has been measured so far."""

    module = "compress.benchmark.worker"

    def __init__(self, role: Role, source: Source, recipe: Recipe, device: str, log: Path, progress: Progress):
        self.role, self.source, self._recipe, self._device = role, source, recipe, device
        self._log, self._progress = log, progress
        self._child: Child | None = None
        self.loads: list[dict[str, Any]] = []
        self.peaks: list[dict[Point, dict[str, int]]] = []
        self.reasons: dict[Point, str] = {}
        self.rounds: dict[Point, list[Round]] = {point: [] for point in points(recipe.benchmark)}
        self._taken: dict[Point, list[list[float]]] = {}
        self.outputs: Outputs | None = None
        self.failures: list[str] = []
        self.foreign_gpu_bytes = 0  # the most that processes of others held of the GPU
        self._interpreter = 0

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child is not None

    @property
    def usable(self) -> list[Point]:
        return [point for point in self.rounds if point not in self.reasons]

    def start(self) -> None:
        """A fresh process with the model loaded and warmed up."""
        try:
            loaded, peaks = self._load(), {}
            for number, point in enumerate(self.usable):
                self._tell("warming up", number, len(self.usable))
                found = self._warm_up(point)
                if found["reason"] is None:
                    peaks[point] = found["memory"]
                else:
                    self.reasons[point] = found["reason"]
        except BaseException:
            self.stop()
            raise
        self.loads.append(loaded)
        self.peaks.append(peaks)

    def _load(self) -> dict[str, Any]:
        """Load the model in a new process."""
        benchmark = self._recipe.benchmark
        self._child = Child(self.module, self._log, self._tell, benchmark.threads)
        with Sampler(self._child.pid) as sampler:
            loaded: dict[str, Any] = self.ask(
                "load", source=asdict(self.source), device=self._device, threads=benchmark.threads, runtime=benchmark.runtime.model_dump()
            )
        self._interpreter = loaded["interpreter"]
        self._note(loaded["peak"], sampler, loaded["environment"]["device"])
        return loaded

    def _warm_up(self, point: Point) -> dict[str, Any]:
        """Run a point for the first times; one that the kernel kills the process at has no place in memory, and a new process goes on."""
        benchmark = self._recipe.benchmark
        assert self._child is not None
        with Sampler(self._child.pid) as sampler:
            try:
                found: dict[str, Any] = self.ask("warm_up", point=point, new_tokens=benchmark.new_tokens, repeats=benchmark.warmup)
            except Killed:
                self.stop()
                self._load()
                return {"reason": f"{OUT_OF_MEMORY}: its process was killed"}
        if found["reason"] is None:
            self._note(found["memory"], sampler, "cuda" if "reserved" in found["memory"] else "cpu")
        return found

    def _note(self, peaks: dict[str, int], sampler: Sampler, device: str) -> None:
        """Put what the sampler saw beside what the process itself found."""
        if device == "cpu":
            peaks["sampled"] = max(0, sampler.resident - self._interpreter)
        elif sampler.gpu is not None:
            peaks["sampled"] = sampler.gpu
        if sampler.foreign:
            self.foreign_gpu_bytes = max(self.foreign_gpu_bytes, sampler.foreign)

    @property
    def short_of_memory(self) -> bool:
        """Whether a point could not be run for want of memory."""
        return any(reason.startswith(OUT_OF_MEMORY) for reason in self.reasons.values())

    def start_alone(self) -> None:
        """Start again, now that memory is free, and forget what had no place in it."""
        self.stop()
        self.reasons = {point: reason for point, reason in self.reasons.items() if not reason.startswith(OUT_OF_MEMORY)}
        self.start()

    def take_turn(self, machine: Machine, usable: list[Point], ours: list[int]) -> Conditions:
        """Time every point once more, and how the machine was meanwhile. The timings count once they are kept."""
        benchmark = self._recipe.benchmark
        before = machine.read(self.pid, ours)
        timings = self.ask("turn", points=usable, new_tokens=benchmark.new_tokens, iterations=benchmark.iterations)
        self._taken = dict(zip(usable, timings, strict=True))
        return machine.between(before, machine.read(self.pid, ours))

    def keep(self, number: int) -> None:
        """The last turn counts, in the round of that number."""
        for point, block in self._taken.items():
            if number == len(self.rounds[point]):
                self.rounds[point].append([])
            self.rounds[point][number].append(block)

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
    sources: dict[Role, Source], recipe: Recipe, examples: list[Example], device: str, log: Path, progress: Progress,
    clear: Clear = lambda _: False, strict: bool = False,
) -> tuple[list[Side], dict[Role, Outputs], dict[str, Any], list[Turn]]:  # fmt: skip
    """Measure one model or two alike. Returns the sides, their outputs on the examples, the environment, and how each turn went.

    clear    may end the rounds early
    strict   refuse a GPU that another process uses

    A side whose process dies or runs out of memory has the reason under `failures`; what it had measured until then stays. Raises
    DeviceError where `strict` refuses.
    """
    subjects = [Subject(role, source, recipe, device, log, progress) for role, source in sources.items()]
    session = Session(subjects, recipe, progress, strict)
    with alone(progress):
        try:
            session.run(examples, clear)
        finally:
            _stop(subjects)
    environment: dict[str, Any] = next((s.loads[0]["environment"] for s in subjects if s.loads), {})
    outputs = {s.role: s.outputs for s in subjects if s.outputs is not None}
    environment |= facts()
    environment["foreign_gpu_bytes"] = max(subject.foreign_gpu_bytes for subject in subjects)
    environment["inputs_cut"] = max((output["cut"] for output in outputs.values()), default=0)
    environment["generation_config"] = next((output["generation_config"] for output in outputs.values()), {})
    return session.sides(), outputs, environment, session.turns


class Session:
    """One benchmark: its rounds, and what is known so far."""

    def __init__(self, subjects: list[Subject], recipe: Recipe, progress: Progress, strict: bool):
        self._subjects, self._benchmark, self._progress, self._strict = subjects, recipe.benchmark, progress, strict
        self._random = random.Random(0)
        self._alone = False  # whether memory holds one side at a time only
        self._again = math.ceil(AGAIN * recipe.benchmark.rounds * recipe.benchmark.turns)
        self.turns: list[Turn] = []

    def run(self, examples: list[Example], clear: Clear) -> None:
        """Round after round; the examples are done in the first."""
        began = time.monotonic()
        for number in itertools.count():
            if self._is_enough(number, (time.monotonic() - began) / 60, clear):
                return
            for turn in range(self._benchmark.turns):
                if not self._take(number, turn, examples, last=self._again <= 0):
                    self._again -= 1
                    self._take(number, turn, examples, last=True)
                done = number * self._benchmark.turns + turn + 1
                self._progress("timing in turns", done, max(done, self._benchmark.rounds * self._benchmark.turns))
            _stop(self._subjects)

    def sides(self) -> list[Side]:
        return [_side(subject, _common(self._subjects)) for subject in self._subjects]

    def _is_enough(self, rounds: int, minutes: float, clear: Clear) -> bool:
        """Whether so many rounds say what is wanted, or there is no time for another."""
        if rounds < min(FEWEST, self._benchmark.rounds):
            return False
        if rounds >= self._benchmark.rounds and (self._benchmark.precision is None or minutes >= self._benchmark.max_minutes):
            return True
        if any(subject.failures for subject in self._subjects):
            return rounds >= self._benchmark.rounds
        return (rounds >= self._benchmark.rounds and self._is_precise()) or clear(self.sides())

    def _is_precise(self) -> bool:
        """Whether half of the interval of every latency, ratio or single one, is at most the wanted share of it."""
        wanted, level = self._benchmark.precision, self._benchmark.confidence
        for point in _common(self._subjects):
            series = [
                [[_quantile([marks[-1] for marks in turn], 0.5) for turn in turns] for turns in s.rounds[point]] for s in self._subjects
            ]
            for effect in [paired_ratio(series[0], other) for other in series[1:]] or [geometric_mean(series[0])]:
                interval = effect.interval(level)
                if wanted is not None and (interval is None or math.log(interval[1] / interval[0]) / 2 > wanted):
                    return False
        return True

    def _take(self, number: int, turn: int, examples: list[Example], last: bool) -> bool:
        """One turn of each side that has not failed. Whether it counts: where it was disturbed it doesn't, unless it is the `last` one."""
        taken: list[tuple[Subject, Conditions]] = []
        for subject in self._random.sample(self._subjects, len(self._subjects)):
            if subject.failures:
                continue
            others = [s for s in self._subjects if s is not subject and s.running]
            try:
                if self._alone:
                    _stop(others)
                if not subject.running:
                    self._alone = _bring_up(subject, others) or self._alone
                if subject.outputs is None:
                    subject.answer(examples)
                taken.append((subject, self._timed(subject)))
            except RunError as error:
                subject.failures.append(f"{subject.role}: {error}")
                subject.stop()
        kept = last or not any(conditions.disturbed for _, conditions in taken)
        for subject, conditions in taken:
            self.turns.append(Turn(**conditions.model_dump(), role=subject.role, round=number, turn=turn, kept=kept))
            if kept:
                subject.keep(number)
        return kept

    def _timed(self, subject: Subject) -> Conditions:
        environment = subject.loads[-1]["environment"]
        ours = [s.pid for s in self._subjects if s.running]
        machine = Machine(environment["threads"], environment["gpu_uuid"])
        if self._strict and (foreign := machine.strangers(ours)):
            raise DeviceError(
                f"the GPU is shared with process {', '.join(map(str, foreign))}, and --strict was given;"
                " end it, or choose another GPU by CUDA_VISIBLE_DEVICES"
            )
        return subject.take_turn(machine, _common(self._subjects), ours)


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
    return Side(role=subject.role, model=subject.source.id, measurements=found, failures=subject.failures)


def _sizes(subject: Subject) -> list[Measurement]:
    loaded = subject.loads[0]
    sizes = [_figure(metric, loaded[metric]) for metric in ("weight_bytes", "buffer_bytes", "file_bytes", "parameters")]
    return [*sizes, _figure("bits_per_weight", 8 * loaded["weight_bytes"] / loaded["parameters"])]


def _memory(subject: Subject, common: list[Point]) -> list[Measurement]:
    """Peaks a round; while running, those of the most demanding point that both sides can run, and what holds them."""
    loads = [load["peak"] for load in subject.loads]
    held = subject.loads[0]["weight_bytes"]
    runs = []
    for peaks in subject.peaks:
        if common and all(point in peaks for point in common):
            run = dict(max((peaks[point] for point in common), key=lambda found: found["peak"]))
            for name in run.keys() & {"reserved", "process"}:  # these may be highest elsewhere
                run[name] = max(peaks[point][name] for point in common if name in peaks[point])
            slack_inside = 0 if "reserved" in run else run["slack"]  # a GPU's peak is what is allocated
            run["activations"] = max(0, run["peak"] - held - run["cache"] - slack_inside)
            runs.append(run)
    series = {
        "peak_load_bytes": ("peak", loads),
        "sampled_load_bytes": ("sampled", loads),
        "peak_run_bytes": ("peak", runs),
        "sampled_run_bytes": ("sampled", runs),
        "kv_cache_bytes": ("cache", runs),
        "activation_bytes": ("activations", runs),
        "allocator_slack_bytes": ("slack", runs),
        "peak_reserved_bytes": ("reserved", runs),
        "process_gpu_bytes": ("process", runs),
        "cuda_context_bytes": ("context", runs),
    }
    rows = {metric: [[float(one[name])] for one in found] for metric, (name, found) in series.items() if all(name in one for one in found)}
    return [_figure(metric, statistics.median(row[0] for row in found), samples=found) for metric, found in rows.items() if found]


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
