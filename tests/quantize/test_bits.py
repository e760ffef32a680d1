"""How many bits each layer gets, and artifacts whose layers differ in them."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import spearmanr

from compress import data
from compress.architectures.gpt2 import as_linear
from compress.calibration.block import Block
from compress.calibration.stream import batches
from compress.errors import BrokenPromise, InputError
from compress.methods import Context, quiet
from compress.model.loading import Bundle, load_model
from compress.model.source import BUILTIN, Source
from compress.quantize import rtn
from compress.quantize._bits import allocate, plan, sensitivity
from compress.quantize._grid import WIDTHS, GridSettings, Kind, fit
from compress.recipe import load
from tests.blocks import bundle, context, examples, lively, saved
from tests.conftest import TASKS


@st.composite
def puzzles(draw):
    count = draw(st.integers(1, 5))
    names = [f"layer{n}" for n in range(count)]
    rises = {}
    for name in names:
        base, fall = draw(st.floats(1e-6, 1e3)), draw(st.floats(1, 8))
        wobble = [draw(st.floats(0.5, 2)) for _ in WIDTHS]
        rises[name] = {bits: base * w / fall**bits for bits, w in zip(WIDTHS, wobble, strict=True)}
    return rises, {name: draw(st.integers(1, 10_000)) for name in names}, draw(st.floats(2, 8))


def best_by_force(rises, sizes, average):
    """The least sum of rises over all assignments whose mean is at most `average`."""
    names, least = list(rises), np.inf
    for assignment in itertools.product(WIDTHS, repeat=len(names)):
        mean = sum(bits * sizes[name] for name, bits in zip(names, assignment, strict=True)) / sum(sizes.values())
        if mean <= average * (1 + 1e-9):
            least = min(least, sum(rises[name][bits] for name, bits in zip(names, assignment, strict=True)))
    return least


@given(puzzles())
@settings(max_examples=60)
def test_bits_are_given_out_as_well_as_any_assignment_does(puzzle):
    rises, sizes, average = puzzle
    widths = allocate(rises, sizes, average)
    assert set(widths) == set(rises)
    assert sum(sizes[name] * bits for name, bits in widths.items()) / sum(sizes.values()) <= average * (1 + 1e-6)
    cost = sum(rises[name][bits] for name, bits in widths.items())
    best = best_by_force(rises, sizes, average)
    assert cost <= best * (1 + 1e-3) + 1e-6 * max(rise for of_layer in rises.values() for rise in of_layer.values())


def test_at_the_ends_every_layer_gets_the_same():
    rises = {name: {2: 1.0, 3: 0.3, 4: 0.1, 8: 0.001} for name in "abc"}
    sizes = {"a": 1, "b": 1000, "c": 77}
    assert set(allocate(rises, sizes, 2).values()) == {2}
    assert set(allocate(rises, sizes, 8).values()) == {8}


def test_average_bits_is_bounded_and_only_counts_with_auto():
    with pytest.raises(ValidationError, match="only counts with bits: auto"):
        GridSettings(bits=4, average_bits=4)
    with pytest.raises(ValidationError, match="only counts with bits: auto"):
        GridSettings(bits={"*": 4}, average_bits=4)
    for wrong in (1.99, 8.01, float("nan")):
        with pytest.raises(ValidationError):
            GridSettings(bits="auto", average_bits=wrong)
    for right in (2, 3.3, 8, None):
        assert GridSettings(bits="auto", average_bits=right).average_bits == right
    for wrong in (5, {"*": 5}, {}, "best"):
        with pytest.raises(ValidationError):
            GridSettings(bits=wrong)


def layers_of(toy):
    model = as_linear(toy.model)
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and any(part.isdigit() for part in n.split("."))}


def planned(toy, told, **settings):
    return plan(toy, as_linear(toy.model), GridSettings(**settings), told, layers_of(toy))


def test_the_first_pattern_that_matches_a_layer_counts(toys):
    toy, told = bundle(toys["llama"], "llama"), context()
    bits = {"down_proj": 8, "*.layers.0.*": 2, "re:.*proj": 3}
    kinds = planned(toy, told, bits=bits, group_size=-1)
    assert len(kinds) == 14
    for name, kind in kinds.items():
        expected = 8 if name.endswith("down_proj") else 2 if ".layers.0." in name else 3
        assert kind == Kind(expected, False, 0), name
    assert told.layers == []


def test_layers_that_no_pattern_names_are_left_out_and_noted(toys):
    toy, told = bundle(toys["llama"], "llama"), context()
    kinds = planned(toy, told, bits={"*.mlp.*": 3, "q_proj": 8}, group_size=32)
    assert {name.rsplit(".", 1)[1] for name in kinds} == {"gate_proj", "up_proj", "down_proj", "q_proj"}
    assert {row["name"].rsplit(".", 1)[1] for row in told.layers} == {"k_proj", "v_proj", "o_proj"}
    assert len(told.layers) == 6
    assert {(row["bits"], row["remark"]) for row in told.layers} == {(None, "left out: no pattern of bits names it")}


def test_what_is_odd_about_a_layers_storage_is_told(awkward):
    for kind, alike in (("llama", False), ("t5", True), ("gpt2", True), ("bert", False)):
        told = context()
        kinds = planned(bundle(awkward[kind], kind), told, bits={"*.0.*": 3, "*": 8}, group_size=32)
        for name, grid in kinds.items():
            remark = told.remarks.get(name, "")
            assert ("stored in 8 bits" in remark) == (alike and grid.bits == 3), name
            assert ("group_size 32 does not divide its 172 columns; it has a scale a row" in remark) == (grid.size == 0), name
        assert any(grid.size == 0 for grid in kinds.values())


@pytest.mark.parametrize(("wrong", "near"), [("donw_proj", "down_proj"), ("model.layers.O.mlp.up_proj", r"model\.layers\.0\.mlp\.up_proj")])
def test_a_pattern_that_names_nothing_is_refused_with_the_nearest_names(toys, wrong, near):
    toy = bundle(toys["llama"], "llama")
    with pytest.raises(InputError, match=f"bits: '{wrong}' matches no linear layer.*{near}"):
        planned(toy, context(), bits={"*": 4, wrong: 8})


def test_a_broken_regular_expression_is_said(toys):
    toy = bundle(toys["llama"], "llama")
    with pytest.raises(InputError, match="not a regular expression"):
        planned(toy, context(), bits={"re:(": 4})


@pytest.mark.parametrize("average", [2.0, 2.6, None, 5.5])
@pytest.mark.parametrize("kind", ["llama", "t5", "bert", "gpt2"])
def test_auto_spends_the_bits_it_may_and_no_more(toys, kind, average):
    toy = bundle(toys[kind], kind)
    layers = layers_of(toy)
    kinds = planned(toy, context(), bits="auto", average_bits=average, group_size=-1)
    assert set(kinds) == set(layers)
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    mean = sum(kinds[name].bits * size for name, size in sizes.items()) / sum(sizes.values())
    assert (average or 4) - 0.4 < mean <= (average or 4) + 1e-6
    assert average in (2, None) or len({kind.bits for kind in kinds.values()}) > 1


def wide(config):
    """A feed-forward width that no group size divides."""
    for key in ("d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size", "n_inner"):
        if hasattr(config, key):
            setattr(config, key, 172)


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """Random models with a feed-forward width of 172 whose biases and norms count."""
    return {kind: saved(lively(kind, wide), tmp_path_factory.mktemp("awkward") / kind) for kind in TASKS}


def made_with(source, kind, folder, monkeypatch, **settings):
    """An artifact of rtn, and what its blocks were given, by layer."""
    solutions = {}
    real = Block.set

    def set_and_keep(block, name, solution):
        solutions[name] = solution
        real(block, name, solution)

    monkeypatch.setattr(Block, "set", set_and_keep)
    told = context()
    rtn.apply(bundle(source, kind), rtn.Settings(**settings), told).save(folder)
    return solutions, told


def weight_of(layer, columns):
    """A layer's weight as it computes with it, whatever it stores."""
    with torch.no_grad():
        out = layer(torch.eye(columns))
        return (out - layer(torch.zeros(1, columns))).t() if layer.bias is None else (out - layer.bias).t()


