"""What else the machine did during a measurement: read before and after each turn by the parent, without torch.

A turn is disturbed where its process waited for a core, the hypervisor gave cores to others, the machine slept, or the GPU was throttled
or shared. Linux counts the nanoseconds that a process was ready to run and did not. A slow turn is not a disturbed one: whoever measures
again what was slow chooses the result.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from compress.benchmark import nvml
from compress.files import take_lock
from compress.process import Progress
from compress.results.sides import Conditions

WAITING = 0.05  # shares of a turn's time from which on it is disturbed
STEAL = 0.05
SLEPT_S = 0.5
CPUFREQ = Path("/sys/devices/system/cpu")
THROTTLES = {  # NVML's nvmlClocksEventReasons that slow a GPU against its will; idle or chosen clocks do not count
    0x4: "its power cap", 0x8: "hardware slowdown", 0x20: "its temperature", 0x40: "its temperature", 0x80: "the power brake",
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """A GPU now, as NVML has it."""

    sm_clock_mhz: int
    throttled: tuple[str, ...]
    foreign: tuple[int, ...]  # other processes that work on it


@dataclass(frozen=True)
class Reading:
    """Clocks and counters at one moment, times in seconds.

    waited         while the threads of the process were ready to run and did not; None where the kernel doesn't count it
    busy, stolen   of all cores that the process may use
    used           by the processes of the benchmark, by their numbers
    """

    monotonic: float
    awake: float
    wall: float
    waited: float | None
    busy: float
    stolen: float
    used: dict[int, float]
    gpu: Gpu | None = None


@dataclass
class Machine:
    """The machine as a measuring process has it.

    threads   CPU threads of the process
    gpu       the UUID of its GPU
    """

    threads: int
    gpu: str | None = None
    cores: list[int] = field(default_factory=lambda: sorted(os.sched_getaffinity(0)))

    def read(self, pid: int, ours: Sequence[int]) -> Reading:
        """The counters now; `ours` are all processes that belong to the benchmark."""
        times = psutil.cpu_times(percpu=True)
        here = [times[core] for core in self.cores if core < len(times)]
        used = {}
        for process in {os.getpid(), pid, *ours}:
            with suppress(psutil.Error):
                process_times = psutil.Process(process).cpu_times()
                used[process] = process_times.user + process_times.system
        return Reading(
            time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME), time.time(), _waited(pid),
            sum(core.user + core.nice + core.system + core.irq + core.softirq for core in here), sum(core.steal for core in here), used,
            None if self.gpu is None else gpu(self.gpu, ours),
        )  # fmt: skip

    def strangers(self, ours: Sequence[int]) -> tuple[int, ...]:
        """The other processes on the GPU."""
        device = None if self.gpu is None else gpu(self.gpu, ours)
        return () if device is None else device.foreign

    def between(self, before: Reading, after: Reading, ran: float | None = None) -> Conditions:
        """The conditions between two readings; the process `ran` for so many of the seconds, None: for all."""
        seconds = max(after.monotonic - before.monotonic, 1e-9)
        ran = seconds if ran is None else max(ran, 1e-9)
        slept = max(0.0, (after.awake - before.awake) - seconds)
        waiting = None if before.waited is None or after.waited is None else (after.waited - before.waited) / (ran * self.threads)
        steal = (after.stolen - before.stolen) / (seconds * len(self.cores))
        ours = sum(used - before.used[process] for process, used in after.used.items() if process in before.used)
        others = max(0.0, (after.busy - before.busy) - ours) / seconds
        disturbances = []
        if waiting is not None and waiting > WAITING:
            disturbances.append(f"it waited {waiting:.0%} of the time for a core, others used {others:.1f} of {len(self.cores)}")
        elif waiting is None and others > 0.25 and others + self.threads > len(self.cores) + 0.25:
            disturbances.append(f"others used {others:.1f} of {len(self.cores)} cores")
        if steal > STEAL:
            disturbances.append(f"the hypervisor gave {steal:.0%} of the cores' time to others")
        if slept > SLEPT_S:
            disturbances.append(f"the machine slept for {slept:.0f} s")
        if after.gpu is not None:
            disturbances += [f"the GPU was throttled by {reason}" for reason in after.gpu.throttled]
            disturbances += [f"process {other} worked on the GPU too" for other in after.gpu.foreign]
        return Conditions(
            seconds=ran, load=os.getloadavg()[0], waiting=waiting, steal=steal, others=others,
            clock_step=(after.wall - before.wall) - (after.awake - before.awake),
            sm_clock_mhz=None if after.gpu is None else after.gpu.sm_clock_mhz, disturbed=disturbances,
        )  # fmt: skip


def facts() -> dict[str, Any]:
    """What stays the same throughout a benchmark, for the report's environment."""
    governors = {file.read_text().strip() for file in CPUFREQ.glob("cpu*/cpufreq/scaling_governor")}
    return {"affinity": sorted(os.sched_getaffinity(0)), "governor": ", ".join(sorted(governors)) or None}


def commit(folder: Path) -> str | None:
    """The git commit that a folder is at, with -dirty behind it where files differ from it; None where git doesn't say."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode().strip()
    return None


@contextmanager
def exclusive(progress: Progress) -> Iterator[None]:
    """Hold the machine's benchmark lock: two at once would measure each other, so the second waits. The kernel frees it if one is killed.

    Benchmarks that are confined to different GPUs don't wait for each other.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace("/", "-")
    place = Path(tempfile.gettempdir()) / f"compress-benchmark-{seen}.lock"
    with suppress(OSError):
        place.touch(mode=0o666)
        place.chmod(0o666)  # whoever created it, all may lock it
    with place.open("r") as file:
        take_lock(file, "benchmark on this machine", progress)
        yield


def gpu(uuid: str, ours: Sequence[int]) -> Gpu | None:
    """A GPU now; None where NVML is absent or doesn't say."""
    try:
        pynvml, handle = nvml.device(uuid)
        reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        throttled = dict.fromkeys(name for bit, name in THROTTLES.items() if reasons & bit)
        there = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        clock = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
    except Exception:  # NVML has an error class for each of its troubles; none of them may end a measurement
        return None
    strangers = sorted(there - {*ours})
    if len(strangers) == len(there):  # in a container the process ids are the host's; as many as `ours` has are ours
        strangers = strangers[len(ours) :]
    return Gpu(int(clock), tuple(throttled), tuple(strangers))


def _waited(pid: int) -> float | None:
    """Seconds that a process's threads have been ready to run and did not (Linux: /proc/PID/task/*/schedstat)."""
    waits = []
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError, IndexError, ValueError):  # a thread may end meanwhile
            waits.append(int(task.read_text().split()[1]))
    return sum(waits) / 1e9 if waits else None
