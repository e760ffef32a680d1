"""What is peculiar to the layers of bitsandbytes, in one place.

On a CPU with AVX-512 BF16, a `Linear4bit` changes its weights' layout when it first runs without gradients, for a kernel that multiplies
them packed, in bfloat16. That layout needs a multiple of 32 rows and whole blocks of weights in a row; other shapes raise an error.
Such layers are left whole on every machine, so that a model made on one runs on all.
"""

from collections.abc import Iterator
from copy import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS, BLOCK = 32, 64  # of the kernel, and weights that share a scale
ODD = f"bitsandbytes computes with 4 bits on every CPU only where rows are a multiple of {ROWS} and columns of {BLOCK}"
ASKED = "the module around it gives it states in the dtype of its weight, which is bytes once packed"


def is_asked_for_its_dtype(model: "nn.Module", name: str) -> bool:
    """Whether a layer is the last of a T5 feed-forward, which casts the layer's input to its weight's dtype, whatever that is."""
    owner, _, leaf = name.rpartition(".")
    return leaf == "wo" and type(model.get_submodule(owner)).__name__.endswith(("DenseActDense", "DenseGatedActDense"))


def takes_4bit(layer: "nn.Module") -> bool:
    """Whether a linear layer, or a Conv1D of GPT-2, has a shape with which every CPU can compute in 4 bits."""
    from torch import nn

    weight: Any = layer.weight
    rows, columns = weight.shape if isinstance(layer, nn.Linear) else reversed(weight.shape)
    return bool(rows % ROWS == 0 and columns % BLOCK == 0)


def stumbling(model: "nn.Module") -> list[str]:
    """The 4-bit layers of a loaded model that this CPU can't compute with, by name."""
    return [
        name
        for name, layer in model.named_modules()
        if getattr(layer, "support_avx512bf16_for_cpu", False) and (layer.out_features % ROWS or layer.in_features % BLOCK)
    ]


def scales(weight: "Tensor") -> "Iterator[Tensor]":
    """The tensors beside a packed weight's integers; none of a weight that bitsandbytes didn't pack."""
    state = getattr(weight, "quant_state", None)
    while state is not None:  # 4 bit: scales, and the scales' own where they are quantised again
        yield from (part for part in (state.absmax, state.code, getattr(state, "offset", None)) if part is not None)
        state = getattr(state, "state2", None)  # gone from a weight that was laid out anew
    if (rows := getattr(weight, "SCB", None)) is not None:  # 8 bit: a scale per row
        yield rows


def unpacked(layer: "nn.Module") -> "Tensor":
    """A packed layer's weight as plain numbers (rows, columns), whatever its layout; the layer stays as it is."""
    from bitsandbytes import functional
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    weight: Any = layer.weight
    state: Any = getattr(weight, "quant_state", None)
    numbers: Tensor
    if not getattr(state, "packing_format_for_cpu", False):
        numbers = dequantize_bnb_weight(weight, getattr(layer, "state", None))
        return numbers
    state = copy(state)
    state.original_nested = False  # the scales are at hand; quantising them again would round twice
    integers, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    numbers = functional.dequantize_4bit(integers.reshape(-1, 1), state)
    return numbers
