"""The memory of a measuring process seen from outside, every 10 ms: its resident memory, and NVML's view of the GPUs.

The process's own high-water marks miss nothing. Samples miss what comes and goes between two of them, but come from another source. So
one checks the other. Nothing here needs torch.
"""

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

INTERVAL_S = 0.01


class Sampler:
    """Samples a process for as long as its context lasts.

    resident   the most bytes that were resident
    gpu        the most bytes that the process held of a GPU; None where there is none or NVML can't see the process (containers)
    foreign    the most that processes outside the benchmark held of that same GPU
    """

    def __init__(self, pid: int):
        self._pid, self._end = pid, threading.Event()
        self._nvml, self._devices = _devices()
        self.resident = self.foreign = 0
        self.gpu: int | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.resident = max(self.resident, _resident(self._pid))
            for device in self._devices:
                self._look(device)
            if self._end.wait(INTERVAL_S):
                return

    def _look(self, device: Any) -> None:
        try:
            held = {process.pid: process.usedGpuMemory or 0 for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(device)}
        except self._nvml.NVMLError:  # a device that doesn't tell
            return
        if self._pid not in held:
            return
        self.gpu = max(self.gpu or 0, held[self._pid])
        ours = {child.pid for child in psutil.Process().children()}  # the other side's process may be there too
        self.foreign = max(self.foreign, sum(size for pid, size in held.items() if pid not in ours))


def _resident(pid: int) -> int:
    """Bytes resident of a process now; none where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:")), 0)


def _devices() -> tuple[Any, list[Any]]:
    """NVML and its devices; none where either is absent."""
    try:
        import pynvml
    except ImportError:
        return None, []
    try:
        pynvml.nvmlInit()
        return pynvml, [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return pynvml, []
