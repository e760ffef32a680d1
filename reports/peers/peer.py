"""What every worker does alike: read the job, warm up, quantise while time and memory are measured, write the weights.

    python by_TOOL.py JOB.json

Needs torch and safetensors only, so that it runs in each tool's own environment.
"""

import ctypes
import gc
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

WARM_UP = 4  # rows, and steps


@dataclass(frozen=True)
class Job:
    """What is to be quantised, and how; the fields of JOB.json.

    task    causal-lm or sequence-classification.
    method  the tool's own, where it has several.
    rows    the calibration rows as token ids.
    texts   the same rows as text, for a tool that tokenises by itself.
    steps   of methods that learn, each of them `batch` rows.
    out     a folder for `result.json` and `weights.safetensors`.
    """

    model: str
    task: str
    method: str
    bits: int
    symmetric: bool
    group_size: int
    rows: list[list[int]]
    texts: list[str]
    max_tokens: int
    steps: int
    batch: int
    out: str


def work(quantise: Callable[[Job], Any], weights: Callable[[Any], dict[str, Tensor]], package: str) -> None:
    """Do the job that the command line names.

    quantise  from the model's folder to its quantised form in memory.
    weights   the dequantised weights of the linear layers, by the names of the original's parameters.
    package   the distribution whose version is noted.

    It is all done once on a few rows before the clock starts, so that imports inside functions and compiled extensions are there.
    """
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    quantise(replace(job, rows=job.rows[:WARM_UP], texts=job.texts[:WARM_UP], steps=min(job.steps, WARM_UP), batch=min(job.batch, WARM_UP)))
    _tidy_up()
    before, wall, cpu = _memory("VmRSS"), time.perf_counter(), time.process_time()
    quantised = quantise(job)
    result = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": _memory("VmHWM"),
        "grown_mib": _memory("VmHWM") - before,
        "version": importlib.metadata.version(package),
    }
    out = Path(job.out)
    save_file({name: tensor.detach().float().contiguous() for name, tensor in weights(quantised).items()}, out / "weights.safetensors")
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _tidy_up() -> None:
    """Give free memory back to the system and let the peak begin anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _memory(key: str) -> float:
    """Resident memory now (VmRSS) or at its peak (VmHWM, which is ru_maxrss without what a parent process had), in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024
