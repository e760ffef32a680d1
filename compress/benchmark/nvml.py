"""What NVML says of the GPU in use: the memory this process holds, the energy the device has drawn.

Answers are None where the package (nvidia-ml-py, of the extra `gpu`) or the driver's library is absent. They are None, too, where the GPU
or a container hides them.
"""

import os
from typing import Any


def process_bytes() -> int | None:
    """Bytes that this process holds on the GPU, its CUDA context included."""
    try:
        nvml, handle = device(gpu_uuid())
        held = [p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
    except Exception:  # NVML has an error class for each of its troubles; none of them may end a measurement
        return None
    return int(held[0]) if held and held[0] else None


def joules() -> float | None:
    """What the whole device has drawn since its driver was loaded (Volta and later); NVML counts in millijoules."""
    try:
        nvml, handle = device(gpu_uuid())
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    except Exception:  # as above
        return None


def gpu_uuid() -> str:
    """NVML's name of the GPU that torch uses, which may be numbered otherwise."""
    import torch

    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


def device(uuid: str) -> tuple[Any, Any]:
    """NVML itself and its handle of a GPU. Raises what NVML raises."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
