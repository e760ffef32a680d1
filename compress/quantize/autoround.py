"""AutoRound: learn for every weight whether it is rounded up or down, and every range, block by block by signed gradients.

Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs". Each block learns to give what the
uncompressed model has at its place, from the inputs that the solved blocks before it make; GPTQ's solution is the start, from which it goes
the less far the finer the grid is: further than that it learns the examples by heart. The best at 2 to 4 bits; takes a few hundred
forward and backward passes a block.
"""

from typing import TYPE_CHECKING, cast

from pydantic import Field

from compress.methods import Context
from compress.model import Bundle
from compress.quantize._grid import PACKED, Grid, TunedSettings

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibration.block import Block

ABOUT = PACKED
FEW = 50  # steps; fewer are as long as these


class Settings(TunedSettings):
    steps: int = Field(200, ge=1)
    seed: int = 0


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with packed integer weights."""
    from compress.quantize._bits import sized
    from compress.quantize._gptq import solve_block
    from compress.quantize._tune import quantise_and_tune

    settings = sized(bundle, settings, context)

    def solve(block: "Block") -> None:
        solve_block(block, settings, damping=0.01)
        _learn(block, settings)

    return quantise_and_tune(bundle, settings, context, solve, targets=True)


class _Learner:
    """A weight whose rounding and ranges are learned.

    travel   the furthest that steps could take either, were they all one way and as long as the first
    offset   added before rounding, (rows, columns); starts as the least that gives the solution it begins from
    reach    factors on the low and high end of each range, (2, rows, groups)
    """

    def __init__(self, weight: "Tensor", grid: Grid, integers: "Tensor", keep_zeros: bool):
        import torch

        self.travel = 4 / 2**grid.bits
        self._moves = weight != 0 if keep_zeros else torch.ones_like(weight, dtype=torch.bool)
        self._weight, self._grid = weight, grid
        self._low, self._high = -grid.zero * grid.scale, (grid.top - grid.zero) * grid.scale
        scale, zero = grid.columns(weight.shape[1])
        away = integers - (weight / scale + zero)
        away = torch.where((integers == 0) & (away > 0) | (integers == grid.top) & (away < 0), 0, away)  # clipped, not moved
        self.offset = torch.where(away.abs() <= 0.5, 0, away - 0.499 * away.sign()).requires_grad_()
        self.reach = torch.ones(2, *grid.scale.shape, device=weight.device).requires_grad_()

    def grid(self) -> Grid:
        """The grid that the ranges make; differentiable."""
        low, high = self._low * self.reach[0], self._high * self.reach[1]
        if self._grid.symmetric:
            return Grid(self._grid.bits, True, self._grid.scale * self.reach[1], self._grid.zero)
        scale = ((high - low) / self._grid.top).clamp(min=1e-10)
        return Grid(self._grid.bits, False, scale, _round(-low / scale).clamp(0, self._grid.top))

    def integers(self, grid: Grid) -> "Tensor":
        scale, zero = grid.columns(self._weight.shape[1])
        return _round(self._weight / scale + zero + self.offset * self._moves).clamp(0, grid.top)

    def value(self) -> "Tensor":
        """The weight as it would be read back; differentiable."""
        grid = self.grid()
        return grid.values(self.integers(grid))


def _learn(block: "Block", settings: Settings) -> None:
    """Signed gradient descent on the distance to the block's targets, from the solution that the block has."""
    import torch
    from torch.func import functional_call

    from compress.quantize._solution import Quantised

    start = cast("dict[str, Quantised]", block.solved)
    learners = {
        name: _Learner(block.weights[name].float(), one.grid, one.integers.float(), settings.keep_zeros) for name, one in start.items()
    }
    parameters = [parameter for learner in learners.values() for parameter in (learner.offset, learner.reach)]
    travels = [learner.travel for learner in learners.values() for _ in range(2)]
    generator = torch.Generator().manual_seed(settings.seed)
    count = len(block.targets)
    for step in range(settings.steps):
        if step % count == 0:
            order = torch.randperm(count, generator=generator).tolist()
        batch = order[step % count]
        with torch.enable_grad():
            made = {
                f"{name[len(block.name) + 1 :]}.weight": learner.value().to(block.weights[name].dtype) for name, learner in learners.items()
            }
            out = block.given.through(
                lambda *args, made=made, **kwargs: functional_call(block.module, made, args, kwargs), batch, block.device
            )
            target = block.targets[batch].to(block.device)
            loss = (block.given.rows(out, batch).float() - block.given.rows(target, batch).float()).square().mean()
            gradients = torch.autograd.grad(loss, parameters)
        rate = (1 - step / settings.steps) / max(settings.steps, FEW)
        for parameter, travel, gradient in zip(parameters, travels, gradients, strict=True):
            parameter.data.sub_(rate * travel * gradient.sign())
    for name, learner in learners.items():
        with torch.no_grad():
            grid = learner.grid()
            block.set(name, Quantised(grid, learner.integers(grid).to(torch.uint8)))


def _round(values: "Tensor") -> "Tensor":
    """Rounding whose gradient is that of the identity."""
    return values + (values.round() - values).detach()
