"""Packed layers as compressed-tensors stores them, which plain transformers and vLLM read: integers of 2 to 8 bits in int32 words.

Names and meaning are that format's: `weight_packed`, `weight_scale`, `weight_zero_point` (asymmetric grids), `weight_shape`. What plain
transformers reads of it (5.23 with compressed-tensors 0.20) decides which of three layouts a model gets:

    one kind of grid   every layer alike; unpacked at loading. The layout that vLLM knows.
    kinds apart        each kind (bits, symmetry, group size) with its own description; unpacked at the first step. Its reader fails on
                       asymmetric grids with packed zero points. So those have them as bytes, and are declared as blocks of one row.
    kinds as one       for models that can't be read so (encoder-decoders, GPTBigCode). All layers are written in the finest groups and the
                       widest bits that any has.
"""

from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor, nn

from compress import experts
from compress.errors import MissingPackage
from compress.model.loading import reader_needed, reads_packed
from compress.quantize._grid import Kind
from compress.quantize._solution import Quantised
from compress.structure import packs_alike

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Packed:
    """The layout of a model whose layers have these kinds of grid, by name.

    Raises MissingPackage where the transformers here wouldn't read it.
    """

    def __init__(self, model: "PreTrainedModel", kinds: dict[str, Kind]):
        inside = (f"{path}.{name}" for path, mixture in experts.parted(model) for name in mixture.layers())
        self._mixture = any(name in kinds for name in inside)  # which every transformers reads
        alike = packs_alike(model)
        if alike and not self._mixture and not reads_packed():
            raise MissingPackage(reader_needed(f"packed weights of a {model.config.model_type}"))
        self.bits = {name: kind.bits for name, kind in kinds.items()}
        self._kinds, distinct = kinds, set(kinds.values())
        self._groups: dict[tuple[Kind, int], list[str]] = {}
        self._alike = len(distinct) == 1
        self._as_one: Kind | None = None
        if not self._alike and alike:
            size = min((kind.size for kind in distinct if kind.size), default=0)
            self._as_one = Kind(max(kind.bits for kind in distinct), self._mixture, size)

    def packed(self, name: str, layer: nn.Linear, solution: Quantised) -> nn.Module:
        """A module that holds what the format stores for a layer."""
        kind = self._as_one or self._kinds[name]
        row = 0 if self._alike or self._as_one else layer.in_features
        self._groups.setdefault((kind, row), []).append(name)
        middle = 2 ** (kind.bits - 1)  # the format counts from -middle
        integers = solution.integers.to(torch.int16)
        if kind.symmetric:  # of a narrower grid's, too, the middle is here
            integers += middle - 2 ** (self._kinds[name].bits - 1)
        parts = {
            "weight_packed": pack_to_int32((integers - middle).to(torch.int8), kind.bits),
            "weight_scale": solution.grid.scale.to(layer.weight.dtype),
            "weight_shape": torch.tensor(layer.weight.shape),
        }
        if not kind.symmetric:
            zeros = (solution.grid.zero - middle).to(torch.int8)
            parts["weight_zero_point"] = pack_to_int32(zeros, kind.bits, packed_dim=0) if self._alike else zeros
        return holder(parts, layer)

    def describe(self, model: "PreTrainedModel") -> None:
        """Write into the model's config how the layers that were packed are stored."""
        # vLLM's layers of experts look for the class of layer, and thousands of names would be a file of their own
        described = [
            {"targets": ["Linear"] if self._mixture else names, "weights": self._weights(kind, row)}
            for (kind, row), names in sorted(self._groups.items())
        ]
        describe(model, "pack-quantized", described, dequantize=self._alike or self._as_one is not None)

    def _weights(self, kind: Kind, row: int) -> dict[str, Any]:
        weights = {"num_bits": kind.bits, "type": "int", "symmetric": kind.symmetric, "dynamic": False}
        if self._alike or (kind.symmetric and self._as_one is None):
            return {**weights, "strategy": "group" if kind.size else "channel", "group_size": kind.size or None}
        # written as one, a scale a row is spread over any blocks
        return {**weights, "strategy": "block", "block_structure": [1, kind.size or row or 32]}


def holder(parts: dict[str, Tensor], layer: nn.Linear) -> nn.Module:
    """A module with these tensors, in main memory, and the layer's bias."""
    module = nn.Module()
    for name, tensor in parts.items():
        module.register_parameter(name, nn.Parameter(tensor.cpu(), requires_grad=False))
    if layer.bias is not None:
        module.register_parameter("bias", nn.Parameter(layer.bias.data.cpu(), requires_grad=False))
    return module


def describe(model: "PreTrainedModel", form: str, groups: list[dict[str, Any]], dequantize: bool) -> None:
    """The model's quantization_config. `dequantize` has transformers unpack at loading instead of at the first step."""
    model.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "dequantize": dequantize,
        "ignore": [name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
        "config_groups": {f"group_{n}": {"input_activations": None, "output_activations": None, **group} for n, group in enumerate(groups)},
    }
