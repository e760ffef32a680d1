"""What holds the memory of the process that looks, in bytes.

On a GPU from torch's allocator and, for the whole process with its CUDA context, from NVML. On the CPU from the kernel's high-water mark
of resident memory, which can be set back to now (Linux: /proc/self/clear_refs; else from samples), less what the interpreter with its
libraries and the tokenizer held before the model was loaded. What glibc keeps of freed memory is given back to the kernel before each
reading starts, since what a peak finds lying there doesn't show in it. How much of a peak is the allocator's own is told by a second
reading, in which every tensor is given memory of its own that is returned when it is freed.
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
OWN = 64 << 10  # bytes from which on an allocation has memory of its own
MADV_POPULATE_READ = 22  # as mman.h names it
ON_A_GPU = ("cuda", "nvidia")  # in the names of libraries that are gigabytes, of which a CPU runs nothing


def resident() -> int:
    """Bytes resident now, freed memory given back, and all code of the libraries there, which is no part of what a model takes."""
    _give_back()
    _bring_in_code()
    return _status("VmRSS")


def can_reset() -> bool:
    """Set the mark of the most that was resident back to now; whether the kernel lets it be."""
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
    """The high-water marks since the last reset, and what is kept now.

    peak      resident memory less the interpreter's; on a GPU what is allocated to tensors
    reserved  GPU: what the allocator holds of the GPU
    process   GPU: what NVML says that the process holds now; left out where NVML can't see processes
    context   GPU: of that, what torch's allocator doesn't hold: the CUDA context with its kernels
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
    """Bytes held now, freed memory given back: resident ones less the interpreter's; on a GPU what is allocated to tensors."""
    gc.collect()
    if device == "cpu":
        return resident() - interpreter
    import torch

    return torch.cuda.memory_allocated()


def release(device: str) -> None:
    """Give the GPU back what torch holds of it and no tensor takes."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


@contextmanager
def apart() -> Iterator[None]:
    """While the block runs, each tensor on the CPU has memory of its own, from the kernel and back to it: no heap, so no holes in one.

    A tensor would still go where a heap has room for it, and how much room importing left differs from process to process; so the heap's
    holes are filled meanwhile. Afterwards glibc works as it does by itself once it has seen large tensors come and go (mallopt(3): its
    thresholds grow to this).
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
    """Take all that lies free in glibc's heap in pieces of `OWN` bytes or more, largest first; nothing is written there. Where it lies."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return []
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_ssize_t]
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # what isn't found in the heap makes it grow, which is seen
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
    """The most that is resident, looked at every 2 ms, where the kernel doesn't let its own mark be set back (some containers)."""

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
    """Map every page of the files that are mapped here, which costs no memory that isn't shared (Linux 5.14; older kernels refuse)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, rights, *_, file = line.split(maxsplit=5) if line.count("/") else (line, "", "")
        if rights.startswith("r") and not any(word in file for word in ON_A_GPU):
            start, end = (int(address, 16) for address in where.split("-"))
            _tell_glibc("madvise", ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_POPULATE_READ)


def _give_back() -> None:
    """Have glibc return freed memory to the kernel."""
    _tell_glibc("malloc_trim", 0)


def _tell_glibc(function: str, *arguments: Any) -> None:
    """Call a function that other C libraries don't have, and do without there."""
    symbol = getattr(ctypes.CDLL(None), function, None)
    if symbol is not None:
        symbol(*arguments)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
