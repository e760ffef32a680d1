"""GGUF files, read by the package gguf: integers are an artifact's own, the rest is rounded as asked, what can't be held is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from compress import exports
from compress.errors import ModelError
from compress.export import gguf as export
from compress.export._gguf_blocks import Integers, blocks, kind_for
from compress.model.loading import Bundle
from compress.model.source import Source
from compress.quantize import gptq, rtn
from tests.blocks import context
from tests.decoders import SIZE, decoder

gguf = pytest.importorskip("gguf")
UP, QUERY = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"


def written(source, target, **settings):
    """The folder that the stage makes of another."""
    target.mkdir()
    bundle = Bundle(Source(str(source), "causal-lm"), "cpu")
    export.apply(bundle, export.Settings(**settings), context()).save(target)
    return target


def tensors(folder):
    """What the file holds, by name: type and numbers, float32."""
    return {
        tensor.name: (tensor.tensor_type.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist()))
        for tensor in gguf.GGUFReader(folder / export.FILE).tensors
    }


def refused(folder, **settings):
    """What the stage says before it reads a weight."""
    with pytest.raises(ModelError) as error:
        export.apply(Bundle(Source(str(folder), "causal-lm"), "cpu"), export.Settings(**settings), context())
    return str(error.value)


def bits_of(words, bits, count):
    """Integers of so many bits each, (rows, count), of int32 words (rows, words) that hold them one after the other."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    return stream.reshape(len(words), count, bits) @ (1 << np.arange(bits))


@pytest.mark.parametrize(
    ("bits", "symmetric", "size", "kind"),
    [(4, True, 32, "Q4_0"), (4, False, 32, "Q4_1"), (8, True, 32, "Q8_0"), (4, True, 64, "Q4_0"), (4, False, -1, "Q4_1")],
)
def test_a_file_holds_an_artifacts_own_integers(tmp_path, bits, symmetric, size, kind):
    """The blocks, decoded by gguf, against words and scales of the artifact taken apart here."""
    method, settings = (gptq, gptq.Settings) if size == 32 else (rtn, rtn.Settings)
    source = Bundle(Source(str(decoder(tmp_path / "model")), "causal-lm"), "cpu")
    method.apply(source, settings(bits=bits, symmetric=symmetric, group_size=size), context()).save(tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    stored_tensors = tensors(written(tmp_path / "packed", tmp_path / "made"))
    for layer, name in ((UP, "blk.1.ffn_up.weight"), (QUERY, "blk.0.attn_q.weight")):
        columns = int(stored[f"{layer}.weight_shape"][1])
        scale = stored[f"{layer}.weight_scale"].numpy().astype(np.float16).astype(np.float32)
        groups = scale.shape[1]
        integers = bits_of(stored[f"{layer}.weight_packed"].numpy(), bits, columns).reshape(len(scale), groups, -1)
        if symmetric:
            expected = scale[..., None] * (integers - 2 ** (bits - 1)).astype(np.float32)
        else:
            zero = bits_of(stored[f"{layer}.weight_zero_point"].numpy().T, bits, len(scale)).T
            least = (-zero * scale).astype(np.float16).astype(np.float32)
            expected = scale[..., None] * integers.astype(np.float32) + least[..., None]
        expected = expected.reshape(len(scale), columns)
        if layer == QUERY:  # a rotation turns neighbours there, where it turned the halves of each head's 32 rows here
            expected = np.stack([expected[head * 32 + half * 16 + n] for head in range(4) for n in range(16) for half in range(2)])
        assert stored_tensors[name][0] == kind
        assert np.array_equal(stored_tensors[name][1], expected)
    assert exports.read(tmp_path / "made").weights == kind.lower()
    assert "quantization_config" not in json.loads((tmp_path / "made" / "config.json").read_text())


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "Q4_1", "Q5_1"])
def test_blocks_are_read_by_gguf_as_they_are_meant(kind):
    draw, bits, symmetric = np.random.default_rng(0), int(kind[1]), kind.endswith("0")
    scale = draw.normal(size=(6, 2)).astype(np.float16).astype(np.float32)  # of either sign, and the same in two blocks
    low = -(2 ** (bits - 1)) if symmetric else 0
    integers = draw.integers(low, low + 2**bits, (6, 128)).astype(np.int16)
    zero = None if symmetric else np.zeros((6, 2), np.int16) + 3
    matrix = Integers(integers, scale, zero)
    read = gguf.quants.dequantize(blocks("it", matrix, kind), gguf.GGMLQuantizationType[kind])
    assert kind_for("it", bits, symmetric, 128, 2) == kind
    np.testing.assert_allclose(read, matrix.values(), rtol=0, atol=0 if symmetric else 3 * np.abs(scale).max() * 2**-11)


