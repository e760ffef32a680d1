"""Generation and likelihood in batches against plain transformers, one example at a time."""

import pytest
import torch

from compress.architecture import label_number
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
    """A random model that doesn't stop at once: weights drawn wider, so that prompts matter, and the end token made unlikely."""
    found = Bundle(Source(str(toys[request.param]), TASKS[request.param], "float32"), "cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in found.model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.15 * torch.randn_like(parameter))
    found.model.generation_config.suppress_tokens = [0, 1, 2]
    return found


def reader(bundle, **options):
    return quality.Reader(bundle.model, bundle.tokenizer, **options)


def test_batches_give_the_same_tokens_as_one_at_a_time(bundle):
    model, words, both = bundle.model, bundle.tokenizer, bundle.model.config.is_encoder_decoder
    settings = {"max_new_tokens": 8, "num_beams": 1, "do_sample": False, "seed": 0}
    found = quality.generate(reader(bundle), PROMPTS, settings, 3, quiet)
    assert len({tuple(tokens) for tokens in found}) > 1, "prompts matter"
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        ids = words(prompt)["input_ids"]
        ids = torch.tensor([ids if both else ids[:-1]])  # a decoder goes on from the prompt, not from its end token
        alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
        assert len(tokens) == 8
        assert tokens == alone[1 if both else ids.shape[1] :].tolist()


def test_likelihoods_are_those_of_a_plain_loop(bundle):
    model, words = bundle.model, bundle.tokenizer
    found = quality.likelihoods(reader(bundle), PROMPTS, TARGETS, 3, quiet)
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


@pytest.fixture
def llama(toys):
    return Bundle(Source(str(toys["llama"]), "causal-lm", "float32"), "cpu")


def test_plain_text_is_predicted_from_its_second_token(llama):
    found = quality.likelihoods(reader(llama), PROMPTS, None, 2, quiet)
    assert [count for _, count in found] == [len(llama.tokenizer(p)["input_ids"]) - 1 for p in PROMPTS]


def test_cut_inputs_are_counted_and_keep_their_end_token(llama):
    read = reader(llama, max_tokens=4)
    assert [len(row) for row in read.read(PROMPTS)] == [4, 4, 2, 4]
    assert read.read(PROMPTS)[1][-1] == 1
    assert read.cut == 4  # two of them, read twice


def test_what_does_not_fit_the_context_is_refused_by_name(llama):
    with pytest.raises(DataError, match="64 does not fit the model's context of 64 tokens"):
        quality.generate(reader(llama), PROMPTS, {"max_new_tokens": 64, "seed": 0}, 2, quiet)
    long = " ".join(["cat"] * 100)
    found = quality.likelihoods(reader(llama), [PROMPTS[0], long], [long, TARGETS[0]], 2, quiet)
    assert [count for _, count in found] == [32, 4], "an overlong answer gets half of the context"


def test_chat_prompts_have_one_start_token(llama):
    words = llama.tokenizer
    words.chat_template = "</s>{{ messages[0]['content'] }} and"
    assert reader(llama, chat=True).read(["the cat"]) == [[1, *words("the cat and", add_special_tokens=False)["input_ids"]]]
    words.chat_template = None
    with pytest.raises(DataError, match=r"data\.chat: the model's tokenizer has no chat template"):
        reader(llama, chat=True)


def test_labels_are_read_as_numbers_and_names(toys):
    model = Bundle(Source(str(toys["bert"]), "sequence-classification", "float32"), "cpu").model
    assert (label_number(model.config, "1"), label_number(model.config, "LABEL_1")) == (1, 1)
    with pytest.raises(DataError, match="label 'good' is none of the model's: numbers below 2, or LABEL_0, LABEL_1"):
        label_number(model.config, "good")
