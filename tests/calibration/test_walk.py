"""The calibration pass: what methods are shown, what they leave out, and what is noted about each layer."""

import json
import shutil

import numpy as np
import pytest
import torch

from compress import methods
from compress.calibration.inputs import in_order, reach, second_moments
from compress.calibration.stream import encoded, padded
from compress.errors import BrokenPromise, DataError, DeviceError, ModelError
from compress.methods import Example, LayerSettings
from compress.model.loading import load_model
from compress.model.source import Source
from compress.quantize import rtn
from compress.quantize._calibrated import quantise
from compress.quantize._grid import GridSettings, fit
from compress.quantize._pack import Packed
from compress.quantize._solution import Quantised
from tests.blocks import bundle, context, examples, lively, made, saved, visit
from tests.conftest import TASKS, WORDS


@pytest.fixture(scope="module")
def lively_toys(tmp_path_factory):
    return {kind: saved(lively(kind), tmp_path_factory.mktemp("lively") / kind) for kind in TASKS}


def apply(original, method, told, **settings):
    module = methods.find("quantize", method)
    return module.apply(original, module.Settings(**settings), told)


def one_by_one(original, told, dtype=torch.float64):
    """What each linear layer is given, (tokens, width), by running the whole model on one example at a time."""
    model = load_model(original.source, "cpu").to(dtype)
    seen: dict = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, args, out, name=name: seen.setdefault(name, []).append(args[0].detach().reshape(-1, args[0].shape[-1]))
            )
    with torch.no_grad():
        for _, ids, answer in encoded(model, original.tokenizer, told):
            model(**padded(model, [(ids, answer)]))
    return {name: torch.cat(rows).numpy() for name, rows in seen.items()}


def assert_same_moments(block, name, rows):
    """A layer's second moments in the pass are those of its inputs (tokens, width), one example at a time."""
    moments, expected = second_moments(block, [name])[name].double().numpy(), rows.T @ rows / len(rows)
    if any(
        part in name
        for part in ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k", "encoder_attn.v", "cross_attn.k", "cross_attn.v")
    ):
        moments *= np.trace(expected) / np.trace(moments)  # padding is counted there, as zeros
    assert np.abs(moments - expected).max() <= 1e-4 * np.abs(expected).max(), name


@pytest.mark.parametrize("kind", ["llama", "t5", "bart", "bert"])
def test_padded_batches_have_the_statistics_of_one_example_at_a_time(lively_toys, kind):
    original, told = bundle(lively_toys[kind], kind), context(examples=examples(label=kind == "bert"))
    expected = one_by_one(original, told)
    done = []

    def look(block):
        assert not block.given.real[0].all(), "there is padding"
        assert block.given.hidden[0].shape[0] == len(told.examples)
        most = reach(block)
        for name in block.layers:
            assert_same_moments(block, name, expected[name])
            assert np.allclose(most[name].double().numpy(), np.abs(expected[name]).max(axis=0), rtol=1e-3, atol=1e-6), name
            done.append(name)

    visit(original, look, seen=told)
    assert len(done) == {"llama": 14, "t5": 36, "bart": 32, "bert": 12}[kind]


def test_cross_attention_is_shown_all_encoder_states_where_both_sides_are_as_long(lively_toys):
    two_examples = [Example("0", "the cat sat on a mat", ["dog"]), Example("1", "red", ["big dog ran in a hat"])]
    original, told = bundle(lively_toys["t5"], "t5"), context(examples=two_examples)
    expected = one_by_one(original, told)

    def look(block):
        for name in block.layers:
            if "EncDecAttention.k" in name:
                rows, moments = expected[name], second_moments(block, [name])[name].double().numpy()
                reference = rows.T @ rows / len(rows)
                assert np.allclose(moments / np.trace(moments), reference / np.trace(reference), atol=1e-5)

    visit(original, look, seen=told)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_layers_come_in_the_order_they_run_with_those_that_share_an_input(lively_toys, kind):
    orders = {}
    visit(bundle(lively_toys[kind], kind), lambda block: orders.update({block.name: in_order(block)}))
    if kind == "llama":
        parts = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    else:
        parts = [["q", "k", "v"], ["o"], ["q"], ["k", "v"], ["o"], ["wi_0", "wi_1"], ["wo"]]
    order = orders["model.layers.1" if kind == "llama" else "decoder.block.1"]
    assert [[name.rsplit(".", 1)[1] for name in group] for group in order] == parts


@pytest.mark.parametrize("kind", ["llama", "t5", "bart", "bert"])
def test_the_error_noted_is_the_share_of_the_output_that_changed(lively_toys, tmp_path, kind):
    """By the definition, from the finished artifact, on whole examples in float64."""
    original, told = bundle(lively_toys[kind], kind), context(examples=examples(label=kind == "bert"))
    apply(original, "rtn", told, bits=3, group_size=-1).save(tmp_path / "made")
    inputs = one_by_one(bundle(tmp_path / "made", kind, "auto"), told)
    before, after = load_model(original.source, "cpu"), load_model(Source(str(tmp_path / "made"), TASKS[kind]), "cpu")
    noted = {layer["name"]: layer["error"] for layer in told.layers if layer["bits"]}
    assert len(noted) == {"llama": 14, "t5": 36, "bart": 32, "bert": 12}[kind]
    for name, error in noted.items():
        whole, changed = (model.get_submodule(name).weight.detach().double().numpy() for model in (before, after))
        expected = ((inputs[name] @ (changed - whole).T) ** 2).sum() / ((inputs[name] @ whole.T) ** 2).sum()
        assert error == pytest.approx(expected, rel=2e-3), name


