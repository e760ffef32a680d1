"""What became of every weight: counted by hand, and nothing passed over in silence."""

import json

import pytest
import torch
import transformers

from compress.errors import BrokenPromise
from compress.prune import magnitude
from compress.quantize import bnb_int8
from compress.report import markdown
from compress.results.stages import NOTES, Account, StageRecord
from tests.blocks import run, saved
from tests.conftest import make_model
from tests.report.test_files import made


def account(folder):
    return Account.model_validate(json.loads((folder / NOTES).read_text())["account"])


def notes(folder):
    layers = json.loads((folder / NOTES).read_text())["layers"]
    return {layer["name"]: layer["remark"] for layer in layers if layer["bits"] is None}


def mixture(folder, experts=4):
    """A decoder whose experts lie in parameters of three dimensions."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        head_dim=64, num_experts=experts, num_experts_per_tok=2, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return saved(transformers.Qwen3MoeForCausalLM(config), folder)


@pytest.mark.parametrize(("family", "method"), [("quantize", "rtn"), ("prune", "magnitude")])
@pytest.mark.parametrize("kind", ["t5", "llama", "bert"])
def test_every_parameter_has_one_place(family, method, kind, tmp_path):
    model = make_model(kind)
    sizes = account(run(family, method, saved(model, tmp_path / "from"), kind, tmp_path / "to"))
    linear = {
        f"{name}.weight": module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.startswith(("lm_head", "classifier"))
    }
    parameters = dict(model.named_parameters())
    outside = linear.pop("bert.pooler.dense.weight", 0)
    if method == "magnitude":  # which doesn't go block by block
        linear["bert.pooler.dense.weight"], outside = outside, 0
    assert sizes.worked == sum(linear.values())
    assert sizes.left_out == outside
    assert sizes.vectors == sum(parameter.numel() for parameter in parameters.values() if parameter.ndim == 1)
    assert sum(sizes.model_dump().values()) == sum(parameter.numel() for parameter in parameters.values())


def test_experts_that_a_method_does_not_reach_are_named(tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = run("quantize", "bnb_int8", mixture(tmp_path / "from"), "llama", tmp_path / "to")
    assert notes(folder)["model.layers.1.mlp.experts.down_proj"] == (
        "left out: it is a parameter of Qwen3MoeExperts, and quantize: bnb_int8 works on linear layers"
    )
    experts, routers, attention = 2 * 4 * 3 * 32 * 64, 2 * 4 * 64, 2 * 4 * 64 * 256
    assert account(folder) == Account(
        worked=attention, heads=64 * 64, embeddings=64 * 64, vectors=5 * 64 + 4 * 64, routers=routers, left_out=experts
    )


def test_a_stage_that_would_hardly_touch_the_model_is_refused_before_it_begins(tmp_path, monkeypatch):
    folder = mixture(tmp_path / "from", experts=32)
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bnb_int8, "apply", None)
    with pytest.raises(BrokenPromise, match=r"would work on 25% of the [\d,]+ weights .* the others are parameters of Qwen3MoeExperts, "):
        run("quantize", "bnb_int8", folder, "llama", tmp_path / "to")


def test_a_stage_that_hardly_touched_the_model_fails(tmp_path, monkeypatch):
    def apply(bundle, settings, context):
        context.note("model.layers.0.mlp.up_proj", 4)
        context.leave_out("model.layers.1.mlp.up_proj", "its inputs hold inf")
        return bundle

    monkeypatch.setattr(magnitude, "apply", apply)
    with pytest.raises(
        BrokenPromise,
        match=r"worked on 12% of the 90,624 weights .* the others were left out: its inputs hold inf; prune: magnitude passed it over",
    ):
        run("prune", "magnitude", saved(make_model("llama"), tmp_path / "from"), "llama", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_what_the_recipe_ignores_was_asked_for(tmp_path):
    folder = run("prune", "magnitude", mixture(tmp_path / "from", experts=32), "llama", tmp_path / "to", ignore=["lm_head", "experts"])
    assert account(folder).share == 1
    assert account(folder).asked == 2 * 32 * 3 * 32 * 64 + 64 * 64


def test_little_worked_on_is_said_before_the_gates():
    record = StageRecord(
        stage={"quantize": "rtn"}, artifact="a", seconds=0, reused=False, account=Account(worked=80, left_out=20, vectors=25)
    )
    text = markdown.brief(made(stages=[record]))
    assert text.split("\n\n")[2] == "**quantize: rtn worked on 80.0% of the weights that are no embeddings, heads, norms or biases.**"
    assert record.account.sentence == "64.0% of 125 parameters were worked on; 20.0% are norms and biases, 16.0% are left out"


@pytest.mark.parametrize(
    ("family", "method", "settings"),
    [
        ("finetune", "lora", {"rank": 4, "steps": 1, "batch_size": 2, "targets": ["q_proj", "v_proj"]}),
        ("finetune", "full", {"steps": 1, "batch_size": 2}),
        ("prune", "depth", {"drop": 1}),
    ],
)
def test_what_trains_or_goes_is_told_by_the_weights_themselves(family, method, settings, tmp_path):
    if method == "lora":
        pytest.importorskip("peft")
    before = make_model("llama")
    folder = run(family, method, saved(before, tmp_path / "from"), "llama", tmp_path / "to", **settings)
    sizes, whole = account(folder), {name: parameter.numel() for name, parameter in before.named_parameters()}
    assert sum(sizes.model_dump().values()) == sum(whole.values())
    assert sizes.left_out == 0
    if method == "lora":
        assert sizes.worked == sum(number for name, number in whole.items() if "q_proj" in name or "v_proj" in name)
        assert sizes.asked == sum(number for name, number in whole.items() if "_proj" in name) - sizes.worked
    elif method == "full":
        assert sizes.worked == sum(whole.values())
    else:
        assert sizes.worked == sum(number for name, number in whole.items() if ".layers.0." in name and "norm" not in name)
