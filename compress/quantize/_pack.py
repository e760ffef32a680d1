"""Packed layers as compressed-tensors stores them, which plain transformers and vLLM read: integers of 2 to 8 bits in int32 words.

Names and meaning are that format's: `weight_packed`, `weight_scale`, `weight_zero_point` (asymmetric grids), `weight_shape`.
"""

from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor, nn

from compress.quantize._grid import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packed(layer: nn.Linear, grid: Grid, integers: Tensor) -> nn.Module:
    """A module that holds what the format stores for a layer. `integers` are 0 to 2^bits - 1, of the weight's shape."""
    middle = 2 ** (grid.bits - 1)  # the format counts from -middle
    holder = nn.Module()
    parts = {
        "weight_packed": pack_to_int32((integers - middle).to(torch.int8), grid.bits),
        "weight_scale": grid.scale.to(layer.weight.dtype),
        "weight_shape": torch.tensor(layer.weight.shape),
    }
    if not grid.symmetric:
        parts["weight_zero_point"] = pack_to_int32((grid.zero - middle).to(torch.int8), grid.bits, packed_dim=0)
    for name, tensor in parts.items():
        holder.register_parameter(name, nn.Parameter(tensor.cpu(), requires_grad=False))
    if layer.bias is not None:
        holder.register_parameter("bias", nn.Parameter(layer.bias.data.cpu(), requires_grad=False))
    return holder


def describe(model: "PreTrainedModel", grids: dict[str, Grid]) -> None:
    """Write into the model's config how its layers are packed: a group of layers for each kind of grid."""
    groups: dict[tuple[int, bool, int | None], list[str]] = {}
    for name, grid in grids.items():
        columns = _columns(model, name)
        size = None if grid.scale.shape[1] == 1 else columns // grid.scale.shape[1]
        groups.setdefault((grid.bits, grid.symmetric, size), []).append(name)
    left_out = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    model.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        # transformers then unpacks at loading, the only way in which it reads asymmetric grids; it knows one kind of grid in that way
        "dequantize": len(groups) == 1,
        "ignore": left_out,
        "config_groups": {f"group_{n}": _group(*kind, names) for n, (kind, names) in enumerate(sorted(groups.items(), key=str))},
    }


def _group(bits: int, symmetric: bool, size: int | None, names: list[str]) -> dict[str, Any]:
    strategy = "channel" if size is None else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": size, "dynamic": False}
    return {"targets": names, "weights": weights, "input_activations": None, "output_activations": None}


def _columns(model: "PreTrainedModel", name: str) -> int:
    return int(model.get_submodule(name).weight_shape[1])
