"""What a loaded model holds in memory: every tensor that can be reached from it, whoever made it and under whatever name.

Libraries keep weights where no list of parameters shows them. Scales are in a state beside a weight, a layer's sums in an attribute; the
first step may leave an unpacked copy. So the search goes where Python's garbage collector goes. Two views of the same memory count once.
Weights in a kernel's own layout are no tensor; their module says how large they are in `held_bytes`.
"""

import ctypes
import gc
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from compress import bnb

if TYPE_CHECKING:
    import torch
    from torch import nn

NO_WEIGHTS = (type, ModuleType, FunctionType, BuiltinFunctionType, CodeType, FrameType, str, bytes, int, float)


def weight_bytes(model: "nn.Module") -> int:
    """Bytes of all that a model holds: weights and buffers as stored, packed or not, and all that was made of them; no cache."""
    from torch import nn

    tensors, opaque = [], 0
    for thing in _reached(model):
        if isinstance(thing, nn.Module):
            opaque += int(getattr(thing, "held_bytes", 0))
        else:
            tensors.append(thing)
    return opaque + extent(tensors)


def extent(tensors: "Iterable[torch.Tensor]") -> int:
    """Bytes of memory that tensors occupy, shared ones counted once."""
    total = end = 0
    device = ""
    for place, start, stop in sorted(_stretch(part) for part in plain_tensors(tensors)):
        if place != device:
            device, end = place, 0
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def storages(tensors: "Iterable[torch.Tensor]") -> dict[tuple[int, int], int]:
    """The bytes of every piece of memory that tensors occupy, by its place; shared ones once."""
    return {(part.data_ptr(), part.numel()): part.numel() * part.element_size() for part in plain_tensors(tensors)}


def plain_tensors(tensors: "Iterable[torch.Tensor]") -> "Iterator[torch.Tensor]":
    """The tensors in memory that tensors consist of; packed ones in their parts, by torch's flatten protocol or bitsandbytes' states."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            yield from plain_tensors(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            yield tensor.data
            yield from bnb.scales(tensor)


def allocated() -> int:
    """Bytes that this process has from the C library now; 0 where that isn't glibc, the only one that tells."""
    tell = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if tell is None:
        return 0
    tell.restype = _Mallinfo
    told = tell()
    return int(told.uordblks + told.hblkhd)


def _reached(model: "nn.Module") -> Iterator[Any]:
    """The modules and tensors that can be reached from a model, each once; a generation's cache is none of it."""
    import torch
    from torch import nn
    from transformers import Cache

    seen: dict[int, Any] = {id(model): model}  # what is kept here keeps its id
    waiting: list[Any] = [model]
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, nn.Module | torch.Tensor):
            yield thing
        for other in gc.get_referents(thing):
            if id(other) not in seen and not isinstance(other, NO_WEIGHTS) and not isinstance(other, Cache):
                seen[id(other)] = other
                waiting.append(other)


def _stretch(tensor: "torch.Tensor") -> tuple[str, int, int]:
    """Device, first byte and the one after the last of a tensor."""
    import torch

    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return "", 0, 0 if tensor.device.type == "meta" else tensor.numel() * tensor.element_size()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * step for size, step in steps) if tensor.numel() else 0
    return str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


class _Mallinfo(ctypes.Structure):
    """What glibc's mallinfo2(3) fills in."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]
