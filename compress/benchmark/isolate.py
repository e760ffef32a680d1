"""The harness as the parent process runs it: both models in fresh processes, measured in turns.

So a machine that slows down slows both.

A round starts new processes. Within it the sides take turns, a block of timings each, slice by slice on a CPU. Memory is read once a
round, speed every turn, quality in the first round. Rounds follow until the latencies are as precise as the recipe asks. Nothing here
needs torch.

The best number of turns a round depends on the noise between turns and the noise between processes (Cochran 1977, chapter 10). Neither is
known beforehand. So a round takes turns for as long as its processes took to start. For the same precision that takes at most twice as
long as the best number would.
"""

import itertools
import math
import random
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from compress.benchmark.figures import quantile, side
from compress.benchmark.machine import Machine, exclusive, facts
from compress.benchmark.messages import GridPoint, Outputs
from compress.benchmark.statistics import geometric_mean, paired_ratio
from compress.benchmark.subject import Subject
from compress.errors import DeviceError, OutOfMemory, RunError
from compress.execution import Execution
from compress.methods import Example
from compress.model.source import Source
from compress.nursery import nursery
from compress.phases import phase
from compress.recipe import ChosenEngine, Recipe
from compress.results.record import Role
from compress.results.sides import Conditions, Side, Turn

T = TypeVar("T")
# takes the sides of each pair, the baseline first; whether the gates on speed are decided, whatever else could be measured
Clear = Callable[[list[list[Side]]], bool]
FEWEST = 3  # rounds; with fewer no gate is clear
AGAIN = 0.5  # the share of the turns that may be taken again, each once


@dataclass(frozen=True)
class Party:
    """A model in an engine, and what it is measured as."""

    role: Role
    source: Source
    engine: ChosenEngine


@dataclass(frozen=True)
class Match:
    """A candidate and, where there are such, its baseline in the same engine and the original of both in plain transformers."""

    candidate: Party
    baseline: Party | None = None
    original: Party | None = None


class Measured(NamedTuple):
    """What was measured of a match: the sides, their outputs on the examples, how each turn went; the original's side and outputs."""

    sides: list[Side]
    outputs: dict[Role, Outputs]
    turns: list[Turn]
    original: Side | None = None
    original_outputs: Outputs | None = None


def measure(
    matches: Sequence[Match], recipe: Recipe, examples: list[Example], execution: Execution, kept_outputs: Path,
    clear: Clear = lambda _: False,
) -> tuple[list[Measured], dict[str, Any]]:  # fmt: skip
    """Measure all models in the same way; one that is in several matches is measured once.

    Returns what was measured of each match, and the environment.

    kept_outputs   a folder where outputs are kept for later runs
    clear          may end the rounds early

    A side whose process dies or runs out of memory has the reason under `failures`. What was measured of it until then stays.

    Raises DeviceError where a strict execution refuses a GPU.
    """
    with exclusive(execution.progress), nursery():
        parties = list(dict.fromkeys(party for match in matches for party in (match.baseline, match.candidate, match.original) if party))
        original = matches[0].baseline.source if matches[0].baseline else None
        subjects = {party: Subject(party.role, party.source, recipe, execution, kept_outputs, original, party.engine) for party in parties}
        pairs = [[subjects[party] for party in (match.baseline, match.candidate) if party] for match in matches]
        beside = [[subjects[match.original], subjects[match.candidate]] for match in matches if match.original]
        session = Session(list(subjects.values()), recipe, execution, pairs, beside)
        try:
            session.run(examples, clear)
        finally:
            _stop(subjects.values())
    environment = {name: value for s in reversed(subjects.values()) if s.loads for name, value in s.loads[0].environment.items()}
    environment |= _ceilings(subjects.values())
    outputs = [s.outputs for s in subjects.values() if s.outputs is not None and s.role != "original"]
    environment |= facts()
    environment["foreign_gpu_bytes"] = max(subject.foreign_gpu_bytes for subject in subjects.values())
    environment["longest_input"] = next((output.longest_input for output in reversed(outputs)), None)  # the candidate's
    environment["inputs_cut"] = max((output.cut for output in outputs), default=0)
    environment["generation_config"] = next((output.generation_config for output in outputs), {})
    measured = []
    for match, pair in zip(matches, pairs, strict=True):
        beyond = [subjects[match.original]] if match.original else []
        measured.append(session.measured(pair, *beyond))
    return measured, environment


