"""Where time goes: a clock that runs for one phase at a time, what children tell of it, what a report shows."""

import pytest

from compress import phases
from compress.phases import REST, Phase
from compress.process import Bars
from compress.report import times
from tests.report.test_files import made


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_time_counts_for_the_innermost_phase_alone(clock):
    with phases.watching() as watch:
        clock(1)
        with phases.phase("loading", "baseline"):
            clock(2)
            with phases.phase("imports"):
                clock(4)
            clock(8)
        with pytest.raises(ValueError, match="it failed"), phases.phase("timing"):
            clock(16)
            raise ValueError("it failed")
        clock(32)
        spent = watch.phases()
    assert spent == [Phase("loading", 10, "baseline"), Phase("imports", 4), Phase("timing", 16), Phase(REST, 33)]
    assert sum(phase.seconds for phase in spent) == 63
    with phases.phase("nobody watches"):
        clock(64)
    assert sum(phase.seconds for phase in watch.phases()) == 63 + 64, "a watch goes on; who watches decides when to look"


def test_what_a_child_tells_is_taken_from_the_phase_that_waited(clock):
    with phases.watching() as watch:
        with phases.phase("examples", "candidate"):
            clock(10)
            phases.told({"generating": 6.0, "scoring": 1.0}, waited=10)
        with phases.phase("stages"):
            clock(4)
            phases.told({"imports": 8.0}, waited=4)  # it had begun before it was asked
    spent = {(phase.name, phase.side): phase.seconds for phase in watch.phases()}
    assert spent == {
        ("examples", "candidate"): 3, ("generating", "candidate"): 6, ("scoring", "candidate"): 1, ("stages", None): 0,
        ("imports", None): 4, (REST, None): 0,
    }  # fmt: skip


def test_two_watches_become_one():
    first, second = [Phase("imports", 1), Phase(REST, 2)], [Phase("imports", 3), Phase("timing", 4, "baseline"), Phase(REST, 5)]
    assert phases.merged(first, second) == [Phase("imports", 4), Phase("timing", 4, "baseline"), Phase(REST, 7)]


def test_a_report_tells_it_in_a_sentence_and_a_table():
    spent = [
        Phase("stages", 31), Phase("generating", 50, "baseline"), Phase("generating", 30, "candidate"), Phase("judging", 0.2), Phase(REST, 7),
    ]  # fmt: skip
    report = made().model_copy(update={"phases": spent})
    assert times.sentence(report) == "where the 2 min went: generating 80 s, stages 31 s, the rest 7 s"
    assert times.rows(report) == [
        ["generating", "50.0 s", "30.0 s", "-", "80.0 s"], ["stages", "-", "-", "31.0 s", "31.0 s"], ["judging", "-", "-", "0.2 s", "0.2 s"],
        [REST, "-", "-", "7.0 s", "7.0 s"], ["the whole", "-", "-", "-", "118.2 s"],
    ]  # fmt: skip
    assert times.section(made()) == ""


def test_an_answered_request_ends_its_bars():
    seen = []
    bars = Bars(lambda *step: seen.append(step))
    for step in (("training; loss 3", 1, 9), ("training; loss 2", 5, 9), ("scoring", 0, 2), ("scoring", 2, 2)):
        bars(*step)
    bars.end()
    assert seen[4:] == [("training; loss 2", 9, 9)]
