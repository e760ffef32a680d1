"""Scales refitted to GPTQ's integers, against least squares in float64."""

import numpy as np
import pytest
import torch

from compress.quantize import _gptq, _grid
from compress.quantize.gptq import Settings


def layer(rows=24, columns=64, tokens=512, seed=0):
    """A weight, and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + 2 * mix)
    return torch.randn(rows, columns, generator=generator), x.t() @ x / tokens


def lost(weight, grid, integers, moments):
    """What each row's output loses, (rows,), float64."""
    change = (grid.values(integers.float()) - weight).double().numpy()
    return np.einsum("ri,ij,rj->r", change, moments.double().numpy(), change)


def with_scale(grid, scale):
    return _grid.Grid(grid.bits, grid.symmetric, scale, grid.zero)


def least_squares(weight, grid, integers, moments):
    """The scales (rows, groups) that lose least, row by row, by numpy."""
    root = np.linalg.cholesky(moments.double().numpy()).T
    groups, columns = grid.scale.shape[1], weight.shape[1]
    steps = (integers.float() - grid.columns(columns)[1]).double().numpy()
    scales = []
    for row in range(len(weight)):
        spread = np.zeros((columns, groups))
        for column in range(columns):
            spread[column, column * groups // columns] = steps[row, column]
        scales.append(np.linalg.lstsq(root @ spread, root @ weight[row].double().numpy(), rcond=None)[0])
    return np.array(scales)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_refitted_scales_are_the_least_squares_solution(bits, group_size, symmetric):
    weight, moments = layer()
    grid = _grid.fit(weight, Settings(group_size=group_size, symmetric=symmetric), bits)
    integers = _gptq._columns(weight, grid, moments, 0.01, True, "layer")
    scale = _gptq._refitted(weight, grid, integers, moments)
    expected = least_squares(weight, grid, integers, moments)
    assert scale.shape == grid.scale.shape == expected.shape
    assert np.allclose(scale.double().numpy(), expected, rtol=2e-4)
    before, after = lost(weight, grid, integers, moments), lost(weight, with_scale(grid, scale), integers, moments)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tokens", [8, 40, 512])
def test_refitting_never_loses_more_even_on_singular_moments(tokens, seed):
    weight, moments = layer(tokens=tokens, seed=seed)
    weight[0, :32] = 0
    weight[1] = 0
    weight[2] *= 1e-6
    moments[5], moments[:, 5] = 0, 0
    grid = _grid.fit(weight, Settings(group_size=32), 2 + seed % 3)
    integers = _gptq._columns(weight, grid, moments, 0.01, True, "layer")
    scale = _gptq._refitted(weight, grid, integers, moments)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    before, after = lost(weight, grid, integers, moments), lost(weight, with_scale(grid, scale), integers, moments)
    size = np.einsum("ri,ij,rj->r", weight.double().numpy(), moments.double().numpy(), weight.double().numpy())
    assert (after <= before * (1 + 1e-5) + 1e-6 * size).all()


def test_a_row_whose_best_scale_is_far_off_keeps_its_own():
    weight, moments = layer()
    grid = _grid.fit(weight, Settings(group_size=32), 4)
    integers = _gptq._columns(weight, grid, moments, 0.01, True, "layer")
    off = grid.scale.clone()
    off[3] *= 3
    refitted = _gptq._refitted(weight, with_scale(grid, off), integers, moments)
    assert torch.equal(refitted[3], off[3])
    rest = [row for row in range(len(weight)) if row != 3]
    assert torch.allclose(refitted[rest], _gptq._refitted(weight, grid, integers, moments)[rest])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_solver_hands_out_the_refitted_scales(bits):
    weight, moments = layer(columns=160)
    settings = Settings(group_size=32, symmetric=bits == 3)
    solution = _gptq.solve_layer(weight, moments, settings, bits, 0.01)
    grid = _grid.fit(weight, settings, bits)
    assert np.allclose(solution.grid.scale.double().numpy(), least_squares(weight, grid, solution.integers, moments), rtol=2e-4)
    assert torch.equal(solution.grid.zero, grid.zero)
    assert lost(weight, solution.grid, solution.integers, moments).sum() < lost(weight, grid, solution.integers, moments).sum()
