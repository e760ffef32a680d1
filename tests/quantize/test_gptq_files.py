"""GPTQ's own file format: read back by hand, bit by bit, and by gptqmodel where it is installed."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from compress import gptq
from compress.errors import ModelError
from compress.methods import find
from compress.model.loading import load_model
from compress.model.source import Source
from compress.quantize._gptq_files import GptqFiles
from compress.results.stages import NOTES
from tests.blocks import bundle, context, lively, saved
from tests.quantize.test_methods import make


def unpacked(words, bits):
    """(n, m) int32 words as (n, m * 32 / bits) integers: the definition, with Python's whole numbers."""
    integers = []
    for row in words.tolist():
        stream = sum((word % 2**32) << (32 * place) for place, word in enumerate(row))
        integers.append([(stream >> (bits * place)) % 2**bits for place in range(32 * len(row) // bits)])
    return np.array(integers)


def written(kind, method="gptq", **settings):
    """The tensors of a model packed in this format, its config, and what the pass said its layers became."""
    toy = bundle(kind, "bert")
    told, became = context(), {}
    from compress.quantize import _tune

    class Watched(GptqFiles):
        def packed(self, name, layer, solution):
            became[name] = solution
            return super().packed(name, layer, solution)

    chosen = find("quantize", method).Settings(format="gptq", **settings)
    original, _tune.files_of = _tune.files_of, lambda _: Watched
    try:
        model = find("quantize", method).apply(toy, chosen, told).model
    finally:
        _tune.files_of = original
    return model, became


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_words_hold_the_integers_and_zeros_that_the_method_found(toys, method, bits, symmetric):
    model, became = written(toys["bert"], method, bits=bits, group_size=32, symmetric=symmetric)
    config = model.config.quantization_config
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (bits, 32, symmetric, False)
    assert len(became) == 12
    less_one = config["checkpoint_format"] == "gptq"
    assert less_one == symmetric
    for name, solution in became.items():
        layer = model.get_submodule(name)
        integers = unpacked(layer.qweight.numpy().T, bits).T
        zeros = unpacked(layer.qzeros.numpy(), bits) + less_one
        group = layer.g_idx.numpy()
        assert (np.diff(group) >= 0).all() and np.bincount(group).tolist() == [32] * (len(integers) // 32)
        weight = layer.scales.double().numpy()[group] * (integers - zeros[group])
        expected = solution.grid.values(solution.integers).double().numpy().T
        assert weight.shape == expected.shape
        assert np.abs(weight - expected).max() <= 2**-10 * np.abs(expected).max()  # scales are in float16


def test_a_scale_a_row_is_one_group(toys):
    model, _ = written(toys["bert"], "rtn", bits=4, group_size=-1)
    layer = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert model.config.quantization_config["group_size"] == -1
    assert layer.scales.shape == (1, 64) and not layer.g_idx.any()


def test_layers_left_out_are_named_to_the_reader(toys):
    model, became = written(toys["bert"], "rtn", bits=4, group_size=32, ignore=["classifier", "query", "re:.*intermediate.*"])
    config = model.config.quantization_config
    assert config["block_name_to_quantize"] == "bert.encoder.layer"
    assert config["modules_in_block_to_quantize"] == [
        ["attention.output.dense", "attention.self.key", "attention.self.value", "output.dense"]
    ]
    assert len(became) == 8


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("t5", {}, "reads no encoder-decoder"),
        ("llama", {}, r"packs by 32, and .*gate_proj is 172 x 64; name it under ignore, or leave out format: gptq"),
        ("bert", {"bits": {"query": 4, "re:.*": 8}}, "holds one kind of grid, and these would differ"),
        ("bert", {"ignore": ["*.layer.0.output.dense"]}, r"every block; not packed is bert\.encoder\.layer\.0\.output\.dense"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(toys, monkeypatch, kind, settings, message):
    rtn = find("quantize", "rtn")
    with pytest.raises(ModelError, match=message):
        rtn.apply(bundle(toys[kind], kind), rtn.Settings(format="gptq", group_size=32, **settings), context())


def test_auto_bits_are_refused_when_the_recipe_is_read():
    with pytest.raises(ValueError, match="format: gptq holds one width"):
        find("quantize", "gptq").Settings(format="gptq", bits="auto")


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True), (8, False)])
def test_it_is_written_and_looked_at_where_nothing_reads_it(toys, tmp_path, monkeypatch, bits, symmetric):
    monkeypatch.setattr(gptq, "lacking", list)
    folder = make(toys["bert"], "bert", "rtn", tmp_path / "made", format="gptq", bits=bits, group_size=32, symmetric=symmetric)
    sentences = json.loads((folder / NOTES).read_text())["said"]
    assert any("gptqmodel, optimum, by which transformers reads them, aren't installed here" in sentence for sentence in sentences)
    dense = gptq.unpacked(Source(str(folder), "sequence-classification"), tmp_path / "dense")
    _, became = written(toys["bert"], "rtn", bits=bits, group_size=32, symmetric=symmetric)
    model = load_model(dense, "cpu")
    for name, solution in became.items():
        expected = solution.grid.values(solution.integers).double()
        assert (model.get_submodule(name).weight - expected).abs().max() <= 2**-10 * expected.abs().max()  # scales are in float16


READER = """
import os, sys, torch
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
import transformers
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.arange(3, 23)[None]
with torch.inference_mode():
    torch.save(model(ids).logits, sys.argv[1] + "/logits.pt")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_plain_transformers_reads_it_through_gptqmodel(tmp_path, kind, bits, symmetric):
    def wider(config):
        config.intermediate_size = 192

    folder = saved(lively(kind, wider), tmp_path / "before")
    rtn = find("quantize", "rtn")
    alike = {"bits": bits, "group_size": 32, "symmetric": symmetric}
    rtn.apply(bundle(folder, kind), rtn.Settings(**alike), context()).save(tmp_path / "plain")
    rtn.apply(bundle(folder, kind), rtn.Settings(**alike, format="gptq"), context()).save(tmp_path / "gptq")
    auto = {"llama": "AutoModelForCausalLM", "bert": "AutoModelForSequenceClassification"}[kind]
    for name in ("plain", "gptq"):
        subprocess.run([sys.executable, "-c", READER, str(tmp_path / name), auto], check=True, capture_output=True)
    expected, through_gptq = (torch.load(tmp_path / name / "logits.pt") for name in ("plain", "gptq"))
    assert ((through_gptq - expected).norm() / expected.norm()).item() < 0.01
