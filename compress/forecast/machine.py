"""The machines that a forecast is for: well-known GPUs by name, or this machine; their memory, and roughly their speed."""

import os
from dataclasses import dataclass, replace

import psutil

from compress.errors import DeviceError

GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """A GPU or CPU.

    memory_bytes   of the GPU, or of the main memory what is free
    bytes_per_s    read from memory
    flops          operations a second on matrices, in 16 bits on a GPU and in 32 on a CPU
    """

    name: str
    device: str
    memory_bytes: int
    bytes_per_s: float
    flops: float


def _gpu(name: str, gib: int, gb_per_s: float, tflops: float) -> Machine:
    return Machine(name, "cuda", gib * GIB, gb_per_s * 1e9, tflops * 1e12)


# From NVIDIA's data sheets: memory, its bandwidth, dense tensor-core throughput in 16 bits (half of the figure "with sparsity").
GPUS = {
    machine.name: machine
    for machine in [
        _gpu("t4-16gb", 16, 320, 65),
        _gpu("v100-16gb", 16, 900, 125),
        _gpu("v100-32gb", 32, 900, 125),
        _gpu("rtx-3090-24gb", 24, 936, 71),
        _gpu("rtx-4090-24gb", 24, 1008, 165),
        _gpu("a10-24gb", 24, 600, 125),
        _gpu("l4-24gb", 24, 300, 121),
        _gpu("l40s-48gb", 48, 864, 362),
        _gpu("a100-40gb", 40, 1555, 312),
        _gpu("a100-80gb", 80, 2039, 312),
        _gpu("h100-80gb", 80, 3350, 989),
        _gpu("h200-141gb", 141, 4800, 989),
    ]
}
# Assumed for a core of a server's CPU with AVX2: 40 GFLOP/s on float32 matrices, 8 GB/s of memory bandwidth; a rough magnitude.
CORE_FLOPS, CORE_BYTES_PER_S = 40e9, 8e9


def named(gpu: str) -> Machine:
    """A GPU of the table. Raises DeviceError."""
    if gpu not in GPUS:
        raise DeviceError(f"--gpu {gpu}: its memory and speed aren't known here; supported: {', '.join(GPUS)}")
    return GPUS[gpu]


def here(threads: int | None) -> Machine:
    """This machine's first GPU where NVML sees one, or else its CPU, with the memory that is free now.

    threads   of the CPU; None takes all that the process may use
    """
    cores = min(threads or 4096, len(os.sched_getaffinity(0)))
    free = psutil.virtual_memory().available
    return _own_gpu() or Machine("this machine's CPU", "cpu", free, cores * CORE_BYTES_PER_S, cores * CORE_FLOPS)


def _own_gpu() -> Machine | None:
    """The first GPU, as fast as the one of that name in the table, or as the slowest there."""
    try:
        import pynvml

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        name, free = str(pynvml.nvmlDeviceGetName(device)), int(pynvml.nvmlDeviceGetMemoryInfo(device).free)
    except Exception:  # NVML isn't here, or has no device, and has an error class for each of its troubles
        return None
    matches = (gpu for gpu in GPUS.values() if gpu.name.rpartition("-")[0].replace("-", " ") in name.lower())
    return replace(next(matches, GPUS["t4-16gb"]), name=f"this machine's {name}", memory_bytes=free)
