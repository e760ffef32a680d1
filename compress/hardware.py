"""What this machine says about itself."""

import platform
from functools import cache
from pathlib import Path

from compress.errors import DeviceError

INFO = Path("/proc/cpuinfo")
GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, of AMD, of either under Windows' Linux


@cache
def cpu_flags() -> frozenset[str]:
    """The names of its instruction sets, as Linux has them: avx2, avx512_vnni, asimddp ..."""
    return next((frozenset(line.split()) for line in _lines() if line.startswith(("flags", "Features"))), frozenset())


def cpu_name() -> str:
    return next((line.split(":", 1)[1].strip() for line in _lines() if line.startswith("model name")), platform.machine())


def has_gpu() -> bool:
    """Whether the driver of a GPU is installed; no library is asked."""
    return any(Path(device).exists() for device in GPUS)


def pick_device(device: str) -> str:
    """`cpu` or `cuda`; `auto` takes a GPU where there is one. Raises DeviceError for `cuda` where there is none."""
    if device == "cpu":  # for which an engine's own environment needs no torch
        return "cpu"
    import torch

    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        why = "this torch has no CUDA" if torch.version.cuda is None else "torch sees no GPU"
        raise DeviceError(f"--device cuda: {why} on this machine; use --device cpu or auto")
    return "cuda" if there else "cpu"


def _lines() -> list[str]:
    try:
        return INFO.read_text().splitlines()
    except OSError:
        return []