@pytest.mark.parametrize("method", ["gptq", "awq", "autoround", "smoothquant", "int8_static"])
@pytest.mark.parametrize(("value", "why"), [(0.0, "its inputs are all zero"), (float("inf"), "its inputs hold inf or NaN")])
def test_layers_with_unusable_inputs_are_left_as_they_are_with_the_reason(tmp_path, method, value, why):
    sick = lively("llama")
    with torch.no_grad():
        norm = sick.model.layers[1].post_attention_layernorm.weight
        if value:
            norm[3] = value
        else:
            norm.zero_()
    source = saved(sick, tmp_path / "sick")
    told = context(examples=examples(3))
    settings = {"autoround": {"steps": 2, "group_size": -1}, "smoothquant": {}, "int8_static": {}}.get(method, {"group_size": -1})
    apply(bundle(source, "llama"), method, told, **settings).save(tmp_path / "made")
    noted = {layer["name"]: layer for layer in told.layers}
    dead = {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    for name in dead:
        assert noted[name] == {
            "name": name,
            "bits": None,
            "error": None,
            "sparsity": None,
            "remark": f"left out: {why} on the calibration data",
        }
    assert {name for name, layer in noted.items() if layer["bits"] is None} == dead | {"lm_head"}
    assert len(noted) == 15
    loaded = load_model(Source(str(tmp_path / "made"), "causal-lm"), "cpu")
    ids = torch.arange(3, 12)[None]
    assert torch.isfinite(loaded(input_ids=ids).logits).all() == (value == 0)
    for name in dead:
        assert torch.equal(loaded.get_submodule(name).weight, sick.get_submodule(name).weight), name


def test_a_model_all_of_whose_layers_are_left_out_is_refused(tmp_path):
    dead = lively("llama")
    with torch.no_grad():
        for block in dead.model.layers:
            block.input_layernorm.weight.zero_()
            block.post_attention_layernorm.weight.zero_()
    source, told = saved(dead, tmp_path / "dead"), context()
    with pytest.raises(BrokenPromise, match="LlamaForCausalLM: every layer was left out"):
        apply(bundle(source, "llama"), "gptq", told)
    assert sum("all zero" in (layer["remark"] or "") for layer in told.layers) == 14


def test_hidden_states_behind_finished_blocks_are_let_go(lively_toys):
    streams = []

    def look(block):
        assert all(not stream.hidden for stack, stream in streams if stack == block.name.rpartition(".")[0])
        assert len(block.given.hidden) == len(block.given.calls) == 1
        streams.append((block.name.rpartition(".")[0], block.given))

    visit(bundle(lively_toys["t5"], "t5"), look)
    assert [bool(stream.hidden) for _, stream in streams] == [False, True, False, True]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_targets_are_the_uncompressed_models_states_and_inputs_those_of_the_solved_blocks(lively_toys, kind):
    original, told = bundle(lively_toys[kind], kind), context(examples=examples(1))
    kept = []

    def solve(block):
        kept.append((block.name, block.given.hidden[0].clone(), block.targets[0].clone()))
        for name, weight in block.weights.items():
            grid = fit(weight, GridSettings(group_size=-1), 8)
            block.set(name, Quantised(grid, grid.integers(torch.zeros_like(weight))))  # a block that does nothing but add its biases

    quantise(original, LayerSettings(), told, Packed, solve, targets=True)
    model = load_model(original.source, "cpu")
    (example,) = encoded(model, original.tokenizer, told)
    states: dict = {}
    for name, _, _ in kept:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: states.update({name: (args[0], out[0] if isinstance(out, tuple) else out)})
        )
    with torch.no_grad():
        model(**padded(model, [example[1:]]))
    for name, inputs, target in kept:
        assert torch.allclose(target, states[name][1], rtol=1e-4, atol=1e-5), name
        first = states[name.rpartition(".")[0] + ".0"][0]
        assert torch.allclose(inputs, first, atol=1e-6), "without weights a pre-norm block hands on what it was given"


