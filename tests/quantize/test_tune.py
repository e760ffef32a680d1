"""The last phase end to end: its gradients against plain autograd in float64, what it may change, and what that is worth."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compress.model.loading import load_model
from compress.quantize import _tune, gptq, rtn
from compress.quantize._grid import fit
from compress.quantize._solution import Quantised
from tests.blocks import bundle, context, examples, lively, saved
from tests.conftest import TASKS

STEPS = 30


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_are_those_of_the_unpacked_weight(symmetric):
    torch.manual_seed(0)
    layer = nn.Linear(64, 24)
    grid = fit(layer.weight.data, gptq.Settings(group_size=32, symmetric=symmetric), 3)
    scaled = _tune._Scaled(layer, Quantised(grid, grid.integers(layer.weight.data)))
    scaled.factor.data.uniform_(0.9, 1.1)
    states = torch.randn(2, 5, 64, requires_grad=True)
    slope = torch.randn(2, 5, 24)
    out = scaled(states)
    out.backward(slope)

    factor = scaled.factor.detach().double().requires_grad_()
    doubled = states.detach().double().requires_grad_()
    steps = (grid.integers(layer.weight.data).double() - grid.columns(64)[1].double()).view(24, 2, 32)
    weight = (steps * (grid.scale.double() * factor)[..., None]).view(24, 64)
    expected = doubled @ weight.t() + layer.bias.double()
    expected.backward(slope.double())
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert torch.allclose(scaled.factor.grad.double(), factor.grad, atol=1e-4)
    assert torch.allclose(states.grad.double(), doubled.grad, atol=1e-5)
    assert torch.allclose(scaled.bias.grad, slope.sum(dim=(0, 1)))


def quantised(toy, folder, method=gptq, **settings):
    """The files of a model in 3 bits, tuned or not."""
    label = not toy.model.can_generate()
    how = method.Settings(**{"bits": 3, "group_size": 32, **settings})
    method.apply(toy, how, context(examples=examples(12, label))).save(folder)
    return folder, load_file(folder / "model.safetensors")


def divergence(toy, model):
    """On the examples that it learned from, since toys have nothing in common with others; nats a position, float64."""
    original, apart = toy.model, []
    for example in examples(12):
        ids = toy.tokenizer(example.prompt, return_tensors="pt").input_ids
        answer = toy.tokenizer(example.references[0], return_tensors="pt").input_ids
        if original.config.is_encoder_decoder:
            inputs = {"input_ids": ids, "decoder_input_ids": original.prepare_decoder_input_ids_from_labels(answer)}
        else:
            inputs = {"input_ids": torch.cat([ids, answer], dim=1) if original.can_generate() else ids}
        with torch.no_grad():
            reference, logs = (m(**inputs).logits.double().log_softmax(-1) for m in (original, model))
        apart.append(float((reference.exp() * (reference - logs)).sum(-1).mean()))
    return sum(apart) / len(apart)


@pytest.mark.parametrize("kind", TASKS)
def test_integers_and_matrices_stay_and_the_model_comes_nearer(tmp_path, kind):
    model = lively(kind)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(5)  # else all it says is much alike
    toy = bundle(saved(model, tmp_path / "toy"), kind)
    plain, before = quantised(toy, tmp_path / "plain")
    tuned, after = quantised(toy, tmp_path / "tuned", tune=STEPS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        if name.endswith("weight_scale") or (tensor.ndim == 1 and tensor.is_floating_point()):
            continue
        assert torch.equal(after[name], tensor), name
    scales = [name for name in before if name.endswith("weight_scale")]
    assert scales and all(not torch.equal(after[name], before[name]) for name in scales)
    models = [load_model(bundle(folder, kind).source, "cpu") for folder in (plain, tuned)]
    far, near = (divergence(toy, model) for model in models)
    assert near < 0.9 * far


def test_it_goes_with_every_storage(tmp_path):
    """Widths by pattern, which are stored apart, and GPTQ's files."""
    toy = bundle(saved(lively("llama"), tmp_path / "toy"), "llama")
    _, before = quantised(toy, tmp_path / "apart", bits={"*self_attn*": 4, "*": 3}, tune=3)
    toy = bundle(saved(lively("llama", lambda config: setattr(config, "intermediate_size", 160)), tmp_path / "by-32"), "llama")
    _, after = quantised(toy, tmp_path / "as-gptq", format="gptq", symmetric=True, tune=3)
    assert any(name.endswith("weight_packed") for name in before)
    assert {tensor.dtype for name, tensor in after.items() if name.endswith(".scales")} == {torch.float16}


def test_zeros_of_pruning_stay_and_halves_stay_halves(tmp_path):
    model = lively("llama")
    pruned = model.model.layers[0].mlp.up_proj.weight
    pruned.data[:, ::3] = 0
    toy = bundle(saved(model.to(torch.bfloat16), tmp_path / "toy"), "llama", "bfloat16")
    folder, tensors = quantised(toy, tmp_path / "tuned", rtn, tune=3)
    read = load_model(bundle(folder, "llama", "bfloat16").source, "cpu")
    with torch.no_grad():
        read(torch.tensor([[5, 6]]))  # weights are unpacked at the first step
    assert not read.model.layers[0].mlp.up_proj.weight[:, ::3].any()
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.bfloat16}


def test_rounding_alone_wants_examples_where_it_is_tuned():
    assert rtn.Settings(tune=1).needs_examples()
    assert not rtn.Settings().needs_examples()
