"""A static cache and compiled steps: the same tokens as without, nothing compiled twice, nothing compiled in a timed turn."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import StoppingCriteria

from compress import pipeline
from compress.benchmark.messages import Explain, Time, WarmUp
from compress.engines.transformers import timing, work
from compress.errors import MissingPackage, ModelError
from compress.methods import quiet
from compress.model.loading import Bundle
from compress.model.source import Source
from compress.recipe import Runtime, load
from tests import measuring
from tests.conftest import TASKS, recipe_for
from tests.quantize.test_methods import make
from tests.wide import stored, wide

STATIC = Runtime(cache="static")
COMPILED = Runtime(cache="static", compile=True)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


class Nobody(StoppingCriteria):
    def __call__(self, ids, scores, **_):
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def model_of(toys, kind):
    return Bundle(Source(str(toys[kind]), TASKS[kind], "float32"), "cpu").model


@pytest.mark.parametrize("kind", ["t5", "bart", "llama", "gpt2"])
def test_a_static_cache_writes_the_same_and_is_as_long_as_its_own_generation(toys, kind):
    model = model_of(toys, kind)
    held = {}
    for prompt in (16, 8):  # a shorter one after a longer one
        inputs = timing.prompts(model, 2, prompt)
        expected = timing.generate(model, inputs, 5, Nobody())
        counter = work.Counter()
        with counter.watching(model):
            assert torch.equal(timing.generate(model, inputs, 5, counter, STATIC), expected)
        held[prompt] = counter.cache_bytes
    heads = 2 if kind == "llama" else 4
    assert held[16] - held[8] == 4 * 2 * 2 * 2 * heads * 16 * 8, "layers x keys and values x batch x heads of 16 x tokens"


def loaded(folder, kind, runtime, device="cpu"):
    return measuring.loaded(folder, TASKS[kind], device, runtime=runtime.model_dump())[0]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_steps_are_compiled_in_the_warm_up_alone(kind, device, tmp_path):
    one_block = {"t5": {"num_layers": 1, "num_decoder_layers": 1}, "llama": {"num_hidden_layers": 1}}[kind]
    worker = loaded(stored(wide(kind, **one_block), tmp_path / kind), kind, COMPILED, device)
    points = [(1, 8), (2, 16)]

    def written(point, runtime):
        return timing.generate(worker.engine.model, timing.prompts(worker.engine.model, *point), 5, Nobody(), runtime)

    expected = [written(point, Runtime()) for point in points]
    counters.clear()
    warm = [worker.warm_up(quiet, WarmUp(point, 5, 1)) for point in points]
    assert all(warmed_up.compile_seconds > 0 for warmed_up in warm)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled >= len(points)
    worker.time(quiet, Time(points, 5, 1))
    worker.explain(quiet, Explain(points, 5))
    assert counters["stats"]["unique_graphs"] == compiled
    for point, ids in zip(points, expected, strict=True):
        assert torch.equal(written(point, COMPILED), ids)


@needs_compiler
@pytest.mark.slow
def test_a_classifier_is_compiled(toys):
    worker = loaded(toys["bert"], "bert", Runtime(compile=True))
    counters.clear()
    worker.warm_up(quiet, WarmUp((2, 8), 5, 1))
    assert counters["stats"]["unique_graphs"] >= 1
    assert len(worker.time(quiet, Time([(2, 8)], 5, 2)).seconds[0]) == 2


def test_models_that_transformers_does_not_compile_are_refused(toys, tmp_path):
    folder = make(toys["llama"], "llama", "bnb_nf4", tmp_path / "made")
    with pytest.raises(
        ModelError, match=r"runtime\.compile: transformers doesn't compile models packed by bitsandbytes; leave compile out"
    ):
        loaded(folder, "llama", COMPILED)


def test_without_a_compiler_it_is_refused_before_anything_is_loaded(toys, rows, write_recipe, monkeypatch):
    recipe = recipe_for("llama", toys["llama"], rows)
    recipe["benchmark"]["runtime"] = {"compile": True, "cache": "static"}
    monkeypatch.setenv("CXX", "no-such-compiler")
    file = load(write_recipe(recipe))
    for verb in (lambda: pipeline.run(file), lambda: pipeline.bench(str(toys["llama"]), file)):
        with pytest.raises(MissingPackage, match=r"the C\+\+ compiler no-such-compiler, which isn't here; install it"):
            verb()
