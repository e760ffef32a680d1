"""What the machine here says of itself."""

import platform
from functools import cache
from pathlib import Path

INFO = Path("/proc/cpuinfo")
GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, of AMD, of either under Windows' Linux


@cache
def cpu_flags() -> frozenset[str]:
    """The names of its instruction sets, as Linux has them: avx2, avx512_vnni, asimddp ..."""
    return next((frozenset(line.split()) for line in _lines() if line.startswith(("flags", "Features"))), frozenset())


def cpu_name() -> str:
    return next((line.split(":", 1)[1].strip() for line in _lines() if line.startswith("model name")), platform.machine())


def has_gpu() -> bool:
    """Whether a GPU's driver is here; no library is asked."""
    return any(Path(device).exists() for device in GPUS)


def _lines() -> list[str]:
    try:
        return INFO.read_text().splitlines()
    except OSError:
        return []
