"""Round to nearest: every weight to the nearest point of its row's or group's grid, whose range is searched.

The floor that every calibrated method must beat. Needs no data; it goes through the same pass, so that the packed result and the report
are made in the same way.
"""

from compress.methods import Context
from compress.model import Bundle
from compress.quantize._grid import PACKED, GridSettings, fit

ABOUT = PACKED


class Settings(GridSettings):
    pass


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with packed integer weights."""
    from compress.calibration.block import Block
    from compress.calibration.inputs import in_order, reach
    from compress.quantize._calibrated import files_of, quantise
    from compress.quantize._solution import Quantised

    def solve(block: Block) -> None:
        most = reach(block)
        for group in in_order(block):
            if block.sound(group, most[group[0]]):
                for name in group:
                    grid = fit(block.weights[name], settings, block.bits[name])
                    block.set(name, Quantised(grid, grid.integers(block.weights[name])))

    return quantise(bundle, settings, context, files_of(settings), solve)
