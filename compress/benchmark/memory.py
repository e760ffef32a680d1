"""What holds the memory of the process that looks, in bytes.

On a GPU the figures come from torch's allocator and, for the whole process with its CUDA context, from NVML. On the CPU they come from the
kernel's high-water mark of resident memory, which can be reset (Linux: /proc/self/clear_refs). Where it can't be, samples stand for it.
What the interpreter, its libraries and the tokenizer held before the model was loaded is subtracted.

Before each reading glibc returns freed memory to the kernel: a peak that reuses it would not show. A second reading tells how much of a
peak is the allocator's own. In it every tensor has memory of its own, returned as soon as the tensor is freed.
"""

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from compress.benchmark import nvml

CLEAR_REFS = Path("/proc/self/clear_refs")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h names them
OWN = 64 << 10  # bytes; allocations of this size or more have memory of their own
MADV_POPULATE_READ = 22  # as mman.h names it
ON_A_GPU = ("cuda", "nvidia")  # in the names of libraries that are gigabytes, of which a CPU runs nothing


def resident() -> int:
    """Bytes resident now, after freed memory was returned and all code of the libraries read in, which is no part of a model."""
    _give_back()
    _bring_in_code()
    return _status("VmRSS")


def can_reset() -> bool:
    """Reset the high-water mark of resident memory. Says whether the kernel allows it."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def reset_peak(device: str) -> None:
    """Let the high-water marks start again from now."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what loading left in the cache is no part of what comes
        torch.cuda.reset_peak_memory_stats()
    else:
        _give_back()
        if not can_reset():
            _Samples.begin()


def peak(device: str, interpreter: int) -> dict[str, int]:
    """The high-water marks since the last reset, and what is held now.

    peak      resident memory less the interpreter's; on a GPU what is allocated to tensors
    reserved  On a GPU: what the allocator holds
    process   On a GPU: what the process holds now, by NVML; left out where NVML can't see processes
    context   On a GPU: what of that torch's allocator doesn't hold, the CUDA context with its kernels
    """
    if device == "cpu":
        return {"peak": max(0, (_Samples.end() or _status("VmHWM")) - interpreter)}
    import torch

    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    figures = {"peak": allocated, "reserved": reserved}
    process = nvml.process_bytes()
    if process is None:
        return figures
    return {**figures, "process": process, "context": max(0, process - torch.cuda.memory_reserved())}


def at_rest(device: str, interpreter: int) -> int:
    """Bytes held now, after freed memory was returned: resident ones less the interpreter's; on a GPU those allocated to tensors."""
    gc.collect()
    if device == "cpu":
        return resident() - interpreter
    import torch

    return torch.cuda.memory_allocated()


def release(device: str) -> None:
    """Return to the GPU what torch holds and no tensor uses."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


@contextmanager
def apart() -> Iterator[None]:
    """While the block runs, each tensor on the CPU has memory of its own, taken from the kernel and returned to it: no heap, no holes.

    A tensor would still go where the heap has room, and how much room importing left differs from process to process. So the heap's holes
    are filled meanwhile. Afterwards glibc works as it does by itself once large tensors have come and gone (mallopt(3): its thresholds
    grow to this).
    """
    fillings = _fill_holes()
    _tell_glibc("mallopt", M_MMAP_THRESHOLD, OWN)
    try:
        yield
    finally:
        for filling in fillings:
            _tell_glibc("free", ctypes.c_void_p(filling))
        _tell_glibc("mallopt", M_MMAP_THRESHOLD, 32 << 20)
        _tell_glibc("mallopt", M_TRIM_THRESHOLD, 64 << 20)


def _fill_holes() -> list[int]:
    """Take all free memory of glibc's heap in pieces of `OWN` bytes or more, largest first. Returns their addresses; nothing is written."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return []
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_ssize_t]
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # what the heap has no room for makes it grow, which shows
    libc.mallopt(M_TRIM_THRESHOLD, 0)
    libc.malloc_trim(0)
    fillings, size = list[int](), 16 << 20
    while size >= OWN:
        end = libc.sbrk(0)
        filling = libc.malloc(size)
        if libc.sbrk(0) == end:
            fillings.append(filling)
        else:
            libc.free(ctypes.c_void_p(filling))
            size //= 2
    return fillings


class _Samples(threading.Thread):
    """The most that is resident, sampled every 2 ms, where the kernel's own mark can't be reset (some containers)."""

    running: "ClassVar[_Samples | None]" = None

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self._over = 0, threading.Event()

    @classmethod
    def begin(cls) -> None:
        cls.end()
        cls.running = cls()
        cls.running.start()

    @classmethod
    def end(cls) -> int:
        """The most since the beginning; 0 where there was none."""
        samples, cls.running = cls.running, None
        if samples is None:
            return 0
        samples._over.set()
        samples.join()
        return max(samples.highest, _status("VmRSS"))

    def run(self) -> None:
        while not self._over.wait(0.002):
            self.highest = max(self.highest, _status("VmRSS"))


def _bring_in_code() -> None:
    """Read in every page of the files that are mapped here; only shared memory is taken (Linux 5.14; older kernels refuse)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, rights, *_, file = line.split(maxsplit=5) if line.count("/") else (line, "", "")
        if rights.startswith("r") and not any(word in file for word in ON_A_GPU):
            start, end = (int(address, 16) for address in where.split("-"))
            _tell_glibc("madvise", ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_POPULATE_READ)


def _give_back() -> None:
    """Have glibc return freed memory to the kernel."""
    _tell_glibc("malloc_trim", 0)


def _tell_glibc(function: str, *arguments: Any) -> None:
    """Call a function of glibc; do nothing where the C library lacks it."""
    symbol = getattr(ctypes.CDLL(None), function, None)
    if symbol is not None:
        symbol(*arguments)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
