"""Packed layers as GPTQ's own files have them, which gptqmodel's and vLLM's fused kernels read: nothing is unpacked at loading.

    qweight  (columns / 32 * bits, rows) int32: the integers of a row one after the other as a stream of bits, lowest first.
    qzeros   (groups, rows / 32 * bits) int32: the zero points, streamed likewise.
    scales   (groups, rows) float16.
    g_idx    (columns,) int32: each column's group.

Symmetric grids are written in the format's first version, which stores every zero point less one and so can't hold 0; others in the second.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.quantize._grid import Kind
from compress.quantize._pack import holder
from compress.quantize._solution import Quantised
from compress.structure import block_stacks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WAY_OUT = "leave out format: gptq"


class GptqFiles:
    """The format for a model whose layers have these kinds of grid, by name.

    Raises ModelError for what it can't hold: encoder-decoders, layers of different kinds, widths that aren't multiples of 32, blocks of
    which not the same layers are packed.
    """

    def __init__(self, model: "PreTrainedModel", kinds: dict[str, Kind]):
        self.bits = {name: kind.bits for name, kind in kinds.items()}
        if model.config.is_encoder_decoder:
            raise ModelError(f"format: gptq: transformers reads no encoder-decoder ({type(model).__name__}) from it; {WAY_OUT}")
        for name in kinds:
            rows, columns = model.get_submodule(name).weight.shape
            if rows % 32 or columns % 32:
                raise ModelError(f"format: gptq packs by 32, and {name} is {rows} x {columns}; name it under ignore, or {WAY_OUT}")
        if len(by_kind := {kind: name for name, kind in kinds.items()}) > 1:
            raise ModelError(
                f"format: gptq holds one kind of grid, and these would differ: {', '.join(sorted(by_kind.values()))}; {WAY_OUT}"
            )
        (self._stack, blocks), *more = block_stacks(model).items()
        if more:
            raise ModelError(f"format: gptq knows one stack of blocks, and {type(model).__name__} has more; {WAY_OUT}")
        self._kind, self._blocks = next(iter(kinds.values())), len(blocks)
        self._names: list[str] = []

    def packed(self, name: str, layer: nn.Linear, solution: Quantised) -> nn.Module:
        """A module that holds what the format stores for a layer."""
        self._names.append(name)
        kind, zeros = self._kind, solution.grid.zero.to(torch.uint8).t()
        parts = {
            "qweight": _stream(solution.integers, kind.bits).t().contiguous(),
            "qzeros": _stream(zeros - 1 if kind.symmetric else zeros, kind.bits),
            "scales": solution.grid.scale.t().contiguous().to(torch.float16),
            "g_idx": torch.arange(layer.in_features, dtype=torch.int32) // (kind.size or layer.in_features),
        }
        return holder(parts, layer)

    def describe(self, model: "PreTrainedModel") -> None:
        """Write into the model's config how the layers that were packed are stored."""
        inside = sorted({name.split(".", self._stack.count(".") + 2)[-1] for name in self._names})
        lacking = {f"{self._stack}.{n}.{name}" for n in range(self._blocks) for name in inside} - set(self._names)
        if lacking:
            raise ModelError(f"format: gptq packs the same layers in every block; not packed is {min(lacking)}; {WAY_OUT}")
        model.config.quantization_config = {
            "quant_method": "gptq",
            "bits": self._kind.bits,
            "group_size": self._kind.size or -1,
            "sym": self._kind.symmetric,
            "desc_act": False,
            "checkpoint_format": "gptq" if self._kind.symmetric else "gptq_v2",
            "block_name_to_quantize": self._stack,
            "modules_in_block_to_quantize": [inside],
        }


def _stream(integers: Tensor, bits: int) -> Tensor:
    """Integers (rows, columns) as (rows, columns / 32 * bits) int32 words, the lowest bit of the first one first."""
    flat = integers.cpu().numpy()
    words = [np.packbits(np.unpackbits(row[:, None], axis=1, count=bits, bitorder="little").ravel(), bitorder="little") for row in flat]
    return torch.from_numpy(np.stack(words).view(np.int32).copy())
