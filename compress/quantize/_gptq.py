"""GPTQ's solver (Frantar et al. 2022), for the method of that name and for those that start from its solution."""

from dataclasses import replace

import torch
from torch import Tensor

from compress.calibration.block import Block
from compress.calibration.hessian import inverse_factor
from compress.calibration.inputs import second_moments, turns
from compress.quantize._grid import Grid, GridSettings, fit
from compress.quantize._solution import Quantised

BLOCK = 32  # columns whose errors are carried on one by one; to all behind them they are carried together


def solve_block(block: Block, settings: GridSettings, damping: float) -> None:
    """Set every layer of a block, in the order they run, each on the inputs that the solved ones give it."""
    for turn in turns(block):
        moments = second_moments(block, [group[0] for group in turn])
        for group in turn:
            if block.sound(group, own := moments.pop(group[0])):
                for bits in sorted({block.bits[name] for name in group}):
                    _solve_alike(block, [name for name in group if block.bits[name] == bits], own, settings, bits, damping)


def _solve_alike(block: Block, names: list[str], moments: Tensor, settings: GridSettings, bits: int, damping: float) -> None:
    """Set layers with one input and as many bits, at once: rows don't depend on each other."""
    weight = torch.cat([block.weights[name].float() for name in names])
    solution = solve_layer(weight, moments, settings, bits, damping, names[0])
    start = 0
    for name in names:
        rows = slice(start, start := start + len(block.weights[name]))
        scale, zero = (part[rows].contiguous().clone() for part in (solution.grid.scale, solution.grid.zero))
        block.set(name, Quantised(replace(solution.grid, scale=scale, zero=zero), solution.integers[rows].clone()))


def solve_layer(weight: Tensor, moments: Tensor, settings: GridSettings, bits: int, damping: float, name: str = "") -> Quantised:
    """Integers for a weight (rows, columns) that keep its outputs, given its inputs' second moments (columns, columns).

    Ranges are searched by what they cost the outputs, not the weights. A text's first tokens make states so large that a few columns carry
    them, and ranges by weights alone lose those. On SmolLM2 at 3 bits the divergence at first tokens is 3.3 by weights and 0.06 by outputs,
    and in the mean 0.54 and 0.44. Once the integers stand, the scales that suit them best solve a least-squares problem in closed form.

    Raises BrokenPromise when the Hessian can't be factored at any damping.
    """
    grid = fit(weight, settings, bits, moments)
    integers = _columns(weight, grid, moments, damping, settings.keep_zeros, name)
    return Quantised(replace(grid, scale=_refitted(weight, grid, integers, moments)), integers)


def _refitted(weight: Tensor, grid: Grid, integers: Tensor, moments: Tensor) -> Tensor:
    """The scales (rows, groups) with which these integers lose least of the outputs; a row whose solution is far off keeps its own."""
    rows, groups = grid.scale.shape
    steps = integers - grid.columns(weight.shape[1])[1]
    size = weight.shape[1] // groups
    aim, products = weight @ moments, torch.empty(rows, groups, groups, device=weight.device)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        products[:, group] = ((steps[:, part] @ moments[part]) * steps).view(rows, groups, size).sum(dim=2)
    right_hand_side = (aim * steps).view(rows, groups, size).sum(dim=2)
    ridge = 1e-6 * products.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=1e-12)
    products.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    scale, failed = torch.linalg.solve_ex(products, right_hand_side)
    times = scale / grid.scale
    near = (times > 0.5) & (times < 2) & (failed == 0)[:, None]
    return torch.where(near.all(dim=1, keepdim=True), scale, grid.scale)


def _columns(weight: Tensor, grid: Grid, moments: Tensor, damping: float, keep_zeros: bool, name: str) -> Tensor:
    """The integers of each row, uint8, column by column in the order of their inputs' size, a block of columns at a time."""
    columns = weight.shape[1]
    order = torch.argsort(moments.diagonal(), descending=True)
    factor = inverse_factor(moments[order[:, None], order], damping, name)
    # transposed, so that a column lies in one piece
    group = order // (columns // grid.scale.shape[1])
    scale, zero, left = (part.t()[at].contiguous() for part, at in ((grid.scale, group), (grid.zero, group), (weight, order)))
    integers = torch.empty_like(left, dtype=torch.uint8)
    gone = left == 0
    sparse = keep_zeros and bool(gone.any())
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block, inner = left[start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            s, z = scale[start + j], zero[start + j]
            q = (block[j] / s).add_(z).round_().clamp_(0, grid.top)
            if sparse:
                q = torch.where(gone[start + j], z, q)
            integers[start + j] = q
            errors[j] = (block[j] - (q - z) * s) / inner[j, j]
            block[j + 1 :].addr_(inner[j, j + 1 :], errors[j], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return integers[torch.argsort(order)].t().contiguous()
