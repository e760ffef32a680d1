"""Integers of a quantised artifact, as `compress.quantize._pack` stores them or, in GPTQ's own files, `_gptq_files`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import gptq
from compress.errors import MissingPackage, ModelError
from compress.extras import install_line
from compress.model.folder import tensor_headers, weight_files

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class Integers:
    """A matrix on a grid: scale (integers - zero).

    integers   int16 (rows, columns); around 0 where the grid is symmetric, else of 0 to 2^bits - 1
    scale      float32 (rows, groups)
    zero       int16 (rows, groups); None where the grid is symmetric
    """

    integers: "NDArray[np.int16]"
    scale: "NDArray[np.float32]"
    zero: "NDArray[np.int16] | None"

    def values(self) -> "NDArray[np.float32]":
        """What the integers stand for, float32 (rows, columns)."""
        import numpy as np

        size = self.integers.shape[1] // self.scale.shape[1]
        shifted = self.integers if self.zero is None else self.integers - np.repeat(self.zero, size, axis=1)
        return (shifted * np.repeat(self.scale, size, axis=1)).astype(np.float32)

    def rows(self, order: "NDArray[np.int64]") -> "Integers":
        """The same with its rows in this order."""
        return Integers(self.integers[order], self.scale[order], None if self.zero is None else self.zero[order])


Packed = dict[str, tuple[Integers, int]]  # by name the layers on a grid, with their bits


def packed_layers(folder: Path, config: Mapping[str, Any], form: str) -> Packed:
    """The packed layers of a folder of compressed-tensors; `config` is its quantization_config, `form` the `export` that asks.

    Raises what `widths` and `unpacked` raise.
    """
    from safetensors import safe_open

    bits = widths(config, form)
    files = {name: file for file in weight_files(folder) for name, _ in tensor_headers(file)}
    layers: dict[str, dict[str, Any]] = {name.rpartition(".")[0]: {} for name in files if name.endswith(".weight_packed")}
    for name, file in files.items():
        layer, _, leaf = name.rpartition(".")
        if layer in layers and leaf.startswith("weight_"):
            with safe_open(file, framework="pt") as tensors:
                layers[layer][leaf] = tensors.get_tensor(name)
    wide = {layer: bits.get(layer) or bits["Linear"] for layer in layers}
    return {layer: (unpacked(parts, wide[layer], form), wide[layer]) for layer, parts in layers.items()}


def gptq_layers(folder: Path, config: Mapping[str, Any], form: str) -> Packed:
    """The same for a folder in GPTQ's own format. Raises ModelError for layers whose groups aren't contiguous columns."""
    import numpy as np

    packed: Packed = {}
    for name, layer in gptq.layers(folder, config).items():
        integers, zero, scale, groups = (tensor.numpy() for tensor in layer)
        if not np.array_equal(groups, np.arange(len(groups)) * scale.shape[1] // len(groups)):
            raise ModelError(f"export: {form}: {name} has groups of columns that aren't contiguous (desc_act); give weights: float32")
        middle = 2 ** (config["bits"] - 1)
        if (zero == middle).all():
            matrix = Integers((integers - middle).astype(np.int16), scale, None)
        else:
            matrix = Integers(integers.astype(np.int16), scale, zero.astype(np.int16))
        packed[name] = matrix, int(config["bits"])
    return packed


def widths(config: Mapping[str, Any], form: str) -> Mapping[str, int]:
    """Bits by layer, or by class of layer, from a model's quantization_config. `form` is the `export` that asks.

    Raises ModelError for weights that aren't packed by compressed-tensors, or whose inputs are rounded at run time too.
    """
    layout, method = config.get("format"), config.get("quant_method")
    groups = config.get("config_groups", {}).values()
    if method != "compressed-tensors" or layout != "pack-quantized" or any(group.get("input_activations") for group in groups):
        raise ModelError(
            f"export: {form}: the weights are packed by {method}{f' ({layout})' if layout else ''}. Only the integers of"
            " compressed-tensors' pack-quantized can be kept. Quantise with rtn, gptq, awq or autoround in format: compressed-tensors, or"
            " export a model in floats"
        )
    return {target: int(group["weights"]["num_bits"]) for group in groups for target in group["targets"]}


def unpacked(parts: "Mapping[str, Tensor]", bits: int, form: str) -> Integers:
    """The integers of a packed layer, from its tensors `weight_packed` and so on, as `compress.quantize._pack` stores them.

    Raises MissingPackage.
    """
    import torch

    try:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    except ImportError:
        raise MissingPackage(f"export: {form}: packed weights need compressed-tensors. Install with: {install_line('quant')}") from None
    scale, zero, middle = parts["weight_scale"].float(), parts.get("weight_zero_point"), 2 ** (bits - 1)
    shape = torch.Size(parts["weight_shape"].tolist())
    integers = unpack_from_int32(parts["weight_packed"], bits, shape).to(torch.int16)  # counted from -middle
    if zero is None:
        return Integers(integers.numpy(), scale.numpy(), None)
    if zero.dtype == torch.int32:
        zero = unpack_from_int32(zero, bits, scale.shape, packed_dim=0)
    return Integers((integers + middle).numpy(), scale.numpy(), (zero.to(torch.int16) + middle).numpy())
