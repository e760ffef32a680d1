"""ONNX Runtime as an engine, against transformers on the same weights: what it writes, how likely it finds texts, what it refuses."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.engines import Opening, Piece, onnxruntime
from compress.errors import ModelError
from compress.export import onnx
from compress.methods import quiet
from compress.model.folder import file_bytes
from compress.model.loading import Bundle
from compress.model.source import Source
from compress.recipe import Generation, Runtime
from tests.blocks import context
from tests.decoders import decoder, tokenizer
from tests.engines.test_llama_cpp import LLAMA3, PROMPTS, continued, nats

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnx_ir")
KINDS = {
    "llama": {"kind": "llama"},
    "llama3": {"kind": "llama", "rope_parameters": LLAMA3, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "mistral": {"kind": "mistral", "tie_word_embeddings": False},
    "qwen2": {"kind": "qwen2", "head_dim": 16},
    "qwen3": {"kind": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}


def exported(folder, target, **settings):
    target.mkdir()
    onnx.apply(Bundle(Source(str(folder), "causal-lm"), "cpu"), onnx.Settings(**settings), context()).save(target)
    return target


def opened(folder, tokens=None):
    engine = onnxruntime.make(Opening(Source(str(folder), "causal-lm"), "cpu", 1, Runtime(), onnxruntime.Settings()), tokens)
    engine.open()
    return engine


def until(row, end):
    return row[: row.index(end)] if end in row else row


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("llama")
    return decoder(place / "model"), exported(place / "model", place / "made")


@pytest.fixture(scope="module")
def engine(folder):
    return opened(folder[1])


@pytest.mark.parametrize("name", KINDS)
def test_float32_is_what_transformers_computes(name, tmp_path):
    folder = decoder(tmp_path / "model", **KINDS[name])
    model, engine = AutoModelForCausalLM.from_pretrained(folder), opened(exported(folder, tmp_path / "made"))
    written = engine.write(PROMPTS, Generation(max_new_tokens=12), quiet).tokens
    assert written == [until(continued(model, prompt, 12), model.config.eos_token_id) for prompt in PROMPTS]
    long = [(3 + 11 * place * place) % 300 for place in range(200)]
    (read,) = engine.read([Piece(0, long, long)], quiet)
    assert read.nats == pytest.approx(nats(model, long, long), rel=1e-5)
    held = engine.weights()
    assert held.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert held.weight_bytes - held.buffer_bytes == file_bytes(tmp_path / "made") >= 4 * held.parameters
    assert held.buffer_bytes == (4 * 384 * 64 if model.config.tie_word_embeddings else 0)


def test_likelihoods_count_the_labels_alone(folder, engine):
    model = AutoModelForCausalLM.from_pretrained(folder[0])
    long = [(3 + 11 * place * place) % 300 for place in range(255)]
    asked = ((PROMPTS[1], 5), (long, 40), ([7, 8], 2))
    pieces = [Piece(n, ids, [-100] * skipped + ids[skipped:]) for n, (ids, skipped) in enumerate(asked)]
    likelihoods = engine.read(pieces, quiet)
    assert [likelihood.tokens for likelihood in likelihoods] == [8, 215, 0]
    assert [likelihood.nats for likelihood in likelihoods] == pytest.approx(
        [*(nats(model, p.ids, p.labels) for p in pieces[:2]), 0], rel=1e-5
    )


def test_run_writes_so_many_tokens_whatever_ends_a_text(folder, tmp_path):
    """What the first prompt's answer begins with is made an end: it is left out where texts end, and no likelier one is found."""
    model = AutoModelForCausalLM.from_pretrained(folder[0])
    prompts = [prompt[:9] for prompt in PROMPTS]
    expected = [continued(model, prompt, 6) for prompt in prompts]
    model.generation_config.eos_token_id = model.config.eos_token_id = end = expected[0][1]
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    engine, steps = opened(exported(tmp_path / "model", tmp_path / "made")), []
    for _ in range(2):  # nothing is kept from one call to the next
        engine.run(engine.prepare(prompts), 6, lambda: steps.append(1))
    assert len(steps) == 12
    rows = [list(row) for row in zip(*engine._steps(prompts, 6, least=6), strict=True)]
    assert [len(row) for row in rows] == [6] * 3
    assert rows[1:] == expected[1:]
    assert end not in rows[0]
    assert engine.write(prompts, Generation(max_new_tokens=6), quiet).tokens == [until(row, end) for row in expected]
    assert len(until(expected[0], end)) <= 1


def test_many_prompts_are_answered_as_each_alone(folder, engine):
    generation = Generation(max_new_tokens=5, repetition_penalty=1.3)
    model = AutoModelForCausalLM.from_pretrained(folder[0])
    single = []
    for prompt in PROMPTS:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, repetition_penalty=1.3)[0, len(prompt) :].tolist()
        single.append(until(ids, model.config.eos_token_id))
    assert single != [continued(model, prompt, 5) for prompt in PROMPTS]
    assert opened(folder[1], tokens=40).write(PROMPTS * 3, generation, quiet).tokens == single * 3


def test_what_it_doesnt_do_is_refused(folder, engine, tmp_path):
    for settings, named in (({"do_sample": True}, "generation.do_sample"), ({"num_beams": 2}, "generation.num_beams: 2")):
        with pytest.raises(ModelError, match=named):
            engine.write(PROMPTS, Generation(**settings), quiet)
    with pytest.raises(ModelError, match="is not in the format that it opens, which `export: onnx` writes"):
        opened(folder[0])
    strict = exported(folder[0], tmp_path / "strict")
    own = json.loads((strict / "generation_config.json").read_text())
    (strict / "generation_config.json").write_text(json.dumps({**own, "no_repeat_ngram_size": 3}))
    with pytest.raises(ModelError, match="no_repeat_ngram_size isn't supported"):
        opened(strict).write(PROMPTS, Generation(), quiet)
    broken = exported(folder[0], tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match=r"engine: onnxruntime: \S+broken: .*model.onnx"):
        opened(broken)


def test_nothing_is_told_of_what_is_run(folder, tmp_path):
    """What it would tell its makers it keeps in a database under the home folder till it is sent."""
    code = (
        "import sys; from compress.engines import Opening, onnxruntime; from compress.model.source import Source; from compress.recipe import Runtime;"
        "engine = onnxruntime.make(Opening(Source(sys.argv[1], 'causal-lm'), 'cpu', 1, Runtime(), onnxruntime.Settings())); engine.open()"
    )
    variables = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    subprocess.run([sys.executable, "-c", code, str(folder[1])], env={**variables, "HOME": str(tmp_path)}, check=True)
    assert not [found for found in tmp_path.rglob("*") if "onnxruntime" in found.name]