class Session:
    """One benchmark: its rounds, and what has been measured so far.

    pairs    what is compared: a baseline and a candidate, or a single side; None makes the first the baseline of all others
    beside   pairs on which no gate depends; they needn't be precise
    """

    def __init__(
        self, subjects: list[Subject], recipe: Recipe, execution: Execution, pairs: list[list[Subject]] | None = None,
        beside: Sequence[list[Subject]] = (),
    ):  # fmt: skip
        self._pairs = pairs or [[subjects[0], other] for other in subjects[1:]] or [subjects]
        self._beside = list(beside)
        self._subjects, self._benchmark, self._execution = subjects, recipe.benchmark, execution
        self._random = random.Random(0)
        self._alone = False  # whether memory holds one side at a time only
        self._starting = self._timing = 0.0  # seconds of this round
        self._again = 0
        self._began = self._aside = 0.0  # when rounds began, and seconds since then that were spent on other work
        self._half_width: float | None = None  # half of the widest interval of a latency, as a share of it
        self._turns: list[tuple[Subject, Turn]] = []

    def run(self, examples: list[Example], clear: Clear) -> None:
        """Round after round; the examples are done in the first."""
        fewest, done = self._benchmark.rounds * self._benchmark.turns, 0
        self._began = time.monotonic()
        for number in itertools.count():
            with phase("judging"):
                enough = self._is_enough(number, self._minutes, clear)
            if enough:
                self._execution.progress("timing in turns", done, done)
                return
            self._starting = self._timing = 0.0
            for turn in itertools.count():
                if self._ends(number, turn):
                    break
                if not self._take(number, turn, examples, last=self._again >= AGAIN * max(fewest, done)):
                    self._again += 1
                    self._take(number, turn, examples, last=True)
                done += 1
                precision = "" if self._half_width is None else f"; latencies are known to {self._half_width:.1%}"
                self._execution.progress(f"timing in turns{precision}", done, max(fewest, done))
            began = time.monotonic()
            self._explain()
            self._aside += time.monotonic() - began
            _stop(self._subjects)

    @property
    def turns(self) -> list[Turn]:
        return [turn for _, turn in self._turns]

    def sides(self) -> list[list[Side]]:
        """Of each pair."""
        return [self._sides(pair) for pair in self._pairs]

    def measured(self, pair: list[Subject], original: Subject | None = None) -> Measured:
        """What was measured of a pair, and of the original beside it."""
        outputs = {subject.role: subject.outputs for subject in pair if subject.outputs is not None}
        turns = [turn for subject, turn in self._turns if subject in pair]
        if original is None:
            return Measured(self._sides(pair), outputs, turns)
        return Measured(self._sides(pair), outputs, turns, self._sides([original, pair[-1]])[0], original.outputs)

    def _sides(self, subjects: list[Subject]) -> list[Side]:
        ceilings = _ceilings(self._subjects)
        return [side(subject, _common(subjects), ceilings) for subject in subjects]

    def _is_enough(self, rounds: int, minutes: float, clear: Clear) -> bool:
        """Whether the rounds so far suffice, or there is no time for another."""
        if rounds < min(FEWEST, self._benchmark.rounds):
            return False
        over = self._benchmark.precision is not None and minutes >= self._benchmark.max_minutes
        if over or (rounds >= self._benchmark.rounds and self._benchmark.precision is None):
            return True
        if not self._well():
            return rounds >= self._benchmark.rounds
        return (rounds >= self._benchmark.rounds and self._is_precise(self._well())) or clear(self.sides())

    def _well(self) -> list[Subject]:
        """The sides that have not failed, where some of them can still be compared."""
        pairs = [pair for pair in self._pairs if not any(subject.failures for subject in pair)]
        return [subject for subject in self._subjects if any(subject in pair for pair in pairs)]

    def _within(self, subjects: list[Subject]) -> list[list[Subject]]:
        """The pairs whose sides are all among these."""
        return [pair for pair in self._pairs if all(subject in subjects for subject in pair)]

    def _is_precise(self, subjects: list[Subject]) -> bool:
        """Whether half the interval of every latency, or ratio of two, is at most the share of it that `precision` asks for."""
        halves = [0.0]
        for pair in self._within(subjects):
            for point in _common(pair):
                series = [[[quantile([marks[-1] for marks in turn], 0.5) for turn in turns] for turns in s.rounds[point]] for s in pair]
                effect = paired_ratio(*series) if len(series) > 1 else geometric_mean(series[0])
                interval = effect.interval(self._benchmark.confidence)
                halves.append(math.inf if interval is None else math.log(interval[1] / interval[0]) / 2)
        self._half_width = max(halves) if math.isfinite(max(halves)) else None
        return max(halves) <= (self._benchmark.precision or math.inf)

    @property
    def _minutes(self) -> float:
        """How long the rounds have taken until now."""
        return (time.monotonic() - self._began - self._aside) / 60

    def _is_late(self, rounds: int) -> bool:
        """Whether the fewest rounds won't be done in time unless the next turns are left out; `rounds` of them are done."""
        share = (rounds + 1) / min(FEWEST, self._benchmark.rounds)
        return self._benchmark.precision is not None and self._minutes > share * self._benchmark.max_minutes

    def _ends(self, number: int, turns: int) -> bool:
        """Whether a round that has so many turns needs no more."""
        if turns < self._benchmark.turns:
            return turns > 0 and self._is_late(number)
        if self._benchmark.precision is None or self._alone or not any(_common(pair) for pair in self._within(self._well())):
            return True
        return self._timing >= self._starting

    def _take(self, number: int, turn: int, examples: list[Example], last: bool) -> bool:
        """One turn of each side that has not failed. Says whether it counts: a disturbed one does only as the `last`."""
        taken: list[tuple[Subject, Conditions]] = []
        left = self._random.sample(self._subjects, len(self._subjects))
        while left:
            for subject in left:
                self._do(subject, partial(self._ready, subject, examples))
                if self._alone:
                    break
            together = [subject for subject in left if subject.running]
            taken += self._in_slices(together)
            left = [subject for subject in left if subject not in together and not subject.failures]
        kept = last or not any(conditions.disturbed for _, conditions in taken)
        for subject, conditions in taken:
            self._timing += conditions.seconds
            self._turns.append((subject, Turn(**conditions.model_dump(), role=subject.role, round=number, turn=turn, kept=kept)))
            if kept:
                subject.keep(number)
        return kept

    def _explain(self) -> None:
        """Look at what a step does, once; after the timings of a round, since a profiler may leave traces."""
        for subject in self._subjects:
            if not subject.explained:
                self._do(subject, partial(subject.explain, self._points(subject)))

    def _do(self, subject: Subject, work: Callable[[], T]) -> T | None:
        """Start a side's process if need be, and return what `work` returns; None where the side has failed, or fails now."""
        if subject.failures:
            return None
        others = [s for s in self._subjects if s is not subject and s.running]
        began = time.monotonic()
        try:
            if self._alone:
                _stop(others)
            if not subject.running:
                subject.needless = set(subject.rounds) - set(self._points(subject))
                self._alone = _bring_up(subject, others) or self._alone
                self._starting += time.monotonic() - began
            return work()
        except RunError as error:
            subject.fail(error)
            return None

    def _ready(self, subject: Subject, examples: list[Example]) -> None:
        if subject.outputs is None:
            began = time.monotonic()
            subject.answer(examples)
            self._aside += time.monotonic() - began

    def _in_slices(self, subjects: list[Subject]) -> list[tuple[Subject, Conditions]]:
        """A turn of each, slice by slice: next is the side that is furthest behind; of several that are, a random one."""
        turns = {subject: self._turn(subject) for subject in subjects}
        done, taken = dict.fromkeys(subjects, 0.0), list[tuple[Subject, Conditions]]()
        while turns:
            subject = min(self._random.sample(list(turns), len(turns)), key=done.__getitem__)
            try:
                with phase("timing", subject.role):
                    done[subject] = next(turns[subject])
            except StopIteration as end:
                taken.append((subject, end.value))
                del turns[subject]
            except RunError as error:
                subject.fail(error)
                del turns[subject]
        return taken

    def _turn(self, subject: Subject) -> Generator[float, None, Conditions]:
        environment = subject.loads[-1].environment
        ours = [s.pid for s in self._subjects if s.running]
        machine = Machine(environment["threads"], environment["gpu_uuid"])
        if self._execution.strict and (foreign := machine.strangers(ours)):
            raise DeviceError(
                f"the GPU is shared with process {', '.join(map(str, foreign))}, and --strict was given;"
                " end it, or choose another GPU by CUDA_VISIBLE_DEVICES"
            )
        return (yield from subject.take_turn(machine, self._points(subject), ours))

    def _points(self, subject: Subject) -> list[GridPoint]:
        """The points at which neither this side nor one that it is compared with has failed."""
        pairs = [pair for pair in [*self._pairs, *self._beside] if subject in pair]
        return [point for point in subject.rounds if any(point in _common(pair) for pair in pairs)]


