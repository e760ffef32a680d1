"""Learned rounding: its gradients, and what it makes of little to learn from."""

import pytest
import torch
from torch.testing import assert_close

from compress.model.loading import load_model
from compress.quantize import autoround, gptq
from compress.quantize._grid import GridSettings, fit
from compress.quantize._rounding import LearnedRounding
from compress.quantize._solution import Quantised
from tests.blocks import bundle, context, lively, saved


def weight(toy, folder, method, seen, **settings):
    """Of the first layer, as it is read."""
    method.apply(toy, method.Settings(bits=3, group_size=32, **settings), seen).save(folder)
    model = load_model(bundle(folder, "llama").source, "cpu")
    return model.model.layers[0].self_attn.q_proj.weight.detach()


def test_a_few_steps_turn_few_roundings(tmp_path):
    """Steps of a whole rounding each would turn most of them, by the sign of whatever noise there is."""
    model = lively("llama", lambda config: setattr(config, "intermediate_size", 160))
    toy, seen = bundle(saved(model, tmp_path / "toy"), "llama"), context()
    original = toy.model.model.layers[0].self_attn.q_proj.weight.detach()
    start, learned = weight(toy, tmp_path / "start", gptq, seen), weight(toy, tmp_path / "learned", autoround, seen, steps=3)
    assert 0 < (learned - start).norm() < 0.8 * (start - original).norm()


def test_examples_too_few_for_the_layers_are_said(tmp_path):
    toy, seen = bundle(saved(lively("llama"), tmp_path / "toy"), "llama"), context()
    tokens = sum(len(toy.tokenizer(example.prompt).input_ids) + 1 + len(example.references[0].split()) for example in seen.examples)
    assert tokens < 172, "the width of its widest layer"
    gptq.apply(toy, gptq.Settings(), seen)
    assert any("tokens, fewer than the 172 inputs of its widest layer" in sentence for sentence in seen.said)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_that_autograd_finds(symmetric):
    """In float64, where rounding passes gradients as if it weren't there and clipping those inside alone."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 128, generator=generator)
    weight[3, :20] = 0
    grid = fit(weight, GridSettings(group_size=64, symmetric=symmetric), 2)
    rounding = LearnedRounding(weight, Quantised(grid, grid.integers(weight)), keep_zeros=True)
    rounding.offset.data += torch.rand(rounding.offset.shape, generator=generator) - 0.5
    rounding.reach.data += 0.3 * torch.randn(rounding.reach.shape, generator=generator)
    offset, reach = (parameter.detach().double().requires_grad_() for parameter in (rounding.offset, rounding.reach))
    scale, zero = grid.scale.double(), grid.zero.double()
    if symmetric:
        scale = scale * reach[1]
    else:
        low, high = -zero * scale * reach[0], (3 - zero) * scale * reach[1]
        scale = (high - low) / 3
        zero = through(-low / scale).clamp(0, 3)
    groups = weight.double().view(12, 2, 64)
    integers = through(groups / scale[..., None] + zero[..., None] + offset * (groups != 0)).clamp(0, 3)
    value = ((integers - zero[..., None]) * scale[..., None]).flatten(1)
    assert_close(rounding.value(), value.float())
    assert_close(rounding.solution().weight(), value.float())
    upstream = torch.randn(12, 128, generator=generator)
    gradients = torch.autograd.grad(rounding.value(), [rounding.offset, rounding.reach], upstream)
    assert_close(gradients, tuple(part.float() for part in torch.autograd.grad(value, [offset, reach], upstream.double())))


def through(values):
    return values + (values.round() - values).detach()
