"""What is carried over to ONNX: the integers are an artifact's own, what they compute is what a dense model of them does."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress import engines, exports, gptq
from compress.engines import Opening, Piece
from compress.errors import ModelError, RecipeError
from compress.export import onnx as export
from compress.methods import quiet
from compress.model.loading import Bundle
from compress.model.source import Source
from compress.quantize import rtn
from compress.recipe import Generation, Runtime, load
from tests import blocks
from tests.conftest import recipe_for
from tests.decoders import decoder, tokenizer
from tests.engines.test_llama_cpp import PROMPTS, continued, nats

onnx_ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime_genai")
PIECES = [Piece(n, prompt, [-100, *prompt[1:]]) for n, prompt in enumerate(PROMPTS)]
UP = "model.layers.1.mlp.up_proj"


def artifact(source, target, method="onnx", family="export", **settings):
    """The artifact of one stage."""
    seen = blocks.examples() if family == "quantize" else ()
    return blocks.made(Source(str(source), "causal-lm"), family, method, settings, target, seen)


def opened(folder):
    module = engines.find("onnxruntime")
    engine = module.make(Opening(Source(str(folder), "causal-lm"), "cpu", 1, Runtime(), module.Settings()))
    engine.open()
    return engine


def fields(words, bits):
    """Integers of so many bits, (rows, n), of bytes or words (rows, m) that hold them one after the other, the lowest bit first."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream[:, : stream.shape[1] // bits * bits].reshape(len(words), -1, bits) @ (1 << np.arange(bits))


def dense(packed, source, target, bits, symmetric):
    """A model in float32 of the numbers that a folder of compressed-tensors holds, taken apart here."""
    model, stored = AutoModelForCausalLM.from_pretrained(source), load_file(packed / "model.safetensors")
    for name in [name for name in stored if name.endswith(".weight_packed")]:
        layer = name.removesuffix(".weight_packed")
        rows, columns = stored[f"{layer}.weight_shape"].tolist()
        width = bits[layer.split(".")[2]] if isinstance(bits, dict) else bits
        scale = stored[f"{layer}.weight_scale"].float().numpy()
        integers = fields(stored[name].numpy(), width)[:, :columns].reshape(rows, scale.shape[1], -1)
        zero = np.array(2 ** (width - 1))
        if not symmetric:
            kept = stored[f"{layer}.weight_zero_point"].numpy()
            zero = (kept + zero if kept.dtype == np.int8 else fields(kept.T, width)[:, :rows].T)[..., None]
        weight = (scale[..., None] * (integers - zero)).reshape(rows, columns).astype(np.float32)
        model.get_submodule(layer).weight.data = torch.from_numpy(weight)
    model.save_pretrained(target)
    tokenizer().save_pretrained(target)
    return model


