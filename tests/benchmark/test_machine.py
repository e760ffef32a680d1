"""What disturbs a turn is seen, and by the right name; a second benchmark waits for the first."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from compress.benchmark import machine
from compress.benchmark.machine import Gpu, Machine, Reading, exclusive
from compress.methods import quiet

CALM = Reading(monotonic=100, awake=100, wall=1000, waited=5, busy=50, stolen=1, used={7: 15, 8: 5})
LATER = Reading(monotonic=110, awake=110, wall=1010, waited=5.1, busy=60, stolen=1.1, used={7: 25})  # the other has ended


def between(threads=1, **changes):
    return Machine(threads, cores=[0, 1]).between(CALM, replace(LATER, **changes))


def test_a_calm_turn():
    conditions = between()
    assert conditions.disturbed == []
    assert (conditions.seconds, conditions.waiting, conditions.steal, conditions.others) == pytest.approx((10, 0.01, 0.005, 0), abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"waited": 7.0, "busy": 69.0}, "it waited 20% of the time for a core, others used 0.9 of 2"),
        ({"stolen": 4.0}, "the hypervisor gave 15% of the cores' time to others"),
        ({"awake": 140}, "the machine slept for 30 s"),
        ({"gpu": Gpu(900, ("its temperature",), ())}, "the GPU was throttled by its temperature"),
        ({"gpu": Gpu(900, (), (77,))}, "process 77 worked on the GPU too"),
        ({"waited": None, "busy": 74.0}, "others used 1.4 of 2 cores"),
    ],
)
def test_what_disturbs_is_named(changes, expected):
    assert between(**changes).disturbed == [expected]


def test_a_process_that_ran_for_a_part_of_the_time_waited_for_a_share_of_that():
    conditions = Machine(1, cores=[0, 1]).between(CALM, replace(LATER, waited=5.2, stolen=1.8), ran=2.0)
    assert (conditions.seconds, conditions.waiting, conditions.steal) == pytest.approx((2, 0.1, 0.04), abs=1e-9)
    assert conditions.disturbed == ["it waited 10% of the time for a core, others used 0.0 of 2"]


def test_what_does_not_disturb():
    assert between(busy=69.0).disturbed == [], "a neighbour has the other core"
    assert between(waited=7.0, threads=8).disturbed == [], "shared by eight threads"
    stepped = between(wall=4000)
    assert (stepped.disturbed, stepped.clock_step) == ([], pytest.approx(2990)), "timings don't use the wall clock"


BUSY = "import os, time; os.sched_setaffinity(0, [0]); end = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass"


def test_a_process_that_shares_its_core_waits():
    """Two that want one core for themselves wait for it half of the time each."""
    both = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2)]
    watched, conditions = Machine(1), None
    time.sleep(0.5)
    before = watched.read(both[0].pid, [both[0].pid])
    time.sleep(0.7)
    conditions = watched.between(before, watched.read(both[0].pid, [both[0].pid]))
    for process in both:
        process.wait()
    if conditions.waiting is None:
        pytest.skip("this kernel doesn't count it")
    assert conditions.waiting > 0.2
    assert conditions.disturbed


def test_the_second_benchmark_waits_until_the_first_has_ended_or_died(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path))
    holder = "import sys\nfrom compress.benchmark import machine\nmachine.tempfile.gettempdir = lambda: sys.argv[1]\nwith machine.exclusive(lambda *_: None): print('held', flush=True); sys.stdin.read()"
    first = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    told, ran = [], threading.Event()

    def second():
        with exclusive(lambda *line: told.append(line[0])):
            ran.set()

    waiting = threading.Thread(target=second)
    waiting.start()
    assert not ran.wait(0.3)
    assert told == ["waiting for another benchmark on this machine"]
    first.kill()
    assert ran.wait(10)
    waiting.join()
    first.wait()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with exclusive(quiet):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        with exclusive(lambda *line: pytest.fail(f"another GPU is no hindrance: {line}")):
            pass


class Nvml:
    """NVML as it answers for one GPU."""

    NVML_CLOCK_SM = 1

    def __init__(self, pids, reasons=0):
        self._pids, self._reasons = pids, reasons

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return uuid

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _):
        return self._reasons

    def nvmlDeviceGetComputeRunningProcesses(self, _):
        return [type("Process", (), {"pid": pid}) for pid in self._pids]

    def nvmlDeviceGetClockInfo(self, *_):
        return 1410


@pytest.mark.parametrize(
    ("pids", "ours", "foreign"),
    [([10, 11], [10, 11], ()), ([10, 99], [10], (99,)), ([70001], [10], ()), ([70001, 70002], [10], (70002,)), ([], [10], ())],
    ids=["alone", "shared", "alone in a container", "shared in a container", "hidden"],
)
def test_who_else_is_on_the_gpu(monkeypatch, pids, ours, foreign):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(pids))
    assert machine.gpu("GPU-1", ours) == Gpu(1410, (), foreign)


def test_why_a_gpu_is_slow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml([], reasons=0x1 | 0x20 | 0x40))
    assert machine.gpu("GPU-1", []).throttled == ("its temperature",), "idle is no trouble"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.gpu("GPU-1", []) is None


def test_what_stays_the_same_is_told():
    assert machine.facts()["affinity"] == sorted(os.sched_getaffinity(0))
