"""Quantisation-aware training: the rounding's gradients by their formula, and that training does what it is for."""

import numpy as np
import pytest
import torch

from compress import methods
from compress.calibration.stream import encoded, padded
from compress.methods import Context, Example, quiet
from compress.model.loading import load_model
from compress.model.source import Source
from compress.quantize import _grid, qat
from compress.training.material import labels
from tests.blocks import bundle, context, examples, lively, saved
from tests.conftest import TASKS


def by_formula(weight, scale, zero, top, size, upstream):
    """Forward and backward of Esser et al. 2020 (equations 1 to 3, the step size's gradient scaled as in section 2.2), in float64 loops."""
    rows, columns = weight.shape
    value, to_weight, to_scale = np.zeros_like(weight), np.zeros_like(weight), np.zeros_like(scale)
    for i in range(rows):
        for j in range(columns):
            s, z = scale[i, j // size], zero[i, j // size]
            v = weight[i, j] / s
            if v <= -z:
                q, slope, inside = -z, -z, 0.0
            elif v >= top - z:
                q, slope, inside = top - z, top - z, 0.0
            else:
                q = np.round(v + z) - z
                slope, inside = q - v, 1.0
            value[i, j] = q * s
            to_weight[i, j] = upstream[i, j] * inside
            to_scale[i, j // size] += upstream[i, j] * slope
    return value, to_weight, to_scale / np.sqrt(size * top)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_and_its_gradients_are_those_of_the_paper(bits, group_size, symmetric):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 64, generator=generator)
    upstream = torch.randn(6, 64, generator=generator)
    grid = _grid.fit(weight, _grid.GridSettings(group_size=group_size, symmetric=symmetric), bits)
    rounding = qat._rounded(grid, torch.ones_like(weight))
    with torch.no_grad():
        rounding.scale.mul_(0.7)  # so that some are clipped
    trained = weight.clone().requires_grad_()
    out = rounding(trained)
    out.backward(upstream)
    sign = grid.scale.sign()  # what is learned is how large a scale is
    value, to_weight, to_scale = by_formula(
        weight.double().numpy(), (rounding.scale.detach() * sign).double().numpy(), grid.zero.double().numpy(), grid.top,
        64 if group_size == -1 else group_size, upstream.double().numpy(),
    )  # fmt: skip
    assert (to_weight == 0).any() and (to_weight != 0).any()
    assert np.allclose(out.detach().double().numpy(), value, rtol=1e-5, atol=1e-6)
    assert np.allclose(trained.grad.double().numpy(), to_weight, rtol=1e-5, atol=1e-6)
    assert np.allclose((rounding.scale.grad * sign).double().numpy(), to_scale, rtol=1e-3, atol=1e-4)
    assert torch.allclose(rounding.solution(weight).weight(), out.detach(), rtol=1e-5, atol=1e-6), "trained as it is stored"


def apply(toy, method, told, **settings):
    module = methods.find("quantize", method)
    return module.apply(toy, module.Settings(**settings), told)


def answers(model, toy, told):
    """Log-probabilities at every real position of what the model says, one example at a time."""
    parts = []
    with torch.no_grad():
        for _, ids, answer in encoded(model, toy.tokenizer, told):
            parts.append(model(**padded(model, [(ids, answer)])).logits.double().log_softmax(-1).reshape(-1, model.config.vocab_size))
    return torch.cat(parts)


def divergence(folder, kind, toy, told):
    before, after = load_model(toy.source, "cpu"), load_model(Source(str(folder), TASKS[kind]), "cpu")
    whole = answers(before, toy, told)
    return float((whole.exp() * (whole - answers(after, toy, told))).sum(dim=-1).mean())


@pytest.fixture(scope="module")
def lively_toys(tmp_path_factory):
    """Random models sure enough of what they say that rounding shows."""
    folders = {}
    for kind in ("llama", "t5", "bert"):
        model = lively(kind)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2 and "llama" in kind and "proj" in name:
                    parameter.mul_(4)
                if parameter.ndim == 2 and "embed" in name:
                    parameter.mul_(5)
        folders[kind] = saved(model, tmp_path_factory.mktemp("lively") / kind)
    return folders


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_training_brings_two_bits_nearer_to_the_original_than_rounding(lively_toys, tmp_path, kind):
    toy, told = bundle(lively_toys[kind], kind), context()
    apply(toy, "rtn", told, bits=2, group_size=-1).save(tmp_path / "rounded")
    toy = bundle(lively_toys[kind], kind)
    apply(toy, "qat", told, bits=2, group_size=-1, steps=20, batch_size=6, learning_rate=3e-3).save(tmp_path / "trained")
    toy = bundle(lively_toys[kind], kind)
    rounded, trained = (divergence(tmp_path / name, kind, toy, told) for name in ("rounded", "trained"))
    assert trained < 0.5 * rounded


def entropy_of_targets(folder, kind, dtype, toy, told):
    """The mean cross-entropy of what should be said, written out position by position."""
    model, lost = load_model(Source(str(folder), TASKS[kind], dtype), "cpu"), []
    for example, ids, answer in encoded(model, toy.tokenizer, told):
        with torch.no_grad():
            logs = model(**padded(model, [(ids, answer)])).logits[0].double().log_softmax(-1)
        if kind == "bert":
            lost.append(-float(logs[int(example.references[0])]))
        elif kind == "t5":
            lost += [-float(logs[n, token]) for n, token in enumerate(answer)]
        else:
            first = len(ids) - len(answer) if answer else 1
            lost += [-float(logs[n - 1, ids[n]]) for n in range(first, len(ids))]
    return np.mean(lost)


@pytest.mark.parametrize("case", ["llama", "llama on plain text", "t5", "bert"])
def test_training_on_targets_learns_them(lively_toys, tmp_path, case):
    kind = case.split(" ", maxsplit=1)[0]
    seen = examples(label=kind == "bert")
    if "text" in case:
        seen = [Example(e.id, e.prompt, []) for e in seen]
    toy, told = bundle(lively_toys[kind], kind), context(examples=seen)
    before = entropy_of_targets(lively_toys[kind], kind, "float32", toy, told)
    settings = {"bits": 4, "group_size": -1, "steps": 30, "batch_size": 6, "learning_rate": 3e-3}
    apply(toy, "qat", told, loss="targets", **settings).save(tmp_path / "made")
    after = entropy_of_targets(tmp_path / "made", kind, "auto", toy, told)
    assert after < (0.9 if kind == "bert" else 0.7) * before


def test_labels_stand_where_the_logits_should_give_them(toys):
    """By hand: position n of a decoder gives token n + 1, of an answer and its end alone; plain text is learned whole."""
    toy = bundle(toys["llama"], "llama")
    model, tokenizer = toy.model, toy.tokenizer
    cat, dog, red, end = (tokenizer.convert_tokens_to_ids(word) for word in ("cat", "dog", "red", "</s>"))
    rows = encoded(model, tokenizer, context(examples=[Example("0", "cat cat dog", ["red dog"]), Example("1", "dog red", [])]))
    inputs = padded(model, [(ids, answer) for _, ids, answer in rows])
    assert inputs["input_ids"].tolist() == [[cat, cat, dog, red, dog, end], [dog, red, end, 0, 0, 0]]
    assert labels(model, inputs, rows).tolist() == [[-100, -100, red, dog, end, -100], [red, end, -100, -100, -100, -100]]

    toy = bundle(toys["t5"], "t5")
    rows = encoded(toy.model, tokenizer, context(examples=[Example("0", "cat", ["red dog"]), Example("1", "dog red cat", ["cat"])]))
    inputs = padded(toy.model, [(ids, answer) for _, ids, answer in rows])
    assert inputs["decoder_input_ids"].tolist() == [[0, red, dog], [0, cat, end]]
    assert labels(toy.model, inputs, rows).tolist() == [[red, dog, end], [cat, end, -100]]

    toy = bundle(toys["bert"], "bert")
    rows = encoded(toy.model, tokenizer, context(examples=[Example("0", "cat", ["1"]), Example("1", "dog red", ["LABEL_0"])]))
    assert labels(toy.model, {}, rows).tolist() == [1, 0]


def test_a_classifier_learns_from_the_original_without_labels(toys):
    told = context(examples=[Example(e.id, e.prompt, []) for e in examples()])
    apply(bundle(toys["bert"], "bert"), "qat", told, bits=4, group_size=-1, steps=2, batch_size=6)
    assert sum(row["bits"] == 4 for row in told.layers) == 12


def test_progress_is_told_and_every_layer_is_noted(toys, tmp_path):
    progress: list = []
    told = Context("cpu", lambda *line: progress.append(line), examples(), 32)
    apply(bundle(toys["llama"], "llama"), "qat", told, bits=3, group_size=32, steps=4, batch_size=3)
    assert [line[1:] for line in progress if line[0].startswith("training")] == [(n, 4) for n in (1, 2, 3, 4)]
    noted = {row["name"]: row for row in told.layers if row["bits"]}
    assert len(noted) == 14
    assert all(row["bits"] == 3 and 0 < row["error"] < 1 for row in noted.values())
    assert {row["name"] for row in told.layers if not row["bits"]} == {"lm_head"}


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_the_artifact_is_an_ordinary_one_on_a_grid(toys, tmp_path, kind):
    told = Context("cpu", quiet, examples(label=kind == "bert"), 32)
    toy = bundle(toys[kind], kind)
    kept = {name: tensor.clone() for name, tensor in toy.model.state_dict().items()}
    apply(toy, "qat", told, bits=2, group_size=-1, steps=3, batch_size=2).save(tmp_path / "made")
    loaded = load_model(Source(str(tmp_path / "made"), TASKS[kind]), "cpu")
    for layer in told.layers:
        weight = loaded.get_submodule(layer["name"]).weight
        if layer["bits"]:
            assert all(len(row.unique()) <= 4 for row in weight), layer["name"]
        else:
            assert torch.equal(weight, kept[f"{layer['name']}.weight"])
    outside = [name for name in kept if "embed" in name or name == "shared.weight"]
    assert outside
    assert all(torch.equal(loaded.state_dict()[name], kept[name]) for name in outside), "what stands outside the blocks stays as it is"


@pytest.mark.parametrize("settings", [{"ignore": ["lm_head", "down_proj"]}, {"bits": {"*.self_attn.*": 4, "up_proj": 4, "gate_proj": 4}}])
def test_layers_left_out_are_not_trained(toys, tmp_path, settings):
    toy, told = bundle(toys["llama"], "llama"), context()
    kept = {name: tensor.clone() for name, tensor in toy.model.state_dict().items()}
    apply(toy, "qat", told, **settings, group_size=-1, steps=3, batch_size=2, learning_rate=1e-2).save(tmp_path / "made")
    loaded = load_model(Source(str(tmp_path / "made"), "causal-lm"), "cpu")
    left_out = [row["name"] for row in told.layers if not row["bits"]]
    assert sorted(left_out) == ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    for name in left_out:
        assert torch.equal(loaded.get_submodule(name).weight, kept[f"{name}.weight"]), name


def test_the_same_seed_gives_the_same_model_and_another_another(toys):
    scales = []
    for seed in (0, 0, 1):
        trained = apply(
            bundle(toys["llama"], "llama"), "qat", context(), bits=4, group_size=-1, steps=3, batch_size=2, seed=seed, learning_rate=1e-2
        )
        scales.append(trained.model.model.layers[0].mlp.up_proj.weight_scale.clone())
    assert torch.equal(scales[0], scales[1])
    assert not torch.equal(scales[0], scales[2])