def _bring_up(subject: Subject, others: list[Subject]) -> bool:
    """Start a side beside the others, or without them where memory doesn't hold all. Says whether running alone helped.

    A point that doesn't fit alone either is no reason to measure the sides apart. Nor is one that didn't fit before.
    """
    short_before, loaded = subject.short_of_memory, True
    try:
        subject.start()
    except OutOfMemory:
        if not others:
            raise
        loaded = False
    if loaded and (short_before or not others or not subject.short_of_memory):
        return False
    _stop(others)
    subject.start_alone()
    return not (loaded and subject.short_of_memory)


def _stop(subjects: Iterable[Subject]) -> None:
    for subject in subjects:
        subject.stop()


def _common(subjects: list[Subject]) -> list[GridPoint]:
    """The points at which no side has failed."""
    return [point for point in subjects[0].rounds if all(point not in subject.reasons for subject in subjects)]


def _ceilings(subjects: Iterable[Subject]) -> dict[str, float]:
    """What the machine can do at best. Where both sides measured the same the better one counts, since only disturbances differ."""
    ceilings: dict[str, float] = {}
    for subject in subjects:
        for name, value in (subject.explanation.ceilings if subject.explanation else {}).items():
            ceilings[name] = max(value, ceilings.get(name, 0))
    return ceilings