def test_a_narrower_grid_is_held_by_the_next_wider_blocks():
    assert [kind_for("it", bits, True, 64, 2) for bits in (2, 3, 4, 5, 8)] == ["Q4_0", "Q4_0", "Q4_0", "Q5_0", "Q8_0"]
    assert [kind_for("it", bits, False, 64, 2) for bits in (2, 3, 4, 5)] == ["Q4_1", "Q4_1", "Q4_1", "Q5_1"]


def test_types_are_those_asked_for(tmp_path):
    folder = decoder(tmp_path / "model", "qwen2", head_dim=16, tie_word_embeddings=False, dtype=torch.bfloat16)
    numbers = load_file(folder / "model.safetensors")
    for settings, layers, tables in (
        ({}, "F16", "F16"),
        ({"weights": "f32"}, "F32", "F32"),
        ({"weights": "q8_0", "embeddings": "q8_0"}, "Q8_0", "Q8_0"),
        ({"weights": "q5_1", "embeddings": "f32"}, "Q5_1", "F32"),
    ):
        stored_tensors = tensors(written(folder, tmp_path / f"{layers}-{tables}", **settings))
        assert {kind for name, (kind, values) in stored_tensors.items() if values.ndim == 2 and name.startswith("blk.")} == {layers}
        assert {stored_tensors["token_embd.weight"][0], stored_tensors["output.weight"][0]} == {tables}
        assert {kind for kind, values in stored_tensors.values() if values.ndim == 1} == {"F32"}
        nearest = gguf.quants.quantize(numbers[f"{UP}.weight"].float().numpy(), gguf.GGMLQuantizationType[layers])
        assert np.array_equal(stored_tensors["blk.1.ffn_up.weight"][1], gguf.quants.dequantize(nearest, gguf.GGMLQuantizationType[layers]))
    told = context()
    export.apply(Bundle(Source(str(folder), "causal-lm"), "cpu"), export.Settings(), told)
    assert told.said == ["layers are stored as F16 (14)"]
    record = exports.read(tmp_path / "F16-F16")
    assert (record.format, record.files, record.parameters) == ("gguf", ["model.gguf"], sum(tensor.numel() for tensor in numbers.values()))


def test_what_is_on_no_grid_stays_beside_integers(tmp_path):
    source = Bundle(Source(str(decoder(tmp_path / "model", tie_word_embeddings=False)), "causal-lm"), "cpu")
    rtn.apply(source, rtn.Settings(group_size=32, symmetric=True, ignore=["up_proj"]), context()).save(tmp_path / "packed")
    stored_tensors = tensors(written(tmp_path / "packed", tmp_path / "made", embeddings="q8_0"))
    kinds = {
        name: stored_tensors[name][0] for name in ("output.weight", "token_embd.weight", "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight")
    }
    assert kinds == {"output.weight": "Q8_0", "token_embd.weight": "Q8_0", "blk.0.ffn_up.weight": "F16", "blk.0.ffn_gate.weight": "Q4_0"}


def test_a_head_is_shared_where_it_is_the_same(tmp_path):
    """As transformers takes it, whatever the config says."""
    folder = decoder(tmp_path / "model")
    numbers = load_file(folder / "model.safetensors")
    for name, head in (("same", 1.0), ("other", 2.0)):
        save_file(
            {**numbers, "lm_head.weight": head * numbers["model.embed_tokens.weight"]}, folder / "model.safetensors", {"format": "pt"}
        )
        assert ("output.weight" in tensors(written(folder, tmp_path / name))) == (name == "other")


