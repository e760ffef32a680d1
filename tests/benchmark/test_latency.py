"""The clock: as many marks as tokens, on any architecture. No test asserts a speed."""

import time
from itertools import pairwise
from types import SimpleNamespace

import pytest

from compress.benchmark import latency
from compress.benchmark.messages import Time
from compress.benchmark.subject import Subject
from tests.conftest import TASKS
from tests.measuring import loaded


@pytest.mark.parametrize("kind", ["t5", "bart", "llama", "gpt2"])
def test_every_forced_token_is_timed(toys, kind):
    engine = loaded(toys[kind], TASKS[kind], dtype="float32")[0].engine
    prompts = latency.prompts(engine.traits, 2, 8)
    assert [len(row) for row in prompts] == [8, 8]
    seconds = latency.seconds(engine, prompts, 6)
    assert len(seconds) == 6
    assert all(0 < a < b for a, b in pairwise(seconds))


def test_a_generation_may_rest_after_each_token_and_the_rest_does_not_count(toys):
    engine = loaded(toys["t5"], TASKS["t5"], dtype="float32")[0].engine
    prompts, told = latency.prompts(engine.traits, 1, 8), []
    latency.seconds(engine, prompts, 6)

    def rest(tokens):
        told.append(tokens)
        time.sleep(0.1)

    began = time.perf_counter()
    seconds = latency.seconds(engine, prompts, 6, rest)
    whole = time.perf_counter() - began
    assert told == [1, 2, 3, 4, 5, 6]
    assert all(0 < a < b for a, b in pairwise(seconds))
    assert 0 < seconds[-1] <= whole - 0.6


def test_a_rest_comes_when_a_slice_is_over_also_between_short_generations(monkeypatch):
    now, told = [0.0], []

    def rest(done):
        told.append((done, now[0]))
        now[0] += 10

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    pace = latency.Pace(rest)
    for before in range(0, 12, 3):
        for tokens in (1, 2, 3):
            now[0] += 0.02
            pace(before, tokens)
    assert [done for done, _ in told] == [3, 6, 9, 12]
    assert [round(when, 2) for _, when in told] == [0.06, 10.12, 20.18, 30.24]


def test_a_turn_tells_how_much_of_it_is_done(toys, monkeypatch):
    worker, told = loaded(toys["llama"], "causal-lm", dtype="float32")[0], []
    monkeypatch.setattr(latency, "SLICE_S", 0)
    timings = worker.time(lambda *line: told.append(line), Time([(1, 4), (2, 8)], new_tokens=3, iterations=2))
    assert told == [("timing", done, 12) for done in range(1, 13)]
    assert [[len(marks) for marks in point] for point in timings.seconds] == [[3, 3], [3, 3]]


def test_a_turn_of_a_side_lasts_as_long_as_its_slices(monkeypatch):
    """What a side is asked, told by hand: three slices of a second each, between which others have ten."""
    now, handed = [0.0], {}

    def ask_in_slices(request, limit_s, **arguments):
        handed.update(arguments, request=request, limit_s=limit_s)
        for share in (0.4, 0.8):
            now[0] += 1
            yield share
        now[0] += 1
        return {"seconds": [[[1.5, 3.0]]], "joules": [None]}

    side = Subject.__new__(Subject)
    side._recipe = SimpleNamespace(benchmark=SimpleNamespace(limit_minutes=2, new_tokens=2, iterations=1))
    side._child = SimpleNamespace(pid=1, ask_in_slices=ask_in_slices)
    side.rounds, side.joules = {(1, 8): []}, {(1, 8): []}
    monkeypatch.setattr("compress.benchmark.subject.time.monotonic", lambda: now[0])
    machine = SimpleNamespace(read=lambda pid, ours: now[0], between=lambda *readings: readings)
    turn, shares = side.take_turn(machine, [(1, 8)], [1]), []
    while True:
        try:
            shares.append(next(turn))
        except StopIteration as end:
            returned = end.value
            break
        now[0] += 10
    assert (shares, returned) == ([0.4, 0.8], (0.0, 23.0, 3.0))
    assert (handed["request"], handed["limit_s"], handed["points"]) == ("Time", 120, [(1, 8)])
    side.keep(0)
    assert side.rounds == {(1, 8): [[[[1.5, 3.0]]]]}
    with pytest.raises(StopIteration) as end:
        next(side.take_turn(machine, [], [1]))
    assert end.value.value == (23.0, 23.0), "a side without points isn't asked"


def test_prompts_are_the_same_for_both_sides(toys):
    baseline, candidate = (loaded(toys["llama"], "causal-lm", dtype=dtype)[0].engine.traits for dtype in ("float32", "bfloat16"))
    assert latency.prompts(baseline, 3, 10) == latency.prompts(candidate, 3, 10)
    assert len({token for row in latency.prompts(baseline, 3, 10) for token in row}) > 10


def test_a_classification_is_one_mark(toys):
    engine = loaded(toys["bert"], "sequence-classification", dtype="float32")[0].engine
    assert len(latency.seconds(engine, latency.prompts(engine.traits, 2, 8), 6)) == 1


@pytest.mark.gpu
def test_cuda_events_mark_every_token(toys):
    engine = loaded(toys["llama"], "causal-lm", "cuda", "float16")[0].engine
    seconds = latency.seconds(engine, latency.prompts(engine.traits, 2, 8), 6)
    assert len(seconds) == 6
    assert all(0 < a < b for a, b in pairwise(seconds))