@pytest.mark.parametrize(
    ("method", "settings", "kinds"),
    [
        ("gptq", {"bits": 4, "group_size": 32, "symmetric": True}, {(4, 32)}),
        ("rtn", {"bits": 4, "group_size": 64, "symmetric": False}, {(4, 64)}),
        ("rtn", {"bits": 3, "group_size": 32, "symmetric": True}, {(4, 32)}),
        ("rtn", {"bits": 4, "group_size": -1, "symmetric": False}, {(4, 64), (4, 128)}),
        ("rtn", {"bits": 8, "group_size": -1, "symmetric": True}, {(8, 16), (8, 64), (8, 256)}),
        ("rtn", {"bits": {"*.0.*": 4, "*.1.*": 8}, "group_size": 32, "symmetric": True}, {(4, 32), (8, 32)}),
    ],
)
def test_the_very_integers_are_multiplied_with(tmp_path, method, settings, kinds):
    shape = {"hidden_size": 48, "intermediate_size": 512, "head_dim": 16} if settings["bits"] == 8 else {"head_dim": 16}
    source = decoder(tmp_path / "model", "qwen2", **shape)
    packed = artifact(source, tmp_path / "packed", method, "quantize", ignore=["lm_head", "*.0.mlp.up_proj"], **settings)
    folder = artifact(packed, tmp_path / "made")
    bits = {"0": 4, "1": 8} if isinstance(settings["bits"], dict) else settings["bits"]
    model, engine = dense(packed, source, tmp_path / "dense", bits, settings["symmetric"]), opened(folder)
    assert [row.nats for row in engine.read(PIECES, quiet)] == pytest.approx([nats(model, p.ids, p.labels) for p in PIECES], rel=1e-5)
    written = engine.write(PROMPTS, Generation(max_new_tokens=8), quiet).tokens
    expected = [continued(model, prompt, 8) for prompt in PROMPTS]
    assert written == [row[: row.index(1)] if 1 in row else row for row in expected]
    graph = onnx_ir.load(folder / "model.onnx").graph
    nodes = [node for node in graph if node.op_type == "MatMulNBits"]
    assert len(nodes) == 13
    assert {(node.attributes["bits"].value, node.attributes["block_size"].value) for node in nodes} == kinds
    assert {node.attributes["accuracy_level"].value for node in nodes} == {0}, "inputs aren't rounded"
    assert [node.name for node in graph if node.op_type == "MatMul"] == ["/model/layers.0/mlp/up_proj/MatMul", "/lm_head/MatMul"]
    assert engine.traits.dtype in {f"int{width}_float32" for width, _ in kinds}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_of_gptqs_own_files_are_kept(tmp_path, symmetric):
    """In both versions of the format, one of which has every zero point less one."""
    source = decoder(tmp_path / "model")
    packed = artifact(source, tmp_path / "packed", "rtn", "quantize", bits=4, group_size=32, symmetric=symmetric, format="gptq")
    stored, folder = load_file(packed / "model.safetensors"), artifact(packed, tmp_path / "made")
    graph = onnx_ir.load(folder / "model.onnx").graph
    numbers = {name: value.const_value.numpy() for name, value in graph.initializers.items()}
    assert np.array_equal(fields(numbers[f"{UP}.qweight"].reshape(128, -1), 4), fields(stored[f"{UP}.qweight"].numpy().T, 4))
    assert np.array_equal(numbers[f"{UP}.scales"], stored[f"{UP}.scales"].float().numpy().T)
    assert (f"{UP}.qzeros" in numbers) != symmetric
    if not symmetric:
        assert np.array_equal(fields(numbers[f"{UP}.qzeros"], 4), fields(stored[f"{UP}.qzeros"].numpy(), 4).T)
    model = AutoModelForCausalLM.from_pretrained(gptq.unpacked(Source(str(packed), "causal-lm"), tmp_path / "dense").id)
    assert [row.nats for row in opened(folder).read(PIECES, quiet)] == pytest.approx(
        [nats(model.float(), p.ids, p.labels) for p in PIECES], rel=1e-5
    )
    assert exports.read(folder).weights == "int4"


def test_the_code_that_a_card_has_runs_alone(tmp_path):
    folder = artifact(decoder(tmp_path / "model"), tmp_path / "made")
    code = export.usage("causal-lm", [f"ids = {PROMPTS[0]}"], 5)
    ran = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=folder, capture_output=True, text=True, check=True)
    written = opened(folder).write([PROMPTS[0]], Generation(max_new_tokens=5), quiet).tokens[0]
    assert ran.stdout.strip() == tokenizer().decode(written, skip_special_tokens=True).strip()


def test_what_cannot_be_held_is_refused(toys, tmp_path, rows, write_recipe):
    def refused(folder, **settings):
        with pytest.raises(ModelError) as error:
            export.apply(Bundle(Source(str(folder), "causal-lm"), "cpu"), export.Settings(**settings), blocks.context())
        return str(error.value)

    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    part = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert "rope_type: linear; supported: default, llama3" in refused(decoder(tmp_path / "linear", rope_parameters=linear))
    assert "partial_rotary_factor: 0.5" in refused(decoder(tmp_path / "part", rope_parameters=part))
    assert "sliding_window: 8 of 256 positions" in refused(decoder(tmp_path / "window", "mistral", sliding_window=8))
    assert "the model is a gpt2; supported: llama, mistral, qwen2, qwen3" in refused(toys["gpt2"])
    rounded = artifact(decoder(tmp_path / "model"), tmp_path / "rounded", "smoothquant", "quantize")
    assert "packed by torchao. Only the integers of" in refused(rounded)
    assert export.Settings().why_not_behind("quantize: rtn", rtn.Settings(), {64, 172}) == (
        "layers of 172 columns don't fit blocks of 16; name them under ignore of `quantize: rtn`, or give weights: float32"
    )
    with pytest.raises(RecipeError, match=r"onnx is for task causal-lm, not for seq2seq"):
        load(write_recipe({**recipe_for("t5", toys["t5"], rows, stages=[{"export": "onnx"}]), "engine": "onnxruntime"}))


def test_a_layer_that_the_graph_lacks_is_named(tmp_path):
    packed = artifact(decoder(tmp_path / "model"), tmp_path / "packed", "rtn", "quantize", bits=4, group_size=32)
    exported = export.apply(Bundle(Source(str(packed), "causal-lm"), "cpu"), export.Settings(), blocks.context())
    exported.packed["model.layers.9.mlp.up_proj"] = exported.packed.pop(UP)
    (tmp_path / "made").mkdir()
    with pytest.raises(ModelError, match=r"model.layers.9.mlp.up_proj and 0 more packed layers have no matrix of their own"):
        exported.save(tmp_path / "made")
