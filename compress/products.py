"""Matrix products of 16-bit floats and of int8 on a CPU without instructions for them, by its products of float32.

Such a CPU multiplies 16-bit floats and int8 number by number, at a fifth and a fifteenth of the speed (docs/measuring.md). A model's
outputs are the same either way. A product of two 16-bit floats is exact in float32, in which torch sums them anyway. A sum of int8 products
is exact as long as it stays below 2^24. Timings are of the model as it is; only what isn't timed is computed this way.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

FEW = 16  # rows, below which weights take longer to convert than to multiply
EXACT = 1024  # products of int8 numbers whose sum is below 2^24, so exact in float32


@contextmanager
def in_float32(device: str) -> Iterator[None]:
    """While the block runs, products on a CPU without instructions for their dtype are computed in float32."""
    narrow = _without_instructions() if device == "cpu" else set()
    if not narrow:
        yield
        return
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced, which is the purpose
        if torch.int8 in narrow:
            library.impl("_int_mm", _int_mm, "CPU")
        for name, product in (("mm", torch.mm), ("bmm", torch.bmm)):
            library.impl(name, _product(product, narrow), "CPU")
        library.impl("addmm", _addmm(narrow), "CPU")
    try:
        yield
    finally:
        library._destroy()  # torch has no public way back to its own kernels


def _without_instructions() -> set[torch.dtype]:
    """The dtypes for whose matrix products this CPU has no instructions."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        torch.int8: torch.cpu._is_vnni_supported(),
    }
    return {dtype for dtype, there in supported.items() if not there}


def _product(own: Callable[..., Tensor], narrow: set[torch.dtype]) -> Callable[[Tensor, Tensor], Tensor]:
    def product(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype in narrow and a.shape[-2] >= FEW:
            return own(a.float(), b.float()).to(a.dtype)
        return own(a, b, out=a.new_empty(*a.shape[:-1], b.shape[-1]))  # torch's own kernel, which has another name then

    return product


def _addmm(narrow: set[torch.dtype]) -> Callable[..., Tensor]:
    def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        if a.dtype in narrow and a.shape[0] >= FEW:
            return torch.addmm(bias.float(), a.float(), b.float(), beta=beta, alpha=alpha).to(a.dtype)
        return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1]))

    return addmm


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Of int8 (rows, inner) and (inner, columns) in int32, exact: the sums are made of parts that float32 holds exactly."""
    parts = zip(torch.split(a, EXACT, dim=1), torch.split(b, EXACT, dim=0), strict=True)
    first, *others = (torch.mm(x.float(), y.float()).to(torch.int32) for x, y in parts)
    for part in others:
        first += part
    return first
