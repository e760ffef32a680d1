"""Bytes foretold, held against real models and what they leave in memory."""

import pytest
import torch

from compress import held
from compress.architectures import read
from compress.execution import Execution
from compress.forecast.footprint import OBJECTS, cache_bytes, footprint, weight_bytes
from compress.model.loading import load_model
from compress.model.source import Source
from compress.runtime import use_cpu_int8
from tests.blocks import cache_left, run
from tests.conftest import TASKS, make_model, make_tokenizer

BATCH, PROMPT, NEW = 3, 8, 5


def shape_of(model, kind):
    return read(model.config.to_dict(), TASKS[kind])


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "FP32"), (torch.bfloat16, "BF16")])
def test_weights_take_what_a_loaded_model_takes(kind, dtype, name):
    model = make_model(kind).to(dtype)
    assert weight_bytes(shape_of(model, kind), name) == pytest.approx(held.weight_bytes(model), rel=0.01)


def test_fewer_bits_are_for_the_linear_layers_alone():
    shape = shape_of(make_model("gpt2"), "gpt2")
    assert weight_bytes(shape, "BF16", 8) == shape.linear + 2 * shape.other
    assert weight_bytes(shape, "FP32", 4) == shape.linear // 2 + 2 * shape.linear // 128 + 4 * shape.other


def test_columns_are_padded_as_fbgemm_lays_them(toys, tmp_path):
    """Against what the process allocates; each layer takes some hundred bytes besides."""
    loaded = load_model(Source(str(run("quantize", "int8_dynamic", toys["t5"], "t5", tmp_path / "made")), "seq2seq"), "cpu")
    shape = shape_of(make_model("t5"), "t5")
    layers = use_cpu_int8(loaded)
    foretold = weight_bytes(shape, "FP32", 8, padded=True)
    assert foretold == pytest.approx(held.weight_bytes(loaded), abs=layers * 3000)
    assert foretold > 2 * weight_bytes(shape, "FP32", 8)


@pytest.mark.parametrize("kind", TASKS)
def test_the_cache_takes_what_a_generation_leaves(kind):
    model = make_model(kind).eval()
    assert cache_bytes(shape_of(model, kind), 4, BATCH, PROMPT, NEW) == cache_left(model, BATCH, PROMPT, NEW)


def test_more_tokens_take_more_and_a_gpu_has_no_heap():
    shape = shape_of(make_model("llama"), "llama")
    weights = weight_bytes(shape, "FP32")
    peaks = [footprint(weights, shape, 4, batch, prompt, NEW, "cpu").peak for batch, prompt in [(1, 8), (1, 64), (8, 64), (8, 128)]]
    assert peaks == sorted(set(peaks))
    assert footprint(weights, shape, 4, 8, 128, NEW, "cuda").alive + OBJECTS == footprint(weights, shape, 4, 8, 128, NEW, "cpu").alive


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_peak_is_within_15_percent_of_the_measured_one(batch_size, tmp_path):
    import json

    import transformers

    from compress.benchmark.subject import Subject
    from compress.recipe import Benchmark, Data, Model, Recipe

    config = transformers.GPT2Config(vocab_size=8000, n_embd=384, n_layer=4, n_head=6, n_positions=256, bos_token_id=1, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    recipe = Recipe(
        version=1, model=Model(id=str(tmp_path), task="causal-lm"), data=Data(source="builtin", text="{dialogue}"),
        benchmark=Benchmark(batch_sizes=[batch_size], prompt_tokens=[128], new_tokens=4, rounds=1, warmup=0, threads=1),
    )  # fmt: skip
    subject = Subject("candidate", Source(str(tmp_path), "causal-lm", "float32"), recipe, Execution("cpu", tmp_path / "log"), tmp_path)
    try:
        subject.start()
    finally:
        subject.stop()
    shape = read(json.loads((tmp_path / "config.json").read_text()), "causal-lm")
    foretold = footprint(weight_bytes(shape, "FP32"), shape, 4, batch_size, 128, 4, "cpu").alive
    assert foretold == pytest.approx(subject.peaks[0][(batch_size, 128)]["peak"], rel=0.15)
