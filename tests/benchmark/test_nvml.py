"""What NVML is asked, and that its troubles are no one else's."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from compress.benchmark import nvml


@pytest.fixture
def driver(monkeypatch):
    """An NVML with one GPU."""
    asked = []
    processes = [SimpleNamespace(pid=1, usedGpuMemory=5), SimpleNamespace(pid=os.getpid(), usedGpuMemory=7)]
    library = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=asked.append, nvmlDeviceGetComputeRunningProcesses=lambda handle: processes,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 12_500, asked=asked,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid="1-2"))
    return library


def test_energy_is_in_joules_and_memory_this_process_s(driver):
    assert nvml.joules() == 12.5
    assert nvml.process_bytes() == 7
    assert driver.asked == ["GPU-1-2"] * 2


def test_a_gpu_that_does_not_tell_gives_none(driver):
    def refuse(handle):
        raise RuntimeError("Not Supported")

    driver.nvmlDeviceGetTotalEnergyConsumption = driver.nvmlDeviceGetComputeRunningProcesses = refuse
    assert nvml.joules() is None and nvml.process_bytes() is None


def test_without_the_package_there_is_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.joules() is None and nvml.process_bytes() is None


@pytest.mark.gpu
def test_a_gpu_draws_energy():
    pytest.importorskip("pynvml")
    before = nvml.joules()
    if before is None:
        pytest.skip("this GPU doesn't count it")
    square = torch.rand(4096, 4096, device="cuda")
    for _ in range(200):
        square @ square
    torch.cuda.synchronize()
    assert nvml.joules() > before
