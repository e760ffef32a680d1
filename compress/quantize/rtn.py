"""Round to nearest: every weight to the nearest point of its row's or group's grid, whose range is searched.

The floor that every calibrated method must beat. Needs no data; it goes through the same pass, so that the packed result and the report
are made in the same way.
"""

import tempfile
from pathlib import Path

from compress.methods import Context
from compress.model import Bundle
from compress.quantize._grid import PACKED, GridSettings, fit

ABOUT = PACKED


class Settings(GridSettings):
    pass


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with packed integer weights."""
    from compress.quantize._walk import Block, walk

    def solve(block: Block) -> None:
        for name, layer in block.layers.items():
            grid = fit(layer.weight.data, settings, settings.bits)
            block.set(name, grid, grid.integers(layer.weight.data))

    with tempfile.TemporaryDirectory() as scratch:
        return walk(bundle, settings, context, Path(scratch), solve)
