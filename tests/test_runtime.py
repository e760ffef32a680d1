"""FBGEMM's int8 kernels in the place of torchao's, against a reference in float64 and on every architecture."""

import numpy as np
import pytest
import torch

from compress import use_cpu_int8, use_sparse_24
from compress.errors import DeviceError
from compress.model.loading import load_model
from compress.model.source import Source
from compress.runtime import Int8Linear
from tests.conftest import TASKS
from tests.quantize.test_methods import logits, make
from tests.wide import run, stored, wide


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("divided", [True, False])
def test_a_layer_gives_the_product_of_the_rounded_parts(bias, divided):
    """Reference in float64. Tokens of very unlike size, each rounded on a grid of its own of 127 steps or finer."""
    draw = np.random.default_rng(0)
    integers, scale = draw.integers(-128, 128, (24, 64)).astype(np.int8), draw.uniform(0.01, 0.03, 24)
    x = draw.normal(size=(2, 5, 64)) * np.array([1e-3, 1, 1e3, 1e6, 0])[:, None]
    factor, shift = draw.uniform(0.5, 2, 64), draw.normal(size=24)

    def tensor(values):
        return torch.tensor(values, dtype=torch.float32)

    layer = Int8Linear(torch.tensor(integers), tensor(scale), tensor(shift) if bias else None, tensor(factor) if divided else None)
    product = layer(tensor(x)).double().numpy() - shift * bias
    inputs = x * factor if divided else x
    weight = integers * scale[:, None]
    step = np.abs(inputs).max(-1, keepdims=True) / 127 * 2  # of 7 bits
    assert product.shape == (2, 5, 24)
    # rounding errors of at most half a step, of random sign
    limit = 6 * step / 12**0.5 * np.linalg.norm(weight, axis=1)
    assert (np.abs(product - inputs @ weight.T) <= limit + 1e-5 * np.abs(shift)).all()


@pytest.mark.parametrize(("rows", "columns"), [(24, 64), (33, 172), (7, 3)])
def test_a_token_is_rounded_alike_whatever_stands_beside_it(rows, columns):
    """To the bit: alone, in a batch, among tokens a million times its size, in another place."""
    torch.manual_seed(0)
    layer = Int8Linear(torch.randint(-128, 128, (rows, columns), dtype=torch.int8), torch.rand(rows), torch.randn(rows), None)
    tokens = (
        torch.randn(6, columns) * torch.tensor([1e-3, 1.0, 1.0, 1e3, 0.0, 1.0])[:, None] + torch.tensor([0, 0, 5.0, 0, 0, -2.0])[:, None]
    )
    single = torch.cat([layer(token[None]) for token in tokens])
    for others in (torch.randn(5, columns) * 1e6, torch.zeros(3, columns), torch.rand(40, columns)):
        assert torch.equal(layer(torch.cat([others, tokens]))[len(others) :], single)
        assert torch.equal(layer(torch.cat([tokens, others]))[: len(tokens)], single)
    assert torch.equal(layer(tokens.view(2, 3, columns)).view(6, rows), single)


def test_numbers_of_one_sign_have_the_whole_grid():
    """What ReLU leaves, against float64: half a step of a grid from the least to the largest, not of one twice as wide."""
    torch.manual_seed(0)
    integers, scale, x = torch.randint(-128, 128, (16, 256), dtype=torch.int8), torch.rand(16) / 100, torch.rand(9, 256)
    product = Int8Linear(integers, scale, None, None)(x).double()
    weight = integers.double() * scale.double()[:, None]
    step = (x.amax(1) - x.amin(1)).double() / 127
    error = (product - x.double() @ weight.T) / (step[:, None] / 12**0.5 * weight.norm(dim=1))
    assert error.square().mean().sqrt() < 1.1


@pytest.mark.parametrize("method", ["int8_dynamic", "smoothquant"])
@pytest.mark.parametrize("kind", TASKS)
def test_every_int8_layer_is_replaced_and_the_model_gives_the_same(toys, tmp_path, method, kind):
    target = make(toys[kind], kind, method, tmp_path / "made")
    loaded, expected = logits(target, kind)
    layers = sum(type(getattr(module, "weight", None)).__name__ == "Int8Tensor" for module in loaded.modules())
    assert use_cpu_int8(loaded) == layers > 0
    ids = torch.arange(3, 23)[None]
    extra = {"decoder_input_ids": ids[:, :8]} if loaded.config.is_encoder_decoder else {}
    with torch.inference_mode():
        actual = loaded(ids, **extra).logits
    assert actual.dtype == expected.dtype
    assert 0 < ((actual - expected).norm() / expected.norm()).item() < 0.06
    if loaded.can_generate():
        assert loaded.generate(ids, max_new_tokens=3, min_new_tokens=3).shape[0] == 1


def test_a_model_without_int8_layers_stays_as_it_is(toys):
    loaded = load_model(Source(str(toys["llama"]), "causal-lm"), "cpu")
    before = list(loaded.modules())
    assert use_cpu_int8(loaded) == 0
    assert list(loaded.modules()) == before


def test_sparse_tensor_cores_are_refused_on_a_cpu(toys):
    loaded = load_model(Source(str(toys["llama"]), "causal-lm"), "cpu")
    with pytest.raises(DeviceError, match=r"sparse_24: the model is on cpu.*compute capability 8\.0"):
        use_sparse_24(loaded)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TASKS)
def test_layers_pruned_in_the_pattern_run_on_sparse_tensor_cores(kind, tmp_path):
    folder = stored(wide(kind), tmp_path / "whole")
    pruned = run("magnitude", kind, folder, tmp_path / "made", pattern="2:4")
    ids = torch.arange(3, 23, device="cuda")[None]
    loaded = load_model(Source(str(pruned), TASKS[kind], "float16"), "cuda")
    extra = {"decoder_input_ids": ids[:, :8]} if loaded.config.is_encoder_decoder else {}
    with torch.inference_mode():
        expected = loaded(ids, **extra).logits
        assert use_sparse_24(loaded) > 0
        logits = loaded(ids, **extra).logits
    assert ((logits - expected).norm() / expected.norm()).item() < 0.02
    if loaded.can_generate():
        assert loaded.generate(ids, max_new_tokens=3, min_new_tokens=3).shape[0] == 1
