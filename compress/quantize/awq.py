"""AWQ: input columns with large activations are scaled up before rounding, ranges clipped by what the outputs lose.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration". The scale of a column is a power of its
activations' root mean square, the exponent searched for each set of layers with one input. It is folded into the norm or the layer before,
on any architecture where that changes nothing (T5's RMSNorm included). So the artifact is an ordinary one. Where it can't be folded (GELU
before, an encoder's states in cross attention) the layer is clipped only. Faster than gptq; in quality between rtn and gptq.
"""

from typing import TYPE_CHECKING

from pydantic import Field

from compress.methods import Context
from compress.model.loading import Bundle
from compress.quantize._grid import PACKED, TunedSettings, fit

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibration.block import Block

ABOUT = PACKED


class Settings(TunedSettings):
    exponents: int = Field(20, ge=2, description="how many exponents between 0 and 1 are tried")


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with packed integer weights."""
    from compress.calibration.block import Block
    from compress.calibration.inputs import in_order, reach, second_moments
    from compress.quantize._bits import sized
    from compress.quantize._fold import fold_before
    from compress.quantize._solution import Quantised
    from compress.quantize._tune import quantise_and_tune

    settings = sized(bundle, settings, context)

    def solve(block: Block) -> None:
        most = reach(block)
        groups = [group for group in in_order(block) if block.sound(group, most[group[0]])]
        for group in groups:
            if fold := fold_before(block, group):
                fold.apply(_best_scale(block, group, second_moments(block, [group[0]])[group[0]], settings))
        for group in groups:
            moments = second_moments(block, [group[0]])[group[0]]
            for name in group:
                grid = fit(block.weights[name], settings, block.bits[name], moments)
                block.set(name, Quantised(grid, grid.integers(block.weights[name])))

    return quantise_and_tune(bundle, settings, context, solve)


def _best_scale(block: "Block", group: list[str], moments: "Tensor", settings: Settings) -> "Tensor":
    """The scale (columns,) with which rounding changes the group's outputs least."""
    import torch

    weights = [(block.weights[name].float(), block.bits[name]) for name in group]
    size = moments.diagonal().sqrt().clamp(min=1e-8)
    least, best = float("inf"), torch.ones_like(size)
    for step in range(settings.exponents):
        scale = size ** (step / settings.exponents)
        scale = scale / (scale.max() * scale.min()).sqrt()
        lost = 0.0
        for weight, bits in weights:
            change = fit(weight * scale, settings, bits, search=False).rounded(weight * scale) / scale - weight
            lost += float(((change @ moments) * change).sum())
        if lost < least:
            least, best = lost, scale
    return best