def check_artifact(source, kind, folder, solutions):
    """The artifact computes with exactly these solutions, as a whole and twice."""
    loaded = load_model(Source(str(folder), TASKS[kind]), "cpu")
    expected = as_linear(load_model(Source(str(source), TASKS[kind], "float32"), "cpu"))
    for name, solution in solutions.items():
        expected.get_submodule(name).weight.data = solution.grid.values(solution.integers)
    ids = torch.arange(3, 17)[None]
    extra = {"decoder_input_ids": ids[:, :5]} if expected.config.is_encoder_decoder else {}
    if expected.can_generate():
        texts = [
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
            for model in (expected, loaded, loaded)
        ]
        assert texts[0] == texts[1] == texts[2]
    with torch.no_grad():
        expected_logits = expected(input_ids=ids, **extra).logits
        for _ in range(2):
            assert torch.allclose(loaded(input_ids=ids, **extra).logits, expected_logits, rtol=1e-4, atol=1e-5)
    for name, solution in solutions.items():
        values = solution.grid.values(solution.integers)
        weight = weight_of(loaded.get_submodule(name), values.shape[1])
        assert torch.allclose(weight, values, rtol=1e-6, atol=1e-6 * float(values.abs().max())), name


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", TASKS)
def test_artifacts_of_mixed_bits_hold_exactly_the_grids_weights(awkward, tmp_path, monkeypatch, kind, symmetric, group_size):
    names = list(layers_of(bundle(awkward[kind], kind)))
    widths = WIDTHS if group_size == 32 else (2, 3, 4)
    bits = {name: widths[number % len(widths)] for number, name in enumerate(names)}
    solutions, told = made_with(awkward[kind], kind, tmp_path / "made", monkeypatch, bits=bits, symmetric=symmetric, group_size=group_size)
    assert {name: solution.grid.bits for name, solution in solutions.items()} == bits
    assert {row["name"]: row["bits"] for row in told.layers if row["bits"]} == bits
    groups = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]["config_groups"].values()
    stored = {group["weights"]["num_bits"] for group in groups}
    assert stored == ({max(widths)} if kind in ("t5", "bart", "gpt2") else set(widths))
    check_artifact(awkward[kind], kind, tmp_path / "made", solutions)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_an_artifact_of_auto_bits_holds_what_it_says(awkward, tmp_path, monkeypatch, kind):
    solutions, told = made_with(awkward[kind], kind, tmp_path / "made", monkeypatch, bits="auto", average_bits=3.5, group_size=32)
    sizes = {name: solution.integers.numel() for name, solution in solutions.items()}
    assert set(sizes) == set(layers_of(bundle(awkward[kind], kind)))
    bits = {row["name"]: row["bits"] for row in told.layers if row["bits"]}
    assert bits == {name: solution.grid.bits for name, solution in solutions.items()}
    mean = sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert 3.3 < mean <= 3.5 + 1e-6
    assert len(set(bits.values())) > 1
    check_artifact(awkward[kind], kind, tmp_path / "made", solutions)


