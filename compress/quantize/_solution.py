"""A layer on a grid of integers."""

from dataclasses import dataclass

from torch import Tensor

from compress.calibration.block import Solution
from compress.quantize._grid import Grid, PerToken


@dataclass(frozen=True)
class Quantised(Solution):
    """What a layer is stored as: integers of 0 to 2^bits - 1, uint8 of the weight's shape, on a grid.

    inputs  what its inputs are rounded to at run time; None leaves them as they are
    divide  what its inputs are divided by before, (columns,), at run time; its weights hold the product
    """

    grid: Grid
    integers: Tensor
    inputs: Grid | PerToken | None = None
    divide: Tensor | None = None

    def weight(self) -> Tensor:
        return self.grid.values(self.integers)

    def given(self, states: Tensor) -> Tensor:
        states = states if self.divide is None else states / self.divide.to(states.dtype)
        return states if self.inputs is None else self.inputs.rounded(states).to(states.dtype)
