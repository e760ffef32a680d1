"""Peak memory of the process that looks, in bytes.

On a GPU from torch's allocator and, for the whole process with its CUDA context, from NVML. On the CPU from the kernel's high-water mark
of resident memory, which can be set back to now (Linux: /proc/self/clear_refs), less what the interpreter with its libraries
held before the model was loaded.
"""

from pathlib import Path

from compress.benchmark import nvml


def resident() -> int:
    """Bytes resident now."""
    return _status("VmRSS")


def reset_peak(device: str) -> None:
    """Let the high-water marks start again from now."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what loading left in the cache is no part of what comes
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str, interpreter: int) -> dict[str, int]:
    """`peak` since the last reset (GPU: allocated); on a GPU also the `reserved` peak and what the whole `process` holds now (NVML)."""
    if device == "cpu":
        return {"peak": max(0, _status("VmHWM") - interpreter)}
    import torch

    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    figures = {"peak": allocated, "reserved": reserved}
    process = nvml.process_bytes()
    return figures if process is None else {**figures, "process": process}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
