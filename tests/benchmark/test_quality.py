"""Generation and likelihood in batches against plain transformers, one example at a time."""

import pytest
import torch

from compress.benchmark import quality
from compress.errors import DataError
from compress.model import Bundle, Source
from tests.conftest import TASKS

PROMPTS = ["the cat sat", "a big dog ran on the red mat and sat", "the", "blue hat on a small mat was it"]
TARGETS = ["cat sat on mat", "dog", "the red hat", "it was blue and small"]


def quiet(*_):
    pass


@pytest.fixture(params=["t5", "bart", "llama", "gpt2"])
def bundle(request, toys):
    return Bundle(Source(str(toys[request.param]), TASKS[request.param], "float32"), "cpu")


def test_batches_give_the_same_tokens_as_one_at_a_time(bundle):
    model, words = bundle.model, bundle.tokenizer
    settings = {"max_new_tokens": 8, "num_beams": 1, "do_sample": False, "seed": 0}
    found = quality.generate(model, words, PROMPTS, settings, 3, None, quiet)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        inputs = words(prompt, return_tensors="pt", return_token_type_ids=False)
        alone = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
        alone = alone[1:] if model.config.is_encoder_decoder else alone[inputs["input_ids"].shape[1] :]
        assert tokens == [t for t in alone if t > 1][: len(tokens)]


def test_likelihoods_are_those_of_a_plain_loop(bundle):
    model, words = bundle.model, bundle.tokenizer
    found = quality.likelihoods(model, words, PROMPTS, TARGETS, 3, None, quiet)
    for prompt, target, (nll, count) in zip(PROMPTS, TARGETS, found, strict=True):
        given = words(prompt)["input_ids"]
        if model.config.is_encoder_decoder:
            answer = words(target)["input_ids"]
            start = model.config.decoder_start_token_id
            logits = model(input_ids=torch.tensor([given]), decoder_input_ids=torch.tensor([[start, *answer[:-1]]])).logits[0]
        else:
            given, answer = given[:-1], words(target, add_special_tokens=False)["input_ids"]
            logits = model(input_ids=torch.tensor([given + answer])).logits[0, len(given) - 1 : -1]
        chosen = logits.double().log_softmax(-1)[range(len(answer)), answer]
        assert count == len(answer)
        assert nll == pytest.approx(-chosen.sum().item(), rel=1e-5)


def test_plain_text_is_predicted_from_its_second_token(toys):
    bundle = Bundle(Source(str(toys["llama"]), "causal-lm", "float32"), "cpu")
    found = quality.likelihoods(bundle.model, bundle.tokenizer, PROMPTS, None, 2, None, quiet)
    assert [count for _, count in found] == [len(bundle.tokenizer(p)["input_ids"]) - 1 for p in PROMPTS]
    cut = quality.likelihoods(bundle.model, bundle.tokenizer, PROMPTS, None, 2, 3, quiet)
    assert max(count for _, count in cut) == 2


def test_what_does_not_fit_the_context_is_refused_by_name(toys):
    bundle = Bundle(Source(str(toys["llama"]), "causal-lm", "float32"), "cpu")
    with pytest.raises(DataError, match="64 does not fit the model's context of 64 tokens"):
        quality.generate(bundle.model, bundle.tokenizer, PROMPTS, {"max_new_tokens": 64, "seed": 0}, 2, None, quiet)


def test_labels_are_read_as_numbers_and_names(toys):
    model = Bundle(Source(str(toys["bert"]), "sequence-classification", "float32"), "cpu").model
    assert (quality.label_number(model, "1"), quality.label_number(model, "LABEL_1")) == (1, 1)
    with pytest.raises(DataError, match="label 'good' is none of the model's: numbers below 2, or LABEL_0, LABEL_1"):
        quality.label_number(model, "good")
