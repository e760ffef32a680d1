"""One side under measurement, as the parent has it: its process while it runs, and what has been measured so far."""

import math
import time
from collections.abc import Generator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from compress import border
from compress.benchmark import outputs as kept
from compress.benchmark.machine import Machine
from compress.benchmark.messages import Answer, Explain, GridPoint, Load, Loaded, Outputs, Score, Time, WarmedUp, WarmUp
from compress.benchmark.sampler import Sampler
from compress.border import Request
from compress.engines import Explained
from compress.errors import ChildDied, Killed, RunError
from compress.execution import Execution
from compress.methods import Example
from compress.metrics import COMPARED
from compress.model.source import Source
from compress.nursery import copied
from compress.phases import phase
from compress.process import Child
from compress.recipe import ChosenEngine, Recipe
from compress.results.record import Role
from compress.results.sides import Conditions
from compress.scores import Samples

T = TypeVar("T")
Round = list[list[list[float]]]  # turns x iterations x tokens: seconds from the start of a generation
LONG_S = 1.0  # a run as long as this gains nothing from another warm-up run
REST = 32 << 20  # bytes of objects and code that a first step brings in


class Subject:
    """One side: a model in an engine."""

    module = "compress.benchmark.worker"

    def __init__(
        self, role: Role, source: Source, recipe: Recipe, execution: Execution, outputs: Path, original: Source | None = None,
        engine: ChosenEngine | None = None,
    ):  # fmt: skip
        self.engine = engine or recipe.engine
        self.role, self.source, self._recipe, self._execution, self._original = role, source, recipe, execution, original
        self._kept = outputs
        self._child: Child | None = None
        self.loads: list[Loaded] = []
        self.peaks: list[dict[GridPoint, dict[str, int]]] = []
        self.compiling: list[float] = []  # seconds a round, where steps are compiled
        self.reasons: dict[GridPoint, str] = {}
        self._lacking: set[GridPoint] = set()  # points that could not be run for want of memory
        self.rounds: dict[GridPoint, list[Round]] = {point: [] for point in recipe.benchmark.points}
        self._taken: dict[GridPoint, tuple[list[list[float]], float | None]] = {}
        self.joules: dict[GridPoint, list[list[float]]] = {point: [] for point in self.rounds}  # rounds x turns; nothing without NVML
        self.outputs: Outputs | None = None
        self.explanation: Explained | None = None
        self.explained = False  # whether a look at its steps was tried
        self.looked_at: list[GridPoint] = []  # the points of those steps
        self.failures: list[str] = []
        self.remarks: list[str] = []
        self.foreign_gpu_bytes = 0  # the most that processes outside the benchmark held of the GPU
        self.needless: set[GridPoint] = set()  # points that need no run, since no side can be compared there
        self._marks: dict[GridPoint, list[float]] = {}  # of a warmed-up run at each point: seconds to every token
        self._interpreter = 0

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child is not None

    @property
    def usable(self) -> list[GridPoint]:
        return [point for point in self.rounds if point not in self.reasons]

    def start(self, warm: bool = True) -> None:
        """Start a fresh process and load the model; warm it up unless it only answers examples."""
        try:
            loaded, peaks, compiling = self._load(), {}, 0.0
            points = [point for point in self.usable if point not in self.needless] if warm else []
            for number, point in enumerate(points):
                self._tell("warming up", number, len(points))
                if (seconds := self._at_least(point)) * self._fewest_runs > 60 * self._budget_minutes:
                    self.reasons[point] = f"a run takes {seconds:.0f} s or more; {self._fewest_runs} of them are too many for max_minutes"
                    continue
                with phase("warming up", self.role):
                    warmed_up = self._warm_up(point)
                if warmed_up.reason is None:
                    peaks[point] = warmed_up.memory
                    compiling += warmed_up.compile_seconds or 0.0
                    self._marks[point] = warmed_up.marks
                else:
                    self.reasons[point] = warmed_up.reason
                    self._lacking |= {point} if warmed_up.out_of_memory else set()
            if warm:
                self._tell("warming up", len(points), len(points))
        except BaseException:
            self.stop()
            raise
        self.loads.append(loaded)
        self.peaks.append(peaks)
        if self._recipe.benchmark.runtime.compile and self.engine.is_plain:
            self.compiling.append(compiling)

    @property
    def _budget_minutes(self) -> float:
        """How long all rounds may take; without a precision their number is fixed, however long they take."""
        benchmark = self._recipe.benchmark
        return math.inf if benchmark.precision is None else benchmark.max_minutes

    @property
    def _fewest_runs(self) -> int:
        """Runs of a point: in each of three rounds a first one, those that warm up (one in all at least), and one in a turn."""
        warmup = self._recipe.benchmark.warmup
        return 3 * (2 + warmup) + (not warmup)

    def _at_least(self, point: GridPoint) -> float:
        """The least seconds of a run, from smaller points: the time to read prompts grows with their tokens."""
        bounds = [0.0]
        for (batch, prompt), marks in self._marks.items():
            if batch <= point[0] and prompt <= point[1] and (batch, prompt) != point:
                bounds.append(marks[0] * point[0] * point[1] / (batch * prompt) + marks[-1] - marks[0])
        return max(bounds)

    def _load(self) -> Loaded:
        """Load the model in a new process."""
        benchmark = self._recipe.benchmark
        interpreter = self._recipe.interpreter(self.engine)
        self._child = Child(
            self.module, self._execution.log, self._tell, benchmark.threads, start=interpreter.start if interpreter else copied
        )
        with phase("loading", self.role), Sampler(self._child.pid) as sampler:
            loaded = self.ask(
                Load(
                    self.source,
                    self._execution.device,
                    benchmark.threads,
                    self.engine.name,
                    self.engine.settings.model_dump(),
                    benchmark.runtime.model_dump() if self.engine.is_plain else {},
                    benchmark.quality_batch_tokens,
                )
            )
        self._interpreter = loaded.interpreter
        self._note(loaded.peaks, sampler, loaded.environment["device"])
        if not self.remarks:
            self.remarks += _remarks(loaded)
        return loaded

    def _warm_up(self, point: GridPoint) -> WarmedUp:
        """Warm up a point. Where the kernel kills the process, the point doesn't fit into memory, and a new process is started."""
        benchmark = self._recipe.benchmark
        assert self._child is not None
        with Sampler(self._child.pid) as sampler:
            try:
                warmed_up = self.ask(WarmUp(point, benchmark.new_tokens, self._repeats(point)))
            except Killed:
                self.stop()
                self._load()
                return WarmedUp("out of memory: its process was killed", out_of_memory=True)
        if warmed_up.reason is None and "slack" in warmed_up.memory:
            self._note(warmed_up.memory, sampler, "cuda" if "reserved" in warmed_up.memory else "cpu")
        return warmed_up

    def _repeats(self, point: GridPoint) -> int:
        """Runs of a point after the first. One at least shows the heap and the time of compiling; a long run without that needs none."""
        benchmark = self._recipe.benchmark
        short = point not in self._marks or self._marks[point][-1] < LONG_S
        return max(benchmark.warmup, int(short or benchmark.runtime.compile))

    def _note(self, peaks: dict[str, int], sampler: Sampler, device: str) -> None:
        """Put the sampler's figures beside those of the process itself."""
        if device == "cpu":
            peaks["sampled"] = max(0, sampler.resident - self._interpreter)
        elif sampler.gpu is not None:
            peaks["sampled"] = sampler.gpu
        if sampler.foreign:
            self.foreign_gpu_bytes = max(self.foreign_gpu_bytes, sampler.foreign)

    @property
    def short_of_memory(self) -> bool:
        """Whether a point could not be run for want of memory."""
        return bool(self._lacking)

    def start_alone(self) -> None:
        """Start again now that memory is free, and forget which points it didn't hold."""
        self.stop()
        self.reasons = {point: reason for point, reason in self.reasons.items() if point not in self._lacking}
        self._lacking = set()
        self.start()

    def take_turn(self, machine: Machine, usable: list[GridPoint], ours: list[int]) -> Generator[float, None, Conditions]:
        """Time every point once more, in slices. After each it yields the share that is done, and other sides may take a slice.

        Returns the machine's conditions meanwhile. The timings count once `keep` is called.
        """
        benchmark, ran = self._recipe.benchmark, 0.0
        before = machine.read(self.pid, ours)
        if not usable:
            self._taken = {}
            return machine.between(before, before)
        assert self._child is not None
        request = Time(usable, benchmark.new_tokens, benchmark.iterations)
        slices = border.ask_in_slices(self._child, request, self._limit_s)
        while True:
            began = time.monotonic()
            try:
                done = next(slices)
            except StopIteration as end:
                timings = end.value
                break
            finally:
                ran += time.monotonic() - began
            yield done
        self._taken = {point: (block, joules) for point, block, joules in zip(usable, timings.seconds, timings.joules, strict=True)}
        return machine.between(before, machine.read(self.pid, ours), ran)

    def keep(self, number: int) -> None:
        """Count the last turn in the round of that number."""
        for point, (block, joules) in self._taken.items():
            if number == len(self.rounds[point]):
                self.rounds[point].append([])
                self.joules[point].append([])
            self.rounds[point][number].append(block)
            if joules is not None:
                self.joules[point][number].append(joules)

    def answer(self, examples: list[Example]) -> None:
        """Answer the examples, or take this model's answers from a former run."""
        recipe = self._recipe
        name = kept.name(
            self.source, recipe, examples, self.loads[0], self._original if "divergence" in recipe.groups else None, self.engine
        )
        self.outputs = kept.find(self._kept, name)
        if self.outputs is not None:
            self._tell("taking outputs of a former run", len(examples), len(examples))
            return
        with phase("examples", self.role):
            self.outputs = self.ask(
                Answer(
                    examples,
                    list(recipe.groups),
                    recipe.generation.model_dump(),
                    recipe.data.model_dump(mode="json"),
                    self._original,
                )
            )
        if self.outputs.texts is not None and COMPARED & set(recipe.groups):
            scored = self._scored(self.outputs.texts, [example.references for example in examples])
            self.outputs = replace(self.outputs, samples={**scored, **self.outputs.samples})
        kept.keep(self._kept, name, self.outputs)

    def _scored(self, texts: list[str], references: list[list[str]]) -> Samples:
        """Statistics of the metrics that compare texts, computed in a separate process."""
        score = Score(texts, references, list(self._recipe.groups), asdict(self._recipe.tokenizers))
        with phase("scoring", self.role), Child("compress.benchmark.scorer", self._execution.log, self._tell, start=copied) as child:
            return border.ask(child, score, self._limit_s)

    def explain(self, usable: list[GridPoint]) -> None:
        """Look at a step at every point, after the last timing of a process. Where that fails a remark says so; timings stand."""
        self.explained = True
        try:
            with phase("looking at steps", self.role):
                self.explanation = self.ask(Explain(usable, self._recipe.benchmark.new_tokens))
            self.looked_at = usable if self.explanation else []
        except ChildDied:
            raise
        except RunError as error:
            self.remarks.append(f"where a step's time goes could not be looked at: {error}")

    def ask(self, request: Request[T]) -> T:
        assert self._child is not None
        return border.ask(self._child, request, self._limit_s)

    @property
    def _limit_s(self) -> float:
        return 60 * self._recipe.benchmark.limit_minutes

    def fail(self, error: RunError) -> None:
        """Note why nothing more can be measured of this side, and stop its process."""
        self.failures.append(f"{self.role}: {error}")
        self.stop()

    def stop(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _tell(self, what: str, done: int, total: int) -> None:
        self._execution.progress(f"{self.role}: {what}", done, total)


def _remarks(loaded: Loaded) -> list[str]:
    """Remarks on how a model's memory was read."""
    remarks = []
    if loaded.weights.reserved:
        remarks.append(f"{loaded.weights.reserved / 1e6:,.1f} MB are kept ready for keys and values and count as peak memory")
    if loaded.rest > max(REST, loaded.weights.weight_bytes // 20):
        more = f"{loaded.rest / 1e6:,.1f} MB more are held after the first step than the model's tensors take"
        remarks.append(f"{more}: pages of its file that were read, or a copy that only a kernel knows of")
    if loaded.sampled_only:
        remarks.append("its peaks are the most of samples every 2 ms, for /proc/self/clear_refs can't be written here")
    return remarks
