"""Round to nearest: every weight to the nearest point of its row's or group's grid, whose range is searched.

The floor that every calibrated method must beat. Needs no data: a train split, where there is one, serves to measure on a few short rows
what each layer lost.
"""

from dataclasses import replace

from compress.methods import Context
from compress.model.loading import Bundle
from compress.quantize._grid import PACKED, TunedSettings, fit

ABOUT = replace(PACKED, calibrated=False, measured=True)


class Settings(TunedSettings):
    pass


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with packed integer weights."""
    import torch

    from compress.calibration.block import Block
    from compress.quantize._bits import sized
    from compress.quantize._solution import Quantised
    from compress.quantize._tune import quantise_and_tune

    settings = sized(bundle, settings, context)

    def solve(block: Block) -> None:
        for name, weight in block.weights.items():
            if torch.isfinite(weight).all():
                grid = fit(weight, settings, block.bits[name])
                block.set(name, Quantised(grid, grid.integers(weight)))
            else:
                block.left_out[name] = "its weights hold inf or NaN"

    return quantise_and_tune(bundle, settings, context, solve, blind=True)
