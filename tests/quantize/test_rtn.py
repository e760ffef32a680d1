"""Round to nearest: needs no data, and says what it couldn't measure."""

import torch
import yaml
from safetensors.torch import load_file

from compress import artifacts, data
from compress.quantize import rtn
from compress.recipe import load
from tests.blocks import bundle, context, lively, saved
from tests.conftest import recipe_for


def test_the_weights_are_the_same_with_and_without_examples(toys, tmp_path):
    for kind in ("llama", "t5"):
        states = []
        for name, told in (("with", context()), ("without", context(examples=[]))):
            rtn.apply(bundle(toys[kind], kind), rtn.Settings(group_size=-1), told).save(tmp_path / kind / name)
            states.append(load_file(tmp_path / kind / name / "model.safetensors"))
            errors = [layer["error"] for layer in told.layers if layer["bits"]]
            assert all((error is None) == (name == "without") for error in errors)
            assert any("wasn't measured, for want of a train split" in sentence for sentence in told.said) == (name == "without")
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_16_bits_are_stored_as_such_wherever_they_are_computed_with(tmp_path):
    """Weights that no layer of the pass changes keep every bit of theirs."""
    folder = saved(lively("llama").bfloat16(), tmp_path / "model")
    rtn.apply(bundle(folder, "llama", "auto"), rtn.Settings(group_size=-1), context()).save(tmp_path / "made")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "made"))
    same = before.keys() & after.keys()
    assert {"model.norm.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"} <= same
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert {after[name].dtype for name in after if name.endswith("weight_scale")} == {torch.bfloat16}


def test_weights_that_are_no_numbers_are_left_out(tmp_path):
    sick = lively("llama")
    with torch.no_grad():
        sick.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    told = context(examples=[])
    rtn.apply(bundle(saved(sick, tmp_path / "sick"), "llama"), rtn.Settings(group_size=-1), told)
    left = {layer["name"]: layer["remark"] for layer in told.layers if layer["bits"] is None}
    assert left["model.layers.0.mlp.up_proj"] == "left out: its weights hold inf or NaN"


def test_a_recipe_needs_no_train_split_unless_its_settings_do(toys, rows, tmp_path):
    def shown(splits, **settings):
        block = {"source": str(rows), "prompt": "{said}", "target": "{short}", "splits": splits}
        stages = [{"quantize": "rtn", **settings}]
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_for("llama", toys["llama"], rows, data=block, stages=stages)))
        recipe = load(tmp_path / "r.yaml")
        (seen,) = artifacts.shown_to_stages(recipe, data.Dataset(recipe.data, recipe.folder))
        return seen.examples, seen.max_tokens

    assert shown({"evaluation": "test"}) == ([], 64)
    assert shown({"evaluation": "test", "train": "nowhere"}) == ([], 64)
    few, tokens = shown({"evaluation": "test", "train": "train"})
    assert (len(few), tokens) == (8, 64)
    every, tokens = shown({"evaluation": "test", "train": "train"}, bits="auto")
    assert (len(every), tokens) == (24, 512)


def test_a_group_size_that_divides_is_chosen_said_and_used(tmp_path):
    """576 columns, as SmolLM2 has them, in small: 96 and 192."""

    def narrow(config):
        config.hidden_size, config.intermediate_size, config.head_dim = 96, 192, 24

    folder, scales = saved(lively("llama", narrow), tmp_path / "model"), {}
    for group_size in (None, 32, 128):
        told = context(examples=[])
        rtn.apply(bundle(folder, "llama"), rtn.Settings(group_size=group_size), told).save(tmp_path / str(group_size))
        tensors = load_file(tmp_path / str(group_size) / "model.safetensors")
        scales[group_size] = [tensors[f"model.layers.0.mlp.{part}_proj.weight_scale"].shape[1] for part in ("up", "down")]
        assert any("group_size" in sentence for sentence in told.said) == (group_size != 32)
    assert scales == {None: [3, 6], 32: [3, 6], 128: [1, 1]}
