"""A teacher in 8 or 4 bits: what lies in memory, how near it is to the whole one, and what is refused."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from compress import methods, pipeline, recipe
from compress.distill import _pair
from compress.errors import MissingPackage, ModelError, RecipeError
from compress.held import weight_bytes
from compress.model.loading import load_model
from compress.model.source import Source, fingerprint
from tests.blocks import bundle, run
from tests.conftest import TASKS, recipe_for
from tests.distill.pairs import distil, source, two

ODD = {"gate_proj", "up_proj", "down_proj"}  # 172 wide, which 4 bits don't take everywhere
FULL = {"t5": {"lm_head", "wo"}, "bart": {"lm_head"}, "llama": {"lm_head"}, "gpt2": {"lm_head"}, "bert": {"classifier"}}


def packed(folder, kind, bits):
    return load_model(Source(str(folder), TASKS[kind], "float32", bits=bits), "cpu")


def logits(model):
    ids = torch.arange(3, 23)[None]
    extra = {"decoder_input_ids": ids[:, :8]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits.float()


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.04), (4, 0.30)])
@pytest.mark.parametrize("kind", TASKS)
def test_linear_weights_lie_packed_and_logits_stay_near(toys, caplog, kind, bits, tolerance):
    whole, quantised = load_model(source(toys[kind], kind), "cpu"), packed(toys[kind], kind, bits)
    layers = {name: layer.weight for name, layer in whole.named_modules() if isinstance(layer, torch.nn.Linear | Conv1D)}
    saved = 0
    for name, weight in layers.items():
        held = quantised.get_submodule(name).weight
        if name.rsplit(".", 1)[-1] in FULL[kind] | (ODD if (kind, bits) == ("llama", 4) else set()):
            assert torch.equal(held, weight)
            continue
        assert not held.dtype.is_floating_point
        assert held.numel() * held.element_size() * 8 == weight.numel() * bits
        saved += weight.numel() * (4 - bits / 8)
    assert 0.85 * saved < weight_bytes(whole) - weight_bytes(quantised) < saved  # the rest are scales
    expected, near = logits(whole), logits(quantised)
    assert 0 < float((near - expected).norm() / expected.norm()) < tolerance
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


@pytest.mark.parametrize(("kind", "bits"), [*[(kind, 8) for kind in TASKS], ("t5", 4), ("llama", 4)])
def test_it_teaches_as_the_whole_one_does(tmp_path, monkeypatch, losses, kind, bits):
    teacher, student = two(kind, tmp_path)
    seen, plain = [], _pair.teacher_of
    monkeypatch.setattr(_pair, "teacher_of", lambda *arguments: seen.append(plain(*arguments)) or seen[-1])
    how = {"steps": 15, "batch_size": 6, "learning_rate": 1e-2, "label_weight": 0}
    trained, _ = distil("logits", bundle(student, kind), teacher, teacher={"id": str(teacher), "bits": bits}, **how)
    assert losses[-1] < 0.7 * losses[0]
    again = packed(teacher, kind, bits).state_dict()
    scales = ("absmax", "quant_map", "quant_state")  # a CPU with AVX-512 BF16 keeps those of 4 bits in bfloat16
    assert all(
        torch.equal(tensor, again[name])
        for name, tensor in seen[0].model.state_dict().items()
        if bits == 8 or not any(s in name for s in scales)
    )
    assert all(parameter.dtype == torch.float32 for parameter in trained.model.parameters()), "the student is an ordinary model"
    distil("logits", bundle(student, kind), teacher, **{**how, "steps": 1})
    assert losses[0] == pytest.approx(losses[-1], rel=0.3 if bits == 4 else 0.05) and losses[0] != losses[-1]


@pytest.mark.parametrize("method", ["hidden", "sequence", "on_policy", "universal"])
def test_every_method_takes_one(tmp_path, method):
    teacher, student = two("llama", tmp_path)
    how = {"max_new_tokens": 5} if method in ("sequence", "on_policy") else {}
    distil(method, bundle(student, "llama"), teacher, teacher={"id": str(teacher), "bits": 8}, steps=1, batch_size=3, **how)


def test_bits_are_a_part_of_what_a_model_is(toys):
    for id in (str(toys["llama"]), "some/model"):
        seen = [fingerprint(Source(id, "causal-lm", bits=bits)) for bits in (None, 4, 8)]
        assert all(later != earlier for n, later in enumerate(seen) for earlier in seen[:n])


def test_packed_weights_are_not_packed_again(toys, tmp_path):
    folder = run("quantize", "bnb_nf4", toys["llama"], "llama", tmp_path / "made")
    with pytest.raises(ModelError, match="made: bits: 8 is for a model with full weights, and these are packed already; leave bits out"):
        distil("logits", bundle(toys["llama"], "llama"), toys["llama"], teacher={"id": str(folder), "bits": 8})


def test_without_bitsandbytes_it_is_refused_with_a_line_that_installs_it(toys, rows, write_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "lacking", lambda packages: [name for name in packages if name == "bitsandbytes"])
    stage = {"distill": "logits", "teacher": {"id": str(toys["llama"]), "bits": 8}}
    path = write_recipe(recipe_for("llama", toys["llama"], rows, stages=[stage]))
    with pytest.raises(MissingPackage, match=r"distill: logits needs bitsandbytes, not installed here\.") as error:
        pipeline.run(path, tmp_path / "reports", "cpu")
    line = re.search(r"pip install '([^']+)'", str(error.value)).group(1)
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert line in extras["bnb"]
    whole = {"teacher": {"id": str(toys["llama"])}}
    methods.require("distill", "logits", methods.find("distill", "logits").Settings(**whole))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student": {"id": "x", "bits": 8}}, "unknown key 'bits'"),
        ({"teacher": {"id": "x", "bits": 5}}, r"teacher\.bits: 5 is not one of 4, 8"),
    ],
)
def test_mistakes_are_named_where_they_stand(toys, rows, write_recipe, settings, message):
    path = write_recipe(recipe_for("llama", toys["llama"], rows, stages=[{"distill": "logits", **settings}]))
    with pytest.raises(RecipeError, match=message):
        recipe.load(path)
