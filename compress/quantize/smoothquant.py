"""SmoothQuant: weights in 8 bits by row, inputs in 8 bits by token, what is hard to round moved from inputs into weights before.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (its O1: inputs are scaled
token by token at run time). Columns with outliers are divided by max|x|^alpha / max|w|^(1 - alpha). The division is folded into the norm
or the layer before where that changes nothing. Else it is done at run time, so that it works on post-norm and GELU models too.
"""

from typing import TYPE_CHECKING

from pydantic import Field

from compress.methods import About, Context, LayerSettings
from compress.model.loading import Bundle
from compress.quantize._grid import IN_INT8, GridSettings, PerToken, fit

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibration.block import Block

ABOUT = About(
    at_run_time=IN_INT8,
    slows=True,
    packages=("torchao",),
    calibrated=True,
    packs=True,
    holds=8,
)


class Settings(LayerSettings):
    alpha: float = Field(0.5, ge=0, le=1, description="how much of the scale moves from inputs into weights: 0 nothing, 1 all")


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with torchao `Int8Tensor` weights."""
    import torch

    from compress.calibration.inputs import in_order, reach
    from compress.quantize._calibrated import quantise
    from compress.quantize._fold import fold_before
    from compress.quantize._solution import Quantised
    from compress.quantize._torchao import Int8

    by_row = GridSettings(bits=8, group_size=-1, symmetric=True)

    def solve(block: "Block") -> None:
        most = reach(block)
        groups = [group for group in in_order(block) if block.sound(group, most[group[0]])]
        divided: dict[str, Tensor] = {}
        for group in groups:
            scale = _smoothing(block, group, most[group[0]], settings.alpha)
            if fold := fold_before(block, group):
                fold.apply(scale)
            else:
                divided |= dict.fromkeys(group, scale)
        for name in (name for group in groups for name in group):
            weight = block.weights[name]
            scaled = weight.float() * divided.get(name, torch.ones((), device=weight.device))
            grid = fit(scaled, by_row, 8, signed=False)
            block.set(name, Quantised(grid, grid.integers(scaled), PerToken(), divided.get(name)))

    return quantise(bundle, settings, context, Int8, solve)


def _smoothing(block: "Block", group: list[str], most: "Tensor", alpha: float) -> "Tensor":
    """The scale (columns,) of a group's input: equation 4 of the paper."""
    import torch

    weights = torch.stack([block.weights[name].float().abs().amax(dim=0) for name in group]).amax(dim=0)
    scale = most.clamp(min=1e-5) ** alpha / weights.clamp(min=1e-5) ** (1 - alpha)
    return torch.where(most > 0, scale, 1.0)
