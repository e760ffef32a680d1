"""What holds the memory of a measured process: attributed, seen from inside and outside alike, and still told when the process is killed."""

import ctypes
import os
import signal
import sys
import types

import pytest
import torch

from compress.benchmark import memory
from compress.benchmark.sampler import Sampler
from compress.benchmark.selftest import Faulty
from compress.benchmark.subject import Subject
from compress.execution import Execution
from compress.methods import quiet
from compress.model.source import Source
from compress.nursery import nursery
from compress.recipe import load
from tests.blocks import cache_left
from tests.conftest import TASKS, make_model, recipe_for

MB = 1_000_000


def subject(kind, toys, rows, write_recipe, log, progress=quiet):
    source = Source(str(toys[kind]), TASKS[kind], "float32")
    return Subject("candidate", source, load(write_recipe(recipe_for(kind, toys[kind], rows))), Execution("cpu", log, progress), log.parent)


@pytest.mark.parametrize("kind", TASKS)
def test_the_cache_is_what_a_generation_leaves(kind):
    model, batch, prompt, new = make_model(kind).eval(), 3, 8, 4
    left = cache_left(model, batch, prompt, new)
    numbers = {  # layers x keys and values x tokens x heads x width, counted by hand
        "t5": 2 * 2 * (new + prompt) * 4 * 16,
        "bart": 2 * 2 * (new + prompt) * 4 * 16,
        "llama": 2 * 2 * (prompt + new - 1) * 2 * 16,
        "gpt2": 2 * 2 * (prompt + new - 1) * 4 * 16,
        "bert": 0,
    }
    assert left == 4 * batch * numbers[kind]


@pytest.mark.slow
def test_what_holds_the_memory_adds_up(toys, rows, write_recipe, tmp_path):
    from compress.benchmark.figures import _memory, _sizes

    measured = subject("llama", toys, rows, write_recipe, tmp_path / "log")
    try:
        measured.start()
    finally:
        measured.stop()
    figures = {m.metric: m.value for m in [*_sizes(measured), *_memory(measured, measured.usable)]}
    held = figures["weight_bytes"] + figures["kv_cache_bytes"] + figures["activation_bytes"] + figures["other_bytes"]
    assert held == pytest.approx(figures["peak_run_bytes"], rel=1e-9)
    assert figures["kv_cache_bytes"] == 4 * 2 * 2 * 2 * (8 + 3) * 2 * 16
    assert 0 < figures["buffer_bytes"] < figures["weight_bytes"]
    assert figures["sampled_run_bytes"] <= figures["peak_run_bytes"] + figures["allocator_slack_bytes"] + MB
    assert figures["sampled_load_bytes"] > 0.5 * figures["peak_load_bytes"]


@pytest.mark.slow
def test_a_point_whose_process_is_killed_is_out_of_memory_and_the_others_go_on(toys, rows, write_recipe, tmp_path):
    def kill_at_the_first(what, done, total):
        if what == "candidate: warming up" and (done, total) == (0, 2):
            os.kill(measured._child.pid, signal.SIGSTOP)  # it can't answer before it is killed
            os.kill(measured._child.pid, signal.SIGKILL)

    measured = subject("llama", toys, rows, write_recipe, tmp_path / "log", kill_at_the_first)
    try:
        measured.start()
    finally:
        measured.stop()
    assert measured.reasons == {(1, 8): "out of memory: its process was killed"}
    assert measured.short_of_memory
    assert list(measured.peaks[0]) == [(2, 8)]


@pytest.mark.slow
def test_the_peak_is_the_same_in_every_process_and_eight_more_megabytes_show(toys, rows, write_recipe, tmp_path):
    """In processes of their own, as they are measured: in this one, what other tests left behind comes and goes."""
    source, loaded = Source(str(toys["t5"]), "seq2seq", "float32"), load(write_recipe(recipe_for("t5", toys["t5"], rows)))
    sides = [
        subject("t5", toys, rows, write_recipe, tmp_path / "log"),
        Faulty({"resident_bytes": 8 * MB}, source, loaded, Execution("cpu", tmp_path / "log")),
    ]
    with nursery():
        for measured in sides:
            for _ in range(3):
                measured.start()
                measured.stop()
    plain, more = ([peaks[(2, 8)]["peak"] for peaks in measured.peaks] for measured in sides)
    assert max(plain) - min(plain) < MB / 4
    assert sum(more) / 3 - sum(plain) / 3 == pytest.approx(8 * MB, abs=MB / 4)


def test_the_sampler_sees_what_a_process_holds():
    block = torch.ones(64 * MB // 4)
    with Sampler(os.getpid()) as sampler:
        pass
    assert sampler.resident == pytest.approx(memory._status("VmRSS"), rel=0.05)
    assert sampler.resident > block.nbytes
    assert (sampler.gpu, sampler.foreign) == (None, 0)


def test_other_processes_on_the_gpu_are_seen(monkeypatch):
    """NVML told by hand: device 0 is somebody else's, device 1 is shared with 5 GB of somebody's."""
    process = types.SimpleNamespace
    held = {
        0: [process(pid=4_000_001, usedGpuMemory=70_000 * MB)],
        1: [process(pid=os.getpid(), usedGpuMemory=900 * MB), process(pid=4_000_002, usedGpuMemory=5_000 * MB)],
    }
    told = types.SimpleNamespace(
        NVMLError=RuntimeError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 2, nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetComputeRunningProcesses=held.get,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", told)
    monkeypatch.setattr(
        "compress.benchmark.sampler.psutil.Process", lambda: types.SimpleNamespace(children=lambda: [process(pid=os.getpid())])
    )
    with Sampler(os.getpid()) as sampler:
        pass
    assert (sampler.gpu, sampler.foreign) == (900 * MB, 5_000 * MB)


def test_memory_apart_leaves_no_holes():
    """A large tensor between two small ones: freed, it is given back at once."""
    assert ctypes.CDLL(None).malloc_trim, "this needs glibc"
    with memory.apart():
        before = memory._status("VmRSS")
        held = [torch.ones(4 * MB // 4) for _ in range(9)]
        del held[0:8]
        assert memory._status("VmRSS") - before < 6 * MB