@pytest.mark.parametrize("found", [[], [Example("0", "", [])], [Example("0", "", []), Example("1", "  ", [])]])
@pytest.mark.parametrize("method", ["gptq", "qat"])
def test_nothing_to_calibrate_on_is_said(toys, found, method):
    with pytest.raises(DataError, match="no example has two tokens or more"):
        apply(bundle(toys["llama"], "llama"), method, context(examples=found), group_size=-1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart", "bert"])
def test_a_sample_longer_than_the_context_is_cut(toys, kind):
    long = [Example("0", " ".join(WORDS * 10), ["1" if kind == "bert" else " ".join(WORDS * 6)]), *examples(1, label=kind == "bert")]
    original, told = bundle(toys[kind], kind), context(examples=long, max_tokens=512)
    rows = encoded(original.model, original.tokenizer, told)
    assert [max(len(ids), len(answer)) <= 64 for _, ids, answer in rows] == [True, True]
    assert len(rows[0][1]) == 64
    apply(original, "rtn", told, group_size=-1)
    rows = encoded(original.model, original.tokenizer, context(examples=long, max_tokens=10))
    assert [len(ids) for _, ids, _ in rows] == [10, min(10, len(encoded(original.model, original.tokenizer, told)[1][1]))]


def test_a_cut_example_of_a_decoder_keeps_its_target(toys):
    original = bundle(toys["llama"], "llama")
    ((_, ids, answer),) = encoded(
        original.model, original.tokenizer, context(examples=[Example("0", " ".join(WORDS * 3), ["red mat"])], max_tokens=16)
    )
    assert original.tokenizer.decode(answer, skip_special_tokens=True) == "red mat"
    assert ids[-len(answer) :] == answer and len(ids) == 16
    assert original.tokenizer.eos_token_id not in ids[:-1]


@pytest.mark.parametrize(("size", "odd"), [(128, 14), (64, 2), (32, 2), (-1, 0)])
def test_a_group_size_that_does_not_divide_a_layer_is_remarked(toys, size, odd):
    told = context()
    apply(bundle(toys["llama"], "llama"), "rtn", told, group_size=size)
    remarks = [layer["remark"] for layer in told.layers if layer["bits"] and layer["remark"]]
    assert len(remarks) == odd
    assert all(f"group_size {size} does not divide its {n} columns" in r for r in remarks for n in [172 if "172" in r else 64])


def test_fixed_ranges_for_an_encoder_decoder_are_refused_before_weights_are_read(toys, tmp_path):
    for file in toys["t5"].iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    with pytest.raises(ModelError, match=r"int8_static: .*encoder-decoder \(t5\); use smoothquant"):
        apply(bundle(tmp_path, "t5"), "int8_static", context())


def test_fp8_without_a_gpu_is_refused(toys, tmp_path):
    with pytest.raises(DeviceError, match="quantize: fp8 runs on cuda, not on cpu"):
        made(Source(str(toys["llama"]), "causal-lm", "float32"), "quantize", "fp8", {}, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "qat"])
def test_a_t5_in_float16_is_refused_with_the_way_out(toys, method):
    """FLAN-T5's trap: `wo` is unpacked to float16, where it overflows."""
    with pytest.raises(ModelError, match=r"in float16: .*wo layers overflow there; set model\.dtype: bfloat16 or float32"):
        apply(bundle(toys["t5"], "t5", "float16"), method, context())


def test_what_stands_outside_the_blocks_is_left_out_and_noted(toys, tmp_path):
    told = context(examples=examples(label=True))
    apply(bundle(toys["bert"], "bert"), "rtn", told, group_size=-1, ignore=["query"]).save(tmp_path / "made")
    remarks = {layer["name"]: layer["remark"] for layer in told.layers if layer["bits"] is None}
    assert remarks == {
        "bert.encoder.layer.0.attention.self.query": "left out: named under ignore",
        "bert.encoder.layer.1.attention.self.query": "left out: named under ignore",
        "bert.pooler.dense": "left out: stands outside the blocks",
        "classifier": "left out: stands outside the blocks",
    }
    assert json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]["ignore"]


def test_progress_counts_the_blocks(toys):
    lines = []
    told = context()
    object.__setattr__(told, "progress", lambda *line: lines.append(line))
    rtn.apply(bundle(toys["t5"], "t5"), rtn.Settings(group_size=-1), told)
    counts = [done for what, done, total in lines if what == "calibrating, block by block"]
    assert counts == sorted(counts) and (counts[0], counts[-1]) == (0, 4)
    assert {total for _, _, total in lines} == {4}


@pytest.mark.parametrize("kind", ["llama", "t5", "bart", "bert"])
def test_what_is_kept_of_solved_parts_is_what_running_them_again_gives(lively_toys, kind):
    compared = 0

    def solve(block):
        nonlocal compared
        for group in in_order(block):
            for name in group:
                weight = block.weights[name].float()
                grid = fit(weight, GridSettings(bits=3, group_size=-1), 3)
                block.set(name, Quantised(grid, grid.integers(weight)))
            for batch in range(len(block.given.hidden)):  # the second time of what was kept the first
                kept = [block.output(batch) for _ in range(2)][1]
                assert torch.equal(kept, block.output(batch, anew=True))
                compared += any(batch in part.outputs for part in block._parts.values())

    quantise(
        bundle(lively_toys[kind], kind),
        rtn.Settings(bits=3, group_size=-1),
        context(examples=examples(label=kind == "bert")),
        Packed,
        solve,
    )
    assert compared
