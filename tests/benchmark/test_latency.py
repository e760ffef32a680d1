"""The clock: as many marks as tokens, on any architecture. No test asserts a speed."""

import time
from itertools import pairwise

import pytest

from compress.benchmark import latency
from compress.model import Bundle, Source
from tests.conftest import TASKS


@pytest.mark.parametrize("kind", ["t5", "bart", "llama", "gpt2"])
def test_every_forced_token_is_timed(toys, kind):
    model = Bundle(Source(str(toys[kind]), TASKS[kind], "float32"), "cpu").model
    inputs = latency.prompts(model, "cpu", 2, 8)
    assert inputs["input_ids"].shape == (2, 8)
    seconds = latency.generation_seconds(model, inputs, 6, "cpu")
    assert len(seconds) == 6
    assert all(0 < a < b for a, b in pairwise(seconds))


def test_a_generation_rests_after_each_slice_and_the_rest_does_not_count(toys, monkeypatch):
    model = Bundle(Source(str(toys["t5"]), TASKS["t5"], "float32"), "cpu").model
    inputs, told = latency.prompts(model, "cpu", 1, 8), []
    latency.generation_seconds(model, inputs, 6, "cpu")

    def rest(tokens):
        told.append(tokens)
        time.sleep(0.1)

    monkeypatch.setattr(latency, "SLICE_S", 0)
    began = time.perf_counter()
    seconds = latency.generation_seconds(model, inputs, 6, "cpu", rest=rest)
    whole = time.perf_counter() - began
    assert told == [1, 2, 3, 4, 5, 6]
    assert all(0 < a < b for a, b in pairwise(seconds))
    assert 0 < seconds[-1] <= whole - 0.6
    monkeypatch.setattr(latency, "SLICE_S", 1000)
    latency.generation_seconds(model, inputs, 6, "cpu", rest=rest)
    assert len(told) == 6, "no slice was over"


def test_prompts_are_the_same_for_both_sides(toys):
    models = [Bundle(Source(str(toys["llama"]), "causal-lm", dtype), "cpu").model for dtype in ("float32", "bfloat16")]
    one, other = (latency.prompts(model, "cpu", 3, 10)["input_ids"] for model in models)
    assert one.tolist() == other.tolist()


def test_a_classification_is_one_mark(toys):
    model = Bundle(Source(str(toys["bert"]), "sequence-classification", "float32"), "cpu").model
    assert len(latency.forward_seconds(model, latency.prompts(model, "cpu", 2, 8), "cpu")) == 1


@pytest.mark.gpu
def test_cuda_events_mark_every_token(toys):
    model = Bundle(Source(str(toys["llama"]), "causal-lm", "float16"), "cuda").model
    seconds = latency.generation_seconds(model, latency.prompts(model, "cuda", 2, 8), 6, "cuda")
    assert len(seconds) == 6
    assert all(0 < a < b for a, b in pairwise(seconds))