def test_the_predicted_rise_is_the_formula_written_out(awkward):
    """One example, the same draws, a gradient at a time in float64."""
    toy, told = bundle(awkward["llama"], "llama"), context(examples=examples(1))
    name = "model.layers.1.mlp.down_proj"
    rises = sensitivity(toy, GridSettings(bits="auto", group_size=-1), told, [name])[name]

    model = load_model(toy.source, "cpu").double()
    (batch,) = batches(model, toy.tokenizer, told)
    caught = {}
    layer = model.get_submodule(name)
    layer.register_forward_hook(lambda module, args, out: caught.update(x=args[0], out=out))
    logits = model(**batch).logits[0]
    drawn = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, drawn, reduction="sum"), caught["out"])
    g, x = gradient[0].numpy(), caught["x"][0].detach().numpy()
    weight = layer.weight.detach()
    for bits in WIDTHS:
        change = (fit(weight.float(), GridSettings(group_size=-1), bits).rounded(weight) - weight).numpy()
        expected = sum(change[i, j] ** 2 * (g[:, i] ** 2).mean() * (x[:, j] ** 2).mean() for i in range(64) for j in range(172)) / 2
        assert rises[bits] == pytest.approx(expected, rel=1e-3)


def test_the_predicted_rise_ranks_layers_as_the_measured_divergence_does():
    recipe = load("quickstart")
    told = Context("cpu", quiet, data.examples(recipe.data, recipe.folder, "train", 4, 0), 96)
    toy = Bundle(Source(str(BUILTIN), "seq2seq", "float32"), "cpu")
    model, grid = toy.model, GridSettings(bits="auto", group_size=-1)
    names = [
        name for name in layers_of(toy) if ".layer.0.SelfAttention." in name or "EncDec" in name or name.endswith("0.DenseReluDense.wo")
    ]
    predicted = sensitivity(toy, grid, told, names)
    inputs = batches(model, toy.tokenizer, told)

    def log_probabilities():
        with torch.no_grad():
            return torch.cat([model(**batch).logits[batch["decoder_attention_mask"].bool()] for batch in inputs]).double().log_softmax(-1)

    before, measured = log_probabilities(), {}
    for name in names:
        layer = model.get_submodule(name)
        kept = layer.weight.data
        layer.weight.data = fit(kept, grid, 3).rounded(kept)
        measured[name] = float((before.exp() * (before - log_probabilities())).sum(dim=-1).mean())
        layer.weight.data = kept
    assert all(rises[2] > rises[3] > rises[4] > rises[8] > 0 for rises in predicted.values())
    assert spearmanr([predicted[name][3] for name in names], [measured[name] for name in names]).statistic > 0.5


def test_auto_bits_of_a_model_that_overflows_are_refused_with_the_reason(tmp_path):
    sick = lively("llama")
    with torch.no_grad():
        sick.model.norm.weight[0] = float("inf")
    toy = bundle(saved(sick, tmp_path / "sick"), "llama")
    with pytest.raises(BrokenPromise, match="bits: auto: LlamaForCausalLM gives NaN or infinite logits"):
        planned(toy, context(), bits="auto", group_size=-1)
