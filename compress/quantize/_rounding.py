"""A weight whose rounding and ranges learn, with gradients by hand: autograd would go through memory three times as often."""

from typing import Any

import torch
from torch import Tensor

from compress.quantize._grid import Grid
from compress.quantize._solution import Quantised


class LearnedRounding:
    """A weight, (rows, columns) in float32, as it is read back from integers that learn (Cheng et al. 2023).

    travel   the furthest that steps should take either parameter, were they all one way and as long as the first.
    offset   added before rounding, (rows, groups, size); starts as the least that gives the solution it begins from.
    reach    factors on the low and high end of each range, (2, rows, groups).
    """

    def __init__(self, weight: Tensor, start: Quantised, keep_zeros: bool):
        grid = start.grid
        self.travel = 4 / 2**grid.bits
        self._weight, self._grid = weight.view(*grid.scale.shape, -1), grid
        self._gone = self._weight == 0 if keep_zeros and not weight.all() else None
        self._low, self._high = -grid.zero * grid.scale, (grid.top - grid.zero) * grid.scale
        integers = start.integers.view_as(self._weight)
        away = integers - (self._weight / grid.scale[..., None] + grid.zero[..., None])
        away = torch.where((integers == 0) & (away > 0) | (integers == grid.top) & (away < 0), 0, away)  # clipped, not moved
        self.offset = torch.where(away.abs() <= 0.5, 0, away - 0.499 * away.sign()).requires_grad_()
        self.reach = torch.ones(2, *grid.scale.shape, device=weight.device).requires_grad_()

    def value(self) -> Tensor:
        """The weight as it would be read back, (rows, columns); differentiable."""
        grid = self._learned()
        value: Tensor = _Rounded.apply(self._weight, self.offset, self._gone, grid.scale, grid.zero, grid.top)  # type: ignore[no-untyped-call]
        return value.flatten(1)

    @torch.no_grad()
    def solution(self) -> Quantised:
        grid = self._learned()
        integers = _ratio(self._weight, self.offset, self._gone, grid.scale).add_(grid.zero[..., None]).round_().clamp_(0, grid.top)
        return Quantised(grid, integers.flatten(1).to(torch.uint8))

    def _learned(self) -> Grid:
        """The grid that the ranges make; differentiable."""
        low, high = self._low * self.reach[0], self._high * self.reach[1]
        if self._grid.symmetric:
            return Grid(self._grid.bits, True, self._grid.scale * self.reach[1], self._grid.zero)
        scale = ((high - low) / self._grid.top).clamp(min=1e-10)
        zero = -low / scale
        zero = zero + (zero.round() - zero).detach()  # a rounding whose gradient is that of the identity
        return Grid(self._grid.bits, False, scale, zero.clamp(0, self._grid.top))


class _Rounded(torch.autograd.Function):
    """scale (clamp(round(weight / scale + offset + zero), 0, top) - zero), the rounding's gradient being that of the identity.

    weight and offset are (rows, groups, size), scale and zero (rows, groups); `gone` says which weights take no offset.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, offset: Tensor, gone: Tensor | None, scale: Tensor, zero: Tensor, top: int) -> Tensor:
        steps = _ratio(weight, offset, gone, scale).add_(zero[..., None]).round_()
        inside = (steps >= 0).logical_and_(steps <= top)
        steps.clamp_(0, top).sub_(zero[..., None])
        ctx.save_for_backward(weight, gone, scale, steps, inside)
        return steps * scale[..., None]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, gone, scale, steps, inside = ctx.saved_tensors
        passed = gradient * inside
        of_zero = scale * (passed.sum(dim=-1) - gradient.sum(dim=-1)) if ctx.needs_input_grad[4] else None
        of_scale = torch.linalg.vecdot(gradient, steps).sub_(torch.linalg.vecdot(passed, weight).div_(scale))
        of_offset = passed.mul_(scale[..., None])
        return None, of_offset if gone is None else of_offset.masked_fill_(gone, 0), None, of_scale, of_zero, None


def _ratio(weight: Tensor, offset: Tensor, gone: Tensor | None, scale: Tensor) -> Tensor:
    """Where each weight lies on the grid, from its zero point."""
    ratio = weight / scale[..., None]
    return ratio.add_(offset) if gone is None else ratio.add_(offset.masked_fill(gone, 0))
