"""When rounds end, and what is done with a turn that was disturbed: by subjects that only pretend."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from compress.benchmark import isolate, subject
from compress.benchmark.isolate import Session
from compress.benchmark.messages import WarmedUp
from compress.errors import DeviceError, RunError
from compress.execution import Execution
from compress.recipe import Benchmark
from compress.results.sides import Conditions

POINT = (1, 8)
TRANSFORMERS = SimpleNamespace(is_plain=True)


def conditions(*disturbed):
    return Conditions(seconds=1, load=0, waiting=0, steal=0, others=0, clock_step=0, disturbed=list(disturbed))


class Subject(subject.Subject):
    """One side whose latencies are `base` times what `luck` gives, a number a turn."""

    def __init__(self, role, base, luck, disturbed=()):
        self.role, self._base, self._luck, self._disturbed = role, base, iter(luck), set(disturbed)
        self.rounds, self.reasons, self.failures, self.outputs, self.number = {POINT: []}, {}, [], {}, 0
        self.loads = [SimpleNamespace(environment={"threads": 1, "gpu_uuid": None})]
        self.joules, self.explanation, self.explained = {POINT: []}, None, True
        self._child = None
        self.starts = 0

    pid = 1

    def start(self):
        self._child, self.starts = object(), self.starts + 1

    def stop(self):
        self._child = None

    @property
    def short_of_memory(self):
        return False

    def take_turn(self, machine, usable, ours):
        yield 0.5
        self._taken = {POINT: ([[self._base * next(self._luck)]], None)}
        self.number += 1
        return conditions(*(["it was"] if self.number in self._disturbed else []))


def benchmark(**changes):
    return Benchmark(**{"batch_sizes": [1], "prompt_tokens": [8], "rounds": 3, "turns": 1, "precision": 0.02, **changes})


def session(subjects, settings, monkeypatch, clear=lambda _: False):
    measuring = Session(subjects, type("Recipe", (), {"benchmark": settings}), Execution())
    monkeypatch.setattr(measuring, "sides", list)
    measuring.run([], clear)
    return measuring


def noisy(spread):
    while True:
        yield from (1 + spread, 1 - spread, 1, 1 - spread / 2, 1 + spread / 2)


@pytest.mark.parametrize(("spread", "most"), [(0.001, 3), (0.03, 20)])
def test_rounds_follow_until_the_ratio_is_precise(monkeypatch, spread, most):
    sides = [Subject("baseline", 1.0, noisy(0)), Subject("candidate", 0.5, noisy(spread))]
    session(sides, benchmark(), monkeypatch)
    rounds = len(sides[0].rounds[POINT])
    assert rounds == sides[1].starts == len(sides[1].rounds[POINT])
    assert (rounds == 3) if spread < 0.01 else (3 < rounds <= most)
    logs = np.log([turns[0][0][0] for turns in sides[1].rounds[POINT]])
    before, now = (stats.t.ppf(0.975, n - 1) * stats.sem(logs[:n]) for n in (rounds - 1, rounds))
    assert now <= 0.02
    assert rounds == 3 or before > 0.02


def test_no_round_begins_when_time_is_over(monkeypatch):
    sides = [Subject("baseline", 1.0, noisy(0)), Subject("candidate", 0.5, np.random.default_rng(0).uniform(0.2, 5, 1000))]
    monkeypatch.setattr(isolate.time, "monotonic", lambda: 30 * sides[0].starts)  # each round takes half a minute
    session(sides, benchmark(max_minutes=2), monkeypatch)
    assert len(sides[0].rounds[POINT]) == 4


def test_where_the_fewest_rounds_take_too_long_they_have_a_turn_each(monkeypatch):
    sides = [Subject("baseline", 1.0, noisy(0)), Subject("candidate", 0.5, np.random.default_rng(0).uniform(0.2, 5, 1000))]
    monkeypatch.setattr(isolate.time, "monotonic", lambda: 60 * sides[0].starts)
    session(sides, benchmark(max_minutes=2, rounds=5, turns=9), monkeypatch)
    assert [len(turns) for turns in sides[0].rounds[POINT]] == [1, 1, 1]
    sides = [Subject("baseline", 1.0, noisy(0)), Subject("candidate", 0.5, np.random.default_rng(0).uniform(0.2, 5, 1000))]
    session(sides, benchmark(precision=None, rounds=5, turns=9), monkeypatch)
    assert [len(turns) for turns in sides[0].rounds[POINT]] == 5 * [9], "without a precision they are as many as are expected"


def test_a_point_that_can_not_be_done_in_time_is_left_out_with_the_reason(tmp_path):
    points = {"batch_sizes": [1, 4], "prompt_tokens": [64], "new_tokens": 24, "warmup": 0}
    asked, marks = [], [6.0 + 0.1 * token for token in range(24)]  # of which four prompts take 26 s, and 7 runs 3 minutes

    class Slow(subject.Subject):
        def _load(self):
            return None

        def _warm_up(self, point):
            asked.append(point)
            return WarmedUp(memory={"peak": 1}, marks=marks)

    def started(**changes):
        asked.clear()
        recipe = SimpleNamespace(benchmark=Benchmark(**points, **changes), engine=TRANSFORMERS)
        side = Slow("candidate", None, recipe, Execution("cpu", tmp_path / "log"), tmp_path)
        side.start()
        return side

    side = started(max_minutes=2)
    assert side.reasons == {(4, 64): "a run takes 26 s or more; 7 of them are too many for max_minutes"}
    assert asked == [(1, 64)]
    side.start()
    assert asked == [(1, 64), (1, 64)]
    for enough in ({"max_minutes": 4}, {"max_minutes": 2, "precision": None}):
        assert started(**enough).reasons == {}
        assert asked == [(1, 64), (4, 64)]


@pytest.mark.parametrize(
    ("seconds", "changes", "runs"),
    [(0.4, {}, [1, 1]), (4.0, {}, [1, 0]), (4.0, {"warmup": 3}, [3, 3]), (4.0, {"runtime": {"compile": True, "cache": "static"}}, [1, 1])],
)
def test_a_long_run_is_warmed_up_by_itself_once_the_heap_has_been_seen(tmp_path, monkeypatch, seconds, changes, runs):
    asked = []

    class Slow(subject.Subject):
        def _load(self):
            self._child = SimpleNamespace(pid=os.getpid())
            return

        def ask(self, request):
            asked.append(request.repeats)
            return WarmedUp(memory={"peak": 1}, marks=[seconds])

    settings = Benchmark(**{"batch_sizes": [1], "prompt_tokens": [8], "warmup": 0, "precision": None, **changes})
    side = Slow("candidate", None, SimpleNamespace(benchmark=settings, engine=TRANSFORMERS), Execution("cpu", tmp_path / "log"), tmp_path)
    side.start()
    side.start()
    assert asked == runs


@pytest.mark.parametrize(("precision", "turns"), [(None, 2), (0.02, 7)])
def test_a_round_takes_turns_for_as_long_as_its_processes_took_to_start(monkeypatch, precision, turns):
    sides = [Subject("baseline", 1.0, noisy(0)), Subject("candidate", 0.5, noisy(0))]
    monkeypatch.setattr(isolate.time, "monotonic", lambda: 7 * sum(side.starts for side in sides))  # and a turn of each takes two seconds
    session(sides, benchmark(precision=precision, turns=2), monkeypatch)
    assert [len(taken) for side in sides for taken in side.rounds[POINT]] == 6 * [turns]


def test_a_point_that_one_side_cannot_do_in_time_is_not_warmed_up_by_the_other(monkeypatch):
    sides, large, starts = [Subject("baseline", 1.0, noisy(0)), Subject("candidate", 0.5, noisy(0))], (4, 8), []
    for side in sides:
        side.rounds[large], side.joules[large] = [], []
        monkeypatch.setattr(side, "start", lambda side=side, start=side.start: starts.append(side) or note(side) or start())

    def note(side):
        if len(starts) == 1:
            side.reasons[large] = "a run takes long"
        else:
            assert large in side.needless

    session(sides, benchmark(precision=None, rounds=3, turns=2), monkeypatch)
    assert len(starts) == 6


def no_time():
    yield 0.5
    return conditions().model_copy(update={"seconds": 0.0})


def test_a_round_with_nothing_to_time_has_the_fewest_turns(monkeypatch):
    sides = [Subject("baseline", 1.0, noisy(0)), Subject("candidate", 0.5, noisy(0))]
    for side in sides:
        side.reasons[POINT] = "out of memory"
        monkeypatch.setattr(side, "take_turn", lambda *_: no_time())
        monkeypatch.setattr(side, "keep", lambda _: None)
    monkeypatch.setattr(isolate.time, "monotonic", lambda: 7 * sum(side.starts for side in sides))
    measured = session(sides, benchmark(precision=0.02, turns=2), monkeypatch)
    assert {(turn.round, turn.turn) for turn in measured.turns} == {(number, turn) for number in range(3) for turn in range(2)}


def test_without_a_precision_there_are_just_the_rounds(monkeypatch):
    sides = [Subject("baseline", 1.0, noisy(0)), Subject("candidate", 0.5, noisy(0.3))]
    session(sides, benchmark(precision=None, rounds=2), monkeypatch)
    assert len(sides[0].rounds[POINT]) == 2


def test_what_is_clear_ends_the_rounds_but_not_before_the_third(monkeypatch):
    sides = [Subject("baseline", 1.0, noisy(0)), Subject("candidate", 0.5, noisy(0.3))]
    session(sides, benchmark(rounds=9), monkeypatch, clear=lambda _: True)
    assert len(sides[0].rounds[POINT]) == 3


def test_a_disturbed_turn_is_taken_again_by_both_sides(monkeypatch):
    sides = [Subject("baseline", 1.0, iter([1, 9, 1, 1, 1])), Subject("candidate", 0.5, noisy(0), disturbed=[2])]
    measured = session(sides, benchmark(rounds=2, turns=2, precision=None), monkeypatch)
    assert [[turn[0][0] for turn in turns] for turns in sides[0].rounds[POINT]] == [[1, 1], [1, 1]]
    assert [(t.round, t.turn, t.kept) for t in measured.turns if t.role == "baseline"] == [
        (0, 0, True), (0, 1, False), (0, 1, True), (1, 0, True), (1, 1, True),
    ]  # fmt: skip


def test_on_a_machine_that_never_rests_half_of_the_turns_again_are_tried(monkeypatch):
    sides = [Subject("baseline", 1.0, noisy(0)), Subject("candidate", 0.5, noisy(0), disturbed=range(100))]
    measured = session(sides, benchmark(rounds=3, turns=2, precision=None), monkeypatch)
    assert sum(turn.kept for turn in measured.turns) == 2 * 6
    assert [(t.round, t.turn) for t in measured.turns if not t.kept and t.role == "baseline"] == [(0, 0), (0, 1), (1, 0)]
    assert [len(turns) for turns in sides[1].rounds[POINT]] == [2, 2, 2]


class Sliced(Subject):
    """Its turns take so many slices, which are noted; in the second round it dies after the first."""

    def __init__(self, role, slices, order, dies=False):
        super().__init__(role, 1.0, noisy(0))
        self._slices, self._order, self._dies = slices, order, dies

    def take_turn(self, machine, usable, ours):
        for slice in range(self._slices):
            self._order.append((self._slices, slice))
            yield (slice + 1) / (self._slices + 1)
            if self._dies and self.starts == 2:
                raise RunError("it was killed")
        return (yield from super().take_turn(machine, usable, ours))


def test_in_a_turn_who_is_the_furthest_behind_has_the_next_slice(monkeypatch):
    order = []
    sides = [Sliced("baseline", 8, order), Sliced("candidate", 4, order), Sliced("candidate", 2, order, dies=True)]
    session(sides, benchmark(rounds=2, precision=None), monkeypatch)
    first = order[: 8 + 4 + 2]
    done = dict.fromkeys((8, 4, 2), 0.0)
    for slices, slice in first:
        assert done[slices] == min(share for share in done.values() if share < 1)
        done[slices] = 1 if slice == slices - 1 else (slice + 1) / (slices + 1)
    assert sorted(order[14:]) == sorted([(8, n) for n in range(8)] + [(4, n) for n in range(4)] + [(2, 0)])
    assert [len(side.rounds[POINT]) for side in sides] == [2, 2, 1]
    assert [side.failures for side in sides] == [[], [], ["candidate: it was killed"]]
    assert not any(side.running for side in sides)


def test_where_memory_holds_one_side_each_takes_its_whole_turn_alone(monkeypatch):
    order = []
    sides = [Sliced("baseline", 3, order), Sliced("candidate", 2, order)]
    monkeypatch.setattr(isolate, "_bring_up", lambda side, others: (isolate._stop(others), side.start()) and bool(others))
    session(sides, benchmark(rounds=2, precision=None), monkeypatch)
    assert [len(side.rounds[POINT]) for side in sides] == [2, 2]
    assert order[5:] in ([(3, 0), (3, 1), (3, 2), (2, 0), (2, 1)], [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])


def test_a_shared_gpu_is_refused_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(subject.Machine, "strangers", lambda *_: (4711,))
    measured = Session([Subject("candidate", 1.0, noisy(0))], type("Recipe", (), {"benchmark": benchmark()}), Execution(strict=True))
    with pytest.raises(DeviceError, match="shared with process 4711, and --strict was given; end it, or choose another GPU"):
        measured.run([], lambda _: False)


class Unexplained(Subject):
    """Its step can't be looked at."""

    _recipe = type("Recipe", (), {"benchmark": benchmark()})

    def ask(self, request):
        raise RunError("the profiler is not here")


def test_a_step_that_can_not_be_looked_at_costs_no_timings(monkeypatch):
    side = Unexplained("candidate", 1.0, noisy(0))
    side.explanation, side.explained, side.remarks = None, False, []
    session([side], benchmark(precision=None, rounds=2), monkeypatch)
    assert (side.failures, len(side.rounds[POINT])) == ([], 2)
    assert side.remarks == ["where a step's time goes could not be looked at: the profiler is not here"]
