"""Experts of mixtures are matrices like others: the same before and after, shown their own tokens, packed one by one, read again."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from compress import experts
from compress.errors import BrokenPromise, InputError, ModelError
from compress.model.loading import Bundle, load_model
from compress.model.source import Source
from compress.prune import magnitude, wanda
from compress.quantize import autoround, awq, gptq, rtn
from compress.quantize._calibrated import quantise
from compress.quantize._pack import Packed
from compress.results.stages import NOTES, Account
from tests.blocks import context, examples, run, saved
from tests.calibration.test_walk import assert_same_moments
from tests.mixtures import MIXTURES, TOGETHER, mixture, routed

IDS = torch.arange(2, 40)[None]
APART = [name for name in MIXTURES if name not in TOGETHER]
FEW = ["Qwen3MoeForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: saved(mixture(name), tmp_path_factory.mktemp("mixtures") / name) for name in MIXTURES}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def bundle(folder):
    return Bundle(Source(str(folder), "causal-lm", "float32"), "cpu")


def stage(family, method, folder, target, **settings):
    seen = [{"id": e.id, "prompt": e.prompt, "references": e.references} for e in examples(40)]
    run(family, method, folder, "llama", target, seen=seen, **settings)
    return load_model(Source(str(target), "causal-lm"), "cpu"), json.loads((target / NOTES).read_text())


@pytest.mark.parametrize("name", MIXTURES)
def test_parted_experts_compute_the_same_and_come_back(name):
    model = mixture(name)
    before, weights = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    experts.part(model)
    assert not experts.held_together(model)
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) >= linear + 8
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    experts.fuse(model)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def inputs_by_choice(bundled, told):
    """What the layers that lead upward in each expert are given, (tokens, width), by the router's choices in a plain forward pass."""
    seen = {}

    def note(path, module, states, chosen, weights):
        for number in range(len(module.down_proj)):
            seen.setdefault(f"{path}.{number}.", []).append(states[(chosen == number).any(dim=-1)])

    routed(bundled, told, note)
    return {path: torch.cat(rows).numpy() for path, rows in seen.items()}


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "JambaForCausalLM"])
def test_each_expert_is_shown_the_tokens_that_were_routed_to_it(name, folders):
    bundled, told = bundle(folders[name]), context(examples=examples(60))
    expected, seen = inputs_by_choice(bundled, told), set()

    def look(block):
        assert not block.given.real[0].all(), "there is padding"
        for layer in block.layers:
            rows = next((rows for path, rows in expected.items() if layer.startswith(path)), ())
            if len(rows) >= block.layers[layer].in_features and not layer.endswith(("down_proj", "w2")):
                assert_same_moments(block, layer, rows)
                seen.add(layer)
        block.layers.clear()

    with pytest.raises(BrokenPromise, match="every layer was left out"):
        quantise(bundled, rtn.Settings(symmetric=True), told, Packed, look)
    assert len(seen) > len(expected)  # two layers in each, of most


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("name", APART)
def test_packed_experts_are_read_again_by_plain_transformers(name, method, folders, tmp_path):
    """As unpacked here by hand from the file, bit by bit."""
    again, notes = stage("quantize", method, folders[name], tmp_path / "made")
    shares = notes["account"]
    assert shares["left_out"] <= 0.05 * shares["worked"]
    assert sum(shares.values()) == sum(p.numel() for p in mixture(name).parameters())
    dense = load_model(Source(str(folders[name]), "causal-lm", "float32"), "cpu")
    experts.part(dense)
    names = {layer["name"] for layer in notes["layers"] if layer["bits"] == 4}
    assert sum(".experts." in layer for layer in names) >= 12
    with safe_open(tmp_path / "made" / "model.safetensors", "np") as tensors:
        stored = {key.removesuffix(".weight_packed") for key in tensors.keys() if key.endswith(".weight_packed")}  # noqa: SIM118
        assert len(stored) == len(names), "one entry an expert"
        ends = {".".join(key.split(".")[2:]).replace("block_sparse_moe", "mlp"): key for key in stored}
        for layer in names:
            key = ends[".".join(layer.split(".")[2:]).replace("block_sparse_moe", "mlp")]
            words, scale = tensors.get_tensor(f"{key}.weight_packed"), tensors.get_tensor(f"{key}.weight_scale")
            integers = np.stack([(words.view(np.uint32) >> (4 * i)) & 15 for i in range(8)], axis=-1).reshape(len(words), -1).astype(int)
            values = (integers - 8) * np.repeat(scale, integers.shape[1] // scale.shape[1], axis=1)
            dense.get_submodule(layer).weight.data = torch.tensor(values, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(dense), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", TOGETHER)
def test_experts_that_are_read_only_together_are_refused_before_any_work(name, folders):
    with pytest.raises(ModelError, match="reads packed experts one by one, and this type's only together; name experts under ignore"):
        rtn.apply(bundle(folders[name]), rtn.Settings(), context())


@pytest.mark.parametrize(
    ("settings", "why"), [({"symmetric": False}, "no zero points of experts"), ({"format": "gptq"}, "hold no experts")]
)
def test_a_grid_or_format_that_holds_no_experts_is_refused_before_any_work(settings, why, folders):
    with pytest.raises(ModelError, match=why):
        gptq.apply(bundle(folders[FEW[0]]), gptq.Settings(**settings), context())


@pytest.mark.parametrize("name", [*FEW, "GptOssForCausalLM"])
def test_experts_named_under_ignore_stay_whole_beside_packed_layers(name, folders, tmp_path):
    again, notes = stage("quantize", "rtn", folders[name], tmp_path / "made", ignore=["lm_head", "*.experts.*"])
    assert notes["account"]["asked"] > 20_000
    whole = dict(mixture(name).named_parameters())
    inside = {key: value for key, value in again.named_parameters() if ".experts." in key}
    assert inside
    for key, value in inside.items():
        torch.testing.assert_close(value, whole[key], rtol=0, atol=0)


@pytest.mark.parametrize("method", [wanda, magnitude])
@pytest.mark.parametrize("name", [*FEW, "GptOssForCausalLM", "GraniteMoeForCausalLM"])
def test_pruning_reaches_every_expert(name, method, folders, tmp_path):
    again, notes = stage("prune", method.__name__.rpartition(".")[2], folders[name], tmp_path / "made")
    assert notes["account"]["left_out"] == 0
    inside = [value for key, value in again.named_parameters() if ".experts." in key and value.ndim == 3]
    assert inside
    for values in inside:
        for expert in values:
            assert float((expert == 0).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_lora_trains_experts_too(folders, tmp_path):
    again, _ = stage("finetune", "lora", folders[FEW[0]], tmp_path / "made", rank=4, steps=4, batch_size=4)
    whole = dict(mixture(FEW[0]).named_parameters())
    changed = [key for key, value in again.named_parameters() if ".experts." in key and not torch.equal(value, whole[key])]
    assert len(changed) == 4


@pytest.fixture
def starved(tmp_path):
    """A mixture whose last two experts no token reaches."""
    model = mixture("MixtralForCausalLM")
    with torch.no_grad():
        for layer in model.model.layers:  # one of the first two is the largest for every token
            layer.mlp.gate.weight.copy_(torch.tensor([9.0, -9.0, 0.0, 0.0])[:, None] * torch.randn(1, 64))
    model.config.num_experts_per_tok = 1
    return saved(model, tmp_path / "m")


def test_an_expert_that_no_token_reaches_is_rounded_by_the_others_inputs_and_named(starved):
    bundled, told = bundle(starved), context(examples=examples(40))
    expected = inputs_by_choice(bundled, told)
    gptq.apply(bundled, gptq.Settings(), told)
    remarks = {layer["name"]: layer["remark"] for layer in told.layers if layer["bits"] == 4}
    rare = [path for path, rows in expected.items() if len(rows) < 64]
    assert sum(len(expected[path]) == 0 for path in rare) == 4
    for path in rare:
        assert all("calibration tokens reached it, fewer than its" in remarks[f"{path}{name}"] for name in ("w1", "w2", "w3"))


@pytest.mark.parametrize("method", [awq, autoround])
def test_an_expert_that_no_token_reaches_is_packed_with_the_others(method, starved):
    told = context(examples=examples(40))
    method.apply(bundle(starved), method.Settings(**({"steps": 3} if method is autoround else {})), told)
    assert sum(".experts." in layer["name"] and layer["bits"] == 4 for layer in told.layers) == 2 * 4 * 3


def test_a_layer_of_experts_packed_in_part_is_refused_before_any_work(folders):
    with pytest.raises(
        ModelError, match="would stay whole and others beside it be packed; experts of one layer are read all packed or none"
    ):
        rtn.apply(bundle(folders[FEW[0]]), rtn.Settings(ignore=["lm_head", "down_proj"]), context())


def test_inf_in_one_expert_alone_is_refused_with_its_name(tmp_path):
    model = mixture("Qwen3MoeForCausalLM")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = torch.inf
    folder = saved(model, tmp_path / "m")
    with pytest.raises(BrokenPromise, match=r"model\.layers\.1\.mlp\.experts\.2\.down_proj can't be packed and others of its layer were"):
        rtn.apply(bundle(folder), rtn.Settings(), context())


def test_int8_holds_experts_together_and_computes_with_them_one_by_one(folders, tmp_path):
    """Each row of each expert within half a step of what it was, and the layer as with those weights in float64 and inputs by token."""
    folder = folders["Qwen3MoeForCausalLM"]
    target = run("quantize", "int8_dynamic", folder, "llama", tmp_path / "to")
    whole, model = (transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (folder, target))
    before, after = (each.model.layers[1].mlp.experts for each in (whole, model))
    for name in ("gate_up_proj", "down_proj"):
        plain, packed = getattr(before, name).detach(), getattr(after, name)
        assert packed.qdata.dtype == torch.int8
        steps = plain.abs().amax(dim=-1, keepdim=True) / 127.5
        assert ((packed.dequantize() - plain).abs() <= 0.51 * steps).all()
    states, chosen, shares = torch.randn(5, 64), torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
    rounded = lambda x: (x / (x.abs().amax(dim=-1, keepdim=True) / 127.5)).round() * (x.abs().amax(dim=-1, keepdim=True) / 127.5)  # noqa: E731
    expected = 0
    for expert in (0, 1):
        gate, up = (rounded(states).double() @ after.gate_up_proj.dequantize()[expert].double().t()).chunk(2, dim=-1)
        inner = (torch.nn.functional.silu(gate) * up).float()
        expected = expected + 0.5 * rounded(inner).double() @ after.down_proj.dequantize()[expert].double().t()
    with torch.no_grad():
        outputs = after(states, chosen, shares).double()
    assert (outputs - expected).norm() <= 0.02 * expected.norm()
    noted = json.loads((target / NOTES).read_text())
    assert Account.model_validate(noted["account"]).left_out == 0
    assert any("one by one" in sentence for sentence in noted["said"])


def test_int8_takes_all_experts_of_a_layer_or_none(folders, tmp_path):
    """By the names of modules, by those of checkpoints, and experts alone."""
    folder = folders["MixtralForCausalLM"]
    with pytest.raises(InputError, match="rounds all experts of a layer or none"):
        run("quantize", "int8_dynamic", folder, "llama", tmp_path / "to", ignore=["lm_head", "experts.0.w1"])
    for number, (entry, whole) in enumerate({"experts": True, "*.experts.*": True, "self_attn": False}.items()):
        target = run("quantize", "int8_dynamic", folder, "llama", tmp_path / str(number), ignore=["lm_head", entry])
        model = transformers.AutoModelForCausalLM.from_pretrained(target)
        assert (type(model.model.layers[0].mlp.experts.down_proj) is torch.nn.Parameter) == whole
        assert (model.config._experts_implementation == "eager") == (not whole)
        assert any("one by one" in sentence for sentence in json.loads((target / NOTES).read_text())["said"]) == (not whole)


def test_int8_refuses_experts_the_other_way_round_before_any_work(folders, tmp_path):
    with pytest.raises(ModelError, match="gpt_oss holds its experts the other way round"):
        run("quantize", "int8_dynamic", folders["GptOssForCausalLM"], "llama", tmp_path / "to")
