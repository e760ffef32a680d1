"""Grids, solvers and packing against definitions written out in float64."""

import re

import numpy as np
import pytest
import torch

from compress.errors import BrokenPromise
from compress.quantize import _gptq, _grid, _pack
from compress.quantize._solution import Quantised
from compress.quantize.gptq import Settings
from tests.conftest import make_model


def weight(rows=24, columns=64, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(tokens=512, columns=64, seed=1):
    """Correlated inputs, as layers have them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + 2 * mix)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_searched_grid_is_no_worse_than_the_full_range(bits, symmetric):
    w = weight()
    grid = _grid.fit(w, Settings(group_size=32, symmetric=symmetric), bits)
    w64 = w.double().numpy().reshape(24, 2, 32)
    low, high = np.minimum(w64.min(axis=2), 0), np.maximum(w64.max(axis=2), 0)
    if symmetric:
        high = np.maximum(high, -low)
        scale, zero = 2 * high / (2**bits - 1), np.full_like(high, 2 ** (bits - 1))
    else:
        scale = (high - low) / (2**bits - 1)
        zero = np.round(-low / scale)
    q = np.clip(np.round(w64 / scale[..., None] + zero[..., None]), 0, 2**bits - 1)
    full = (((q - zero[..., None]) * scale[..., None] - w64) ** 2).sum()
    assert (grid.rounded(w) - w).double().square().sum().item() <= full * 1.0001
    integers = grid.integers(w)
    assert integers.min() >= 0 and integers.max() <= 2**bits - 1
    assert grid.scale.shape == grid.zero.shape == (24, 2)


def test_gptq_loses_less_than_rounding():
    w, x = weight(), inputs()
    solution = _gptq.solve_layer(w, x.t() @ x / len(x), Settings(group_size=32), 3, 0.01)
    solved, rounded = solution.grid.values(solution.integers), solution.grid.rounded(w)

    def lost(v):
        return ((x.double() @ (v - w).double().t()) ** 2).sum() / ((x.double() @ w.double().t()) ** 2).sum()

    assert lost(solved) < 0.7 * lost(rounded)


def test_a_range_searched_for_the_outputs_loses_less_there():
    """Against the definition in float64: the squared change of each group's share of the output."""
    w, x = weight(), inputs()
    moments = x.t() @ x / len(x)

    def lost(grid):
        change = (grid.rounded(w) - w).double().reshape(24, 2, 32)
        return sum(((x[:, 32 * g : 32 * g + 32].double() @ change[:, g].t()) ** 2).sum() for g in range(2))

    settings = Settings(group_size=32)
    assert lost(_grid.fit(w, settings, 3, moments)) < lost(_grid.fit(w, settings, 3))


def test_gptq_on_white_inputs_is_round_to_nearest():
    """With a diagonal Hessian no column can make up for another."""
    w = weight()
    solution = _gptq.solve_layer(w, torch.eye(64), Settings(group_size=-1), 4, 0.01)
    assert torch.equal(solution.integers, solution.grid.integers(w))


def test_one_column_at_a_time_as_the_paper_has_it():
    """The update of Frantar et al. 2022, equation 2, in float64 without blocks and Cholesky, against the blocked solver."""
    w, x = weight(rows=4, columns=16), inputs(columns=16)
    moments = x.t() @ x / len(x)
    solution = _gptq.solve_layer(w, moments, Settings(group_size=-1), 3, 0.01)
    h = moments.double() + 0.01 * moments.diagonal().double().mean() * torch.eye(16)
    left, done, order = w.double().clone(), torch.zeros(4, 16), torch.argsort(moments.diagonal(), descending=True).tolist()
    # what the integers were found on; the scales are refitted after
    scale, zero = _grid.fit(w, Settings(group_size=-1), 3, moments).columns(16)
    for step, column in enumerate(order):
        rest = order[step:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        q = (left[:, column] / scale[:, column] + zero[:, column]).round().clamp(0, 7)
        done[:, column] = q
        error = (left[:, column] - (q - zero[:, column]) * scale[:, column]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    assert torch.equal(solution.integers.float(), done)


def test_a_dead_input_is_harmless_and_an_impossible_hessian_is_said():
    w, x = weight(), inputs()
    x[:, 5] = 0
    moments = x.t() @ x / len(x)
    solution = _gptq.solve_layer(w, moments, Settings(group_size=-1), 4, 0.01)
    assert torch.equal(solution.integers[:, 5], _grid.fit(w, Settings(group_size=-1), 4, moments).integers(w)[:, 5])
    with pytest.raises(BrokenPromise, match=r"mlp\.fc1: its Hessian is not positive definite"):
        _gptq.solve_layer(w, torch.full((64, 64), float("nan")), Settings(group_size=-1), 4, 0.01, "mlp.fc1")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_layers_are_unpacked_to_the_same_values_by_the_formats_own_library(bits):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    w, layer = weight(), torch.nn.Linear(64, 24)
    grid = _grid.fit(w, Settings(group_size=32), bits)
    integers = grid.integers(w)
    model = make_model("llama")
    kind = _grid.Kind(bits, False, 32)
    holder = _pack.Packed(model, {"layer": kind}).packed("layer", layer, Quantised(grid, integers))
    group = {"weights": {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}, "targets": ["Linear"]}
    state = {name: p.data for name, p in holder.named_parameters() if name != "bias"}
    read = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, QuantizationScheme(**group))["weight"]
    assert torch.allclose(read, grid.values(integers), atol=1e-6)
    assert holder.weight_packed.numel() * 32 == w.numel() * bits


@pytest.mark.parametrize(
    ("weights", "group_size", "size", "message"),
    [
        ({576: 75, 1536: 25}, None, 64, "group_size is 64, the largest of 128, 64 and 32 that divides every layer's columns"),
        ({576: 75, 1536: 25}, 32, 32, None),
        ({576: 75, 1536: 25}, -1, -1, None),
        ({576: 75, 1536: 25}, 128, 128, "75 % of the weights, in layers of 576 columns, have a scale a row.*; 64 divides them all"),
        ({64: 77, 172: 23}, None, 64, "64, which divides most: none of.*23 % of the weights, in layers of 172 columns, have a scale a row"),
        ({64: 77, 172: 23}, 128, 128, "100 % of the weights, in layers of 64, 172 columns.*leave group_size out"),
        ({100: 1, 172: 1}, None, -1, "group_size is -1, a scale a row: 128, 64 and 32 do not divide the layers' 100, 172 columns"),
    ],
)
def test_the_group_size_is_what_divides_and_the_rest_is_said(weights, group_size, size, message):
    settings = Settings(group_size=group_size)
    assert settings.sized(weights).group_size == size
    sentences = settings.about_shapes(weights)
    assert len(sentences) == (message is not None)
    assert message is None or re.search(message, sentences[0])


def test_gptqs_files_hold_one_kind_of_grid_and_get_one():
    assert Settings(format="gptq").sized({64: 77, 172: 23}).group_size == -1
    assert Settings(format="gptq").sized({64: 77, 192: 23}).group_size == 64


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_search_in_coarse_and_fine_steps_is_as_good_as_one_of_all_ranges(bits, symmetric):
    """All 80 ranges tried one by one, in float64; some groups are zeros, some of one sign, some with one large weight."""
    w = weight(rows=40)
    w[0], w[1], w[2, 5] = 0, w[1].abs(), 9
    grid = _grid.fit(w, Settings(group_size=32, symmetric=symmetric), bits)
    w64 = w.double().reshape(40, 2, 32)
    low, high = w64.amin(dim=2).clamp(max=0), w64.amax(dim=2).clamp(min=0)
    errors = []
    sign = torch.where(high > -low, -1, 1)[..., None] if symmetric else 1  # the longer end has the level more
    for step in range(80):
        scale, zero = (part[..., None] for part in _grid.grid_of(low * (1 - step / 100), high * (1 - step / 100), bits, symmetric))
        scale = scale * sign
        values = ((w64 / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale
        errors.append(((values - w64) ** 2).sum(dim=2))
    least = torch.stack(errors).amin(dim=0)
    errors_of_grid = ((grid.rounded(w).double().reshape(40, 2, 32) - w64) ** 2).sum(dim=2)
    assert errors_of_grid.sum() < 1.003 * least.sum()
    assert torch.allclose(errors_of_grid, least, rtol=0.1, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_longer_end_of_a_symmetric_grid_has_the_level_more(bits):
    """A group that is all levels of such a grid, turned either way, is read as it was; with a positive scale alone one of them isn't."""
    levels = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).float()
    w = torch.stack([levels, -levels]).repeat(1, max(1, 32 // len(levels)))[:, :256] * 0.25
    grid = _grid.fit(w, Settings(group_size=-1, symmetric=True), bits)
    assert grid.scale.sign().flatten().tolist() == [1, -1]
    assert (grid.rounded(w) - w).abs().max() < 0.02 * w.abs().max(), "but for the hundredths by which ranges shrink"
    plain = _grid.fit(w, Settings(group_size=-1, symmetric=True), bits, signed=False)
    assert (plain.rounded(w) - w)[1].square().mean() > 2 * (grid.rounded(w) - w)[1].square().mean()
