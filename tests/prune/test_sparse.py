"""magnitude, wanda and sparsegpt against definitions written out in float64, and on every architecture."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.errors import InputError
from compress.methods import find
from compress.model.loading import AUTO, load_model
from compress.model.source import Source
from compress.prune import sparsegpt
from compress.prune._sparse import lowest
from tests.blocks import bundle, context, examples, run
from tests.conftest import TASKS
from tests.plain import plain

METHODS = ["magnitude", "wanda", "sparsegpt"]


def weights(model):
    """Every linear layer's weight, rows being outputs, float64."""
    from transformers.pytorch_utils import Conv1D

    matrices = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            weight = module.weight.detach().double().numpy()
            matrices[name] = weight.T if isinstance(module, Conv1D) else weight
    return matrices


def pruned(folder, kind, method, told=None, **chosen):
    module = find("prune", method)
    return module.apply(bundle(folder, kind), module.Settings(**chosen), told or context(examples=examples(label=kind == "bert"))).model


def layer(rows=24, columns=256, tokens=2048, seed=0):
    """A weight, and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + 2 * mix)
    return torch.randn(rows, columns, generator=generator), x.t() @ x / tokens


@given(
    rows=st.integers(1, 5), groups=st.integers(1, 6), width=st.integers(2, 8), data=st.data(), seed=st.integers(0, 1000)
)  # fmt: skip
@settings(max_examples=60)
def test_of_every_m_weights_n_are_kept_and_those_are_the_largest(rows, groups, width, data, seed):
    kept = data.draw(st.integers(1, width - 1))
    scores = torch.rand(rows, groups * width, generator=torch.Generator().manual_seed(seed))
    gone = lowest(scores, 0.0, (kept, width), "layer").numpy().reshape(-1, width)
    parts = scores.numpy().reshape(-1, width)
    assert (gone.sum(1) == width - kept).all()
    assert all(part[away].max() <= part[~away].min() for part, away in zip(parts, gone, strict=True))


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_magnitude_takes_the_smallest_of_each_layer(toys, kind, sparsity):
    before = weights(load_model(Source(str(toys[kind]), TASKS[kind], "float32"), "cpu"))
    told = context()
    after = weights(pruned(toys[kind], kind, "magnitude", told, sparsity=sparsity))
    noted = {row["name"]: row["sparsity"] for row in told.layers}
    for name, weight in before.items():
        if noted[name] is None:  # a head
            assert (after[name] == weight).all()
            continue
        count = round(sparsity * weight.size)
        limit = np.sort(np.abs(weight), axis=None)[count - 1]
        expected = np.where(np.abs(weight) <= limit, 0, weight)
        assert (expected == 0).sum() == count
        assert (after[name] == expected).all()
        assert noted[name] == pytest.approx(count / weight.size)


def test_magnitude_over_all_layers_takes_the_smallest_of_all(toys):
    before = weights(load_model(Source(str(toys["t5"]), "seq2seq", "float32"), "cpu"))
    told = context()
    after = weights(pruned(toys["t5"], "t5", "magnitude", told, sparsity=0.4, scope="global"))
    inside = [row["name"] for row in told.layers if row["sparsity"] is not None]
    sizes = np.sort(np.concatenate([np.abs(before[name]).ravel() for name in inside]))
    limit = sizes[round(0.4 * len(sizes)) - 1]
    for name in inside:
        assert (after[name] == np.where(np.abs(before[name]) <= limit, 0, before[name])).all()
    assert len({round(row["sparsity"], 3) for row in told.layers if row["sparsity"] is not None}) > 2


def test_wanda_ranks_a_row_by_weight_times_input_norm(toys):
    """The first block's queries see inputs that no pruning has touched yet."""
    told = context()
    plain = load_model(Source(str(toys["llama"]), "causal-lm", "float32"), "cpu")
    name, seen = "model.layers.0.self_attn.q_proj", []
    plain.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double().numpy()))
    tokenizer = bundle(toys["llama"], "llama").tokenizer
    for example in told.examples:  # one by one, so nothing is padded
        answer = [*tokenizer(example.references[0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = tokenizer(example.prompt).input_ids
        ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
        with torch.no_grad():
            plain(torch.tensor([[*ids, *answer]]))
    norm = np.sqrt((np.concatenate(seen) ** 2).sum(0))
    weight = weights(plain)[name]
    score = np.abs(weight) * norm
    expected = weight.copy()
    for row, order in zip(expected, np.argsort(score, axis=1), strict=True):
        row[order[: weight.shape[1] // 2]] = 0
    sparse = weights(pruned(toys["llama"], "llama", "wanda", told))[name]
    assert (sparse == expected).mean() > 0.999  # ties of rounding


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(pattern):
    """Reference in float64: no blocks, the inverse Hessian of the columns still to come made anew at each column."""
    weight, moments = layer(rows=6, columns=64)
    chosen = sparsegpt.Settings(pattern=pattern, columns=32) if pattern else sparsegpt.Settings(columns=32)
    solved = sparsegpt.solve_layer(weight, moments, chosen).double().numpy()
    left, hessian = weight.double().numpy().copy(), moments.double().numpy()
    hessian = hessian + 0.01 * np.diag(hessian).mean() * np.eye(64)
    width = 4 if pattern else 32
    for j in range(64):
        inverses = [np.linalg.inv(hessian[k:, k:]) for k in range(j, min(j + width, 64))]
        if j % width == 0:
            cost = np.array([inverse[0, 0] for inverse in inverses])
            scores = left[:, j : j + width] ** 2 / cost
            gone = np.zeros_like(scores, dtype=bool)
            if pattern:
                np.put_along_axis(gone, np.argsort(scores, axis=1)[:, :2], True, axis=1)
            else:
                gone.ravel()[np.argsort(scores, axis=None)[: scores.size // 2]] = True
        inverse = inverses[0]
        for row in range(6):
            if gone[row, j % width]:
                left[row, j:] -= left[row, j] / inverse[0, 0] * inverse[0]
                left[row, j] = 0
    assert np.abs(solved - left).max() < 2e-3
    assert ((solved == 0) == (left == 0)).all()


def test_sparsegpt_holds_a_pattern_that_does_not_divide_its_blocks():
    weight, moments = layer(rows=6, columns=300)
    solved = sparsegpt.solve_layer(weight, moments, sparsegpt.Settings(pattern="3:6"))
    assert ((solved.reshape(-1, 6) == 0).sum(1) == 3).all()


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])
def test_sparsegpt_loses_less_than_taking_the_smallest(pattern):
    weight, moments = layer()
    chosen = sparsegpt.Settings(pattern=pattern) if pattern else sparsegpt.Settings()

    def lost(values):
        change = (values - weight).double()
        return float(((change @ moments.double()) * change).sum())

    plain = weight.masked_fill(lowest(weight.abs(), 0.5, chosen.n_of_m, ""), 0)
    solved = sparsegpt.solve_layer(weight, moments, chosen)
    assert (solved == 0).double().mean() == pytest.approx(0.5)
    assert lost(solved) < 0.75 * lost(plain)


@pytest.mark.parametrize("method", METHODS)
def test_the_artifacts_are_ordinary_models_with_so_many_zeros(toys, tmp_path, method):
    artifacts = {kind: run("prune", method, toys[kind], kind, tmp_path / kind, pattern="2:4") for kind in TASKS}
    read = (
        "import json, sys, transformers\n"
        "for folder, cls in json.loads(sys.argv[1]).items():\n"
        "    model = getattr(transformers, cls).from_pretrained(folder)\n"
        "    parts = [m.weight for n, m in model.named_modules() if type(m).__name__ in ('Linear', 'Conv1D')]\n"
        "    print(json.dumps([round(float((w == 0).double().mean()), 3) for w in parts]))\n"
    )
    folders = json.dumps({str(folder): AUTO[TASKS[kind]] for kind, folder in artifacts.items()})
    for line in plain(read, folders).splitlines():
        shares = json.loads(line)
        assert shares.count(0.5) >= 8 and all(share == 0.5 for share in shares if share > 0.1)  # a row for padding is zero
    for kind, folder in artifacts.items():
        for name, weight in weights(load_model(Source(str(folder), TASKS[kind]), "cpu")).items():
            if (weight == 0).mean() > 0.4:
                assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all(), (kind, name)


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_that_does_not_divide_a_row_names_the_layer(toys, method):
    with pytest.raises(InputError, match=r"pattern: 3:5 does not divide the 64 columns of .*; name it under ignore"):
        pruned(toys["llama"], "llama", method, pattern="3:5")


@pytest.mark.parametrize("method", METHODS)
def test_a_sparsity_that_would_empty_a_layer_is_refused(toys, method):
    with pytest.raises(InputError, match=r"sparsity: 0.99999 would empty model\.layers\.0\."):
        pruned(toys["llama"], "llama", method, sparsity=0.99999)


def test_global_magnitude_that_would_empty_a_layer_names_it(toys):
    toy = bundle(toys["llama"], "llama")
    with torch.no_grad():
        toy.model.model.layers[1].mlp.up_proj.weight.mul_(1e-6)
    magnitude = find("prune", "magnitude")
    with pytest.raises(InputError, match=r"sparsity: 0.5 over all layers would empty model\.layers\.1\.mlp\.up_proj; use scope: layer"):
        magnitude.apply(toy, magnitude.Settings(scope="global"), context())


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"sparsity": 0}, "greater than 0"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"pattern": "4:2"}, "'4:2' is not a pattern"),
        ({"pattern": "two of four"}, "is not a pattern"),
        ({"pattern": "2:4", "sparsity": 0.7}, "pattern 2:4 is a sparsity of 0.5"),
        ({"pattern": "2:4", "scope": "global"}, "scope: global has no place"),
    ],
)
def test_settings_that_make_no_sense_are_refused(chosen, message):
    with pytest.raises(ValidationError, match=message):
        find("prune", "magnitude").Settings(**chosen)


def test_sparsegpt_takes_what_only_zeros_are_multiplied_by_first():
    weight, moments = layer(rows=8, columns=128)
    dead = torch.arange(0, 128, 4)
    moments[dead] = moments[:, dead] = 0
    solved = sparsegpt.solve_layer(weight, moments * 1e-4, sparsegpt.Settings(sparsity=0.5, columns=128))
    assert (solved[:, dead] == 0).all()
    assert (solved == 0).double().mean() == pytest.approx(0.5)


@pytest.mark.parametrize("second", [{"pattern": "2:4"}, {"pattern": "1:4"}, {"sparsity": 0.6}, {"sparsity": 0.3}])
@pytest.mark.parametrize("method", METHODS)
def test_what_an_earlier_stage_made_zero_stays_zero(toys, tmp_path, method, second):
    once = run("prune", "magnitude", toys["llama"], "llama", tmp_path / "once")
    before = weights(load_model(Source(str(once), "causal-lm"), "cpu"))
    after = weights(pruned(once, "llama", method, **second))
    assert (before["model.layers.0.mlp.up_proj"] == 0).mean() == 0.5
    for name, weight in before.items():
        assert not after[name][weight == 0].any(), name