def test_a_packed_model_can_be_unpacked_instead(tmp_path):
    source = Bundle(Source(str(decoder(tmp_path / "model")), "causal-lm"), "cpu")
    rtn.apply(source, rtn.Settings(group_size=32), context()).save(tmp_path / "packed")
    as_floats = tensors(written(tmp_path / "packed", tmp_path / "floats", weights="f32"))
    kept = tensors(written(tmp_path / "packed", tmp_path / "kept"))
    assert (as_floats["blk.1.ffn_up.weight"][0], kept["blk.1.ffn_up.weight"][0]) == ("F32", "Q4_1")
    np.testing.assert_allclose(as_floats["blk.1.ffn_up.weight"][1], kept["blk.1.ffn_up.weight"][1], atol=1e-3)


def test_the_folder_is_a_hugging_face_folder_but_for_its_weights(tmp_path):
    folder = decoder(tmp_path / "model")
    copy = written(folder, tmp_path / "made")
    assert json.loads((copy / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert json.loads((copy / "generation_config.json").read_text()) == json.loads((folder / "generation_config.json").read_text())
    assert AutoTokenizer.from_pretrained(copy)("the cat").input_ids == AutoTokenizer.from_pretrained(folder)("the cat").input_ids
    fields = gguf.GGUFReader(copy / export.FILE).fields
    assert len(fields["tokenizer.ggml.tokens"].data) == SIZE
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def test_what_cant_be_carried_over_is_refused_before_any_work(toys, tmp_path):
    assert "is a gpt2; supported: llama, mistral, qwen2, qwen3" in refused(toys["gpt2"])
    assert "the tokenizer is WordLevel; supported: byte-level BPE" in refused(toys["llama"])
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
    assert "rope_type: yarn; supported: default, linear, llama3" in refused(decoder(tmp_path / "yarn", rope_parameters=yarn))
    window = decoder(tmp_path / "window", "mistral", sliding_window=64)
    assert "sliding_window: 64 of 256 positions" in refused(window)
    assert "head_dim: 32; llama.cpp takes hidden_size / num_attention_heads for a qwen2, 16" in refused(decoder(tmp_path / "wide", "qwen2"))
    assert "hidden_act: gelu" in refused(decoder(tmp_path / "gelu", hidden_act="gelu"))
    assert "a token 339, and the model 300 embeddings" in refused(decoder(tmp_path / "few", vocab_size=300))
    odd = decoder(tmp_path / "odd", intermediate_size=72)
    message = refused(odd, weights="q4_0")
    assert "down_proj.weight has 72 columns, no multiple of 32, which weights: q4_0 needs; take weights: f16" in message
    narrow = decoder(tmp_path / "narrow", hidden_size=72)
    assert "embed_tokens.weight has 72 columns, no multiple of 32, which embeddings: q8_0 needs" in refused(narrow, embeddings="q8_0")


def test_integers_that_no_block_holds_are_refused(tmp_path):
    def packed(name, folder, **settings):
        source = Bundle(Source(str(folder), "causal-lm"), "cpu")
        rtn.apply(source, rtn.Settings(**settings), context()).save(tmp_path / name)
        return tmp_path / name

    model = decoder(tmp_path / "model", intermediate_size=72)
    assert "down_proj has 72 columns, no multiple of a block's 32; name the layer under ignore" in refused(
        packed("odd", model, group_size=32)
    )
    whole = decoder(tmp_path / "whole")
    wide = refused(packed("wide", whole, bits=8, symmetric=False, group_size=32))
    assert "8 bits with zero points, which can be stored up to 5 bits" in wide
    assert "symmetric: true" in wide
    with pytest.raises(ModelError, match="it has groups of 48 columns, and multiples of 32 can be stored; quantise it with group_size: 32"):
        kind_for("it", 4, True, 96, 2)
    other = packed("other", whole, group_size=32)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (other / "config.json").write_text(json.dumps(config))
    assert "packed by gptq. Only the integers of compressed-tensors' pack-quantized can be kept" in refused(other)


def test_numbers_beyond_float16_are_refused(tmp_path):
    folder = decoder(tmp_path / "model")
    numbers = load_file(folder / "model.safetensors")
    numbers[f"{UP}.weight"][0, 0] = 1e6
    save_file(numbers, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.weight has a weight of 1e\+06, beyond float16; take weights: f32"):
        written(folder, tmp_path / "made")
    with pytest.raises(ModelError, match=r"a scale of 1e\+06 is beyond float16"):
        blocks("it", Integers(np.zeros((1, 32), np.int16), np.full((1, 1), 1e6, np.float32), None), "Q4_0")
