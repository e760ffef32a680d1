"""Matrix products of 16-bit floats and of int8 on a CPU without instructions for them, by its products of float32.

Such a CPU multiplies 16-bit floats and int8 number by number, in a fifth and a fifteenth of the speed (docs/measuring.md). What a model
writes and reads is the same either way: a product of two 16-bit floats is exact in float32, in which torch sums them as well, and so is a
sum of int8 products as long as it stays below 2^24. Timings are of the model as it is; only what isn't timed is computed so.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

SHARE = 0.3  # of free memory, for weights in float32
MANY = 64  # rows, above which a product takes longer than converting its weights
FEW = 16  # rows, below which weights take longer to convert than to multiply
EXACT = 1024  # products of int8 numbers whose sum is below 2^24, so exact in float32


@contextmanager
def in_float32(device: str, model: "nn.Module | None" = None) -> Iterator[None]:
    """Within it, torch's products on a CPU that lacks instructions for their dtypes are computed in float32.

    model   whose weights don't change within it: they are held in float32, too, once a few rows were multiplied, as far as memory has room
    """
    narrow = _without_instructions() if device == "cpu" else set()
    if not narrow:
        yield
        return
    weights = Weights(model, narrow)
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced, which is the purpose
        if torch.int8 in narrow:
            library.impl("_int_mm", _int_mm(weights), "CPU")
        for name, product in (("mm", torch.mm), ("bmm", torch.bmm)):
            library.impl(name, _product(product, narrow, weights), "CPU")
        library.impl("addmm", _addmm(narrow, weights), "CPU")
    try:
        yield
    finally:
        library._destroy()  # torch has no public way back to its own kernels


class Weights:
    """A model's weights of some dtypes, and their copies in float32, made as they are asked for while a share of memory is left."""

    def __init__(self, model: "nn.Module | None", narrow: set[torch.dtype]):
        plain = [tensor for parameter in (model.parameters() if model else ()) for tensor in _plain(parameter)]
        self._sources = {tensor.data_ptr(): tensor for tensor in plain if tensor.ndim == 2 and tensor.dtype in narrow}
        self._copies: dict[int, Tensor] = {}
        self._room = SHARE * psutil.virtual_memory().available if self._sources else 0

    def wide(self, operand: Tensor, rows: Tensor) -> Tensor | None:
        """In float32 the weight (outputs, inputs) that a layer multiplies a few rows by, of which the operand is the other way round.

        None where it is no weight, there is no room, or a copy is no quicker: of 16 bits twice the bytes are read.
        """
        source = self._sources.get(place := operand.data_ptr())
        if source is None or operand.shape != source.t().shape or operand.stride() != source.t().stride():
            return None
        if not (4 if source.dtype != torch.int8 else 1) <= rows.shape[0] <= MANY:
            return None
        if place not in self._copies:
            if (size := 4 * source.numel()) > self._room:
                return None
            self._room -= size
            self._copies[place] = source.float()
        return self._copies[place]


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that one is made of: itself, or a packed one's parts."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor.detach()
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def _without_instructions() -> set[torch.dtype]:
    """The dtypes that this CPU has no instructions to multiply matrices of."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        torch.int8: torch.cpu._is_vnni_supported(),
    }
    return {dtype for dtype, there in supported.items() if not there}


def _product(own: Callable[..., Tensor], narrow: set[torch.dtype], weights: Weights) -> Callable[[Tensor, Tensor], Tensor]:
    def product(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype in narrow:
            if (weight := weights.wide(b, a)) is not None:
                return torch.mm(weight, a.float().t()).t().to(a.dtype)
            if a.shape[-2] >= FEW:
                return own(a.float(), b.float()).to(a.dtype)
        return own(a, b, out=a.new_empty(*a.shape[:-1], b.shape[-1]))  # torch's own kernel, which has another name then

    return product


def _addmm(narrow: set[torch.dtype], weights: Weights) -> Callable[..., Tensor]:
    def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        if a.dtype in narrow:
            if (weight := weights.wide(b, a)) is not None:
                sums: Tensor = alpha * torch.mm(weight, a.float().t()).t() + beta * bias.float()
                return sums.to(a.dtype)
            if a.shape[0] >= FEW:
                return torch.addmm(bias.float(), a.float(), b.float(), beta=beta, alpha=alpha).to(a.dtype)
        return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1]))

    return addmm


def _int_mm(weights: Weights) -> Callable[[Tensor, Tensor], Tensor]:
    def product(a: Tensor, b: Tensor) -> Tensor:
        """Of int8 (rows, inner) and (inner, columns) in int32, exact: the sums are made of parts that float32 holds exactly."""
        if (weight := weights.wide(b, a)) is not None:
            parts = zip(torch.split(a, EXACT, dim=1), torch.split(weight, EXACT, dim=1), strict=True)
            sums = [torch.mm(y, x.float().t()).t().to(torch.int32) for x, y in parts]
        else:
            parts = zip(torch.split(a, EXACT, dim=1), torch.split(b, EXACT, dim=0), strict=True)
            sums = [torch.mm(x.float(), y.float()).to(torch.int32) for x, y in parts]
        for part in sums[1:]:
            sums[0] += part
        return sums[0].contiguous()

    return product
