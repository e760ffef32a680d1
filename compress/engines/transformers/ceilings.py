"""What this machine can do at best: how fast it copies memory and how fast it multiplies matrices, timed beside the models.

Utilisation is a share of these and not of data sheets: a shared host, a few threads or a laptop's power limit have ceilings of their own.
The copy counts bytes read and bytes written (STREAM, McCalpin 1995), in blocks larger than the caches. The product is of square matrices in
the model's dtype, with the benchmark's threads. Of several timings the best counts, since only disturbances differ.
"""

import time
from collections.abc import Callable
from functools import partial

import torch

COPIED_BYTES = 2**27
SIDES = (256, 512, 1024, 2048, 4096, 8192)  # of the matrices; a GPU is at its best with the largest, a CPU may take a minute for them
ENOUGH_S = 0.2  # after that no larger ones are tried
TIMINGS = 4


def copy_bytes_per_second(device: str) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _best(partial(target.copy_, source), device)


def flops_per_second(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of large matrix products, a multiplication and an addition counting as two."""
    start, best = time.perf_counter(), 0.0
    for side in SIDES:
        if time.perf_counter() - start > ENOUGH_S:
            break
        matrix = torch.rand(side, side, device=device).to(dtype)
        for weight in (matrix, matrix.t()):  # as in layers; some kernels are several times faster at it
            best = max(best, 2 * side**3 / _best(partial(torch.mm, matrix, weight, out=torch.empty_like(matrix)), device))
    return best


def _best(work: Callable[[], object], device: str) -> float:
    """The shortest of several timings in seconds: CUDA events on a GPU, else a monotonic clock."""
    with torch.no_grad():
        work()
        return min(_seconds(work, device) for _ in range(TIMINGS))


def _seconds(work: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000
