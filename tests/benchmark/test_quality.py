"""Likelihood in batches against plain transformers, one example at a time; what is cut and what is refused."""

import copy

import pytest
import torch

from compress.benchmark import quality
from compress.engines.transformers import reading
from compress.engines.transformers.batching import Batches
from compress.errors import DataError
from compress.methods import quiet
from compress.model.loading import Bundle
from compress.model.source import Source
from compress.structure import label_number, labels_of
from tests import measuring
from tests.conftest import WORDS
from tests.measuring import reads

PROMPTS = ["the cat sat", "a big dog ran on the red mat and sat", "the", "blue hat on a small mat was it"]
TARGETS = ["cat sat on mat", "dog", "the red hat", "it was blue and small"]


def reader(bundle, **options):
    return measuring.reader(bundle.model, bundle.tokenizer, **options)


def test_likelihoods_are_those_of_a_plain_loop(random_bundle):
    bundle = random_bundle
    model, words = bundle.model, bundle.tokenizer
    likelihoods = quality.likelihoods(reader(bundle), PROMPTS, TARGETS, reads(bundle))
    for prompt, target, (nll, count, *_) in zip(PROMPTS, TARGETS, likelihoods, strict=True):
        prompt_ids = words(prompt)["input_ids"]
        if model.config.is_encoder_decoder:
            answer = words(target)["input_ids"]
            start = model.config.decoder_start_token_id
            logits = model(input_ids=torch.tensor([prompt_ids]), decoder_input_ids=torch.tensor([[start, *answer[:-1]]])).logits[0]
        else:
            prompt_ids, answer = prompt_ids[:-1], words(target, add_special_tokens=False)["input_ids"]
            logits = model(input_ids=torch.tensor([prompt_ids + answer])).logits[0, len(prompt_ids) - 1 : -1]
        chosen = logits.double().log_softmax(-1)[range(len(answer)), answer]
        assert count == len(answer)
        assert nll == pytest.approx(-chosen.sum().item(), rel=1e-5)


def bent(bundle, spread):
    """Another model of the same kind: every matrix moved."""
    other = copy.deepcopy(bundle.model)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.add_(spread * torch.randn_like(parameter))
    return other


@pytest.mark.parametrize("spread", [0.001, 0.1])
def test_divergence_is_that_of_a_plain_loop_in_float64(random_bundle, spread):
    bundle, original = random_bundle, bent(random_bundle, spread)
    words, both = bundle.tokenizer, bundle.model.config.is_encoder_decoder
    likelihoods = quality.likelihoods(reader(bundle), PROMPTS, TARGETS, reads(bundle, original=original))
    for prompt, target, row in zip(PROMPTS, TARGETS, likelihoods, strict=True):
        prompt_ids, answer = words(prompt)["input_ids"], words(target, add_special_tokens=both)["input_ids"]
        if both:
            inputs = {"input_ids": [prompt_ids], "decoder_input_ids": [[bundle.model.config.decoder_start_token_id, *answer[:-1]]]}
        else:
            inputs = {"input_ids": [prompt_ids[:-1] + answer]}
        inputs = {name: torch.tensor(ids) for name, ids in inputs.items()}
        q, p = (model(**inputs).logits[0, -len(answer) - (not both) :].double().log_softmax(-1) for model in (bundle.model, original))
        q, p = q[: len(answer)], p[: len(answer)]
        expected = (p.exp() * (p - q)).sum(-1)
        assert (row.divergence, row.first) == pytest.approx((expected.sum().item(), expected[0].item()), rel=1e-3, abs=1e-6)
        assert row.equal == (p.argmax(-1) == q.argmax(-1)).sum().item()
        assert row.tokens == len(answer)


def test_divergence_over_windows_counts_every_token_once(llama, monkeypatch):
    monkeypatch.setattr(reading, "AT_ONCE", 3)
    original, text = bent(llama, 0.1), " ".join(WORDS[(3 * k) % len(WORDS)] for k in range(40))
    (whole,) = quality.likelihoods(reader(llama), [text], None, reads(llama, 64, original))
    ids = torch.tensor([llama.tokenizer(text)["input_ids"]])
    q, p = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in (llama.model, original))
    expected = (p.exp() * (p - q)).sum(-1)
    assert whole.divergence == pytest.approx(expected.sum().item(), rel=1e-4)
    (parts,) = quality.likelihoods(reader(llama, max_tokens=16), [text], None, reads(llama, 40, original), 6)
    assert (parts.tokens, parts.first) == (whole.tokens, pytest.approx(expected[0].item(), rel=1e-4))


def test_a_model_that_gives_no_chance_to_what_the_original_writes_diverges_without_end():
    ours, theirs = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
    rows = [reading._likelihood(ours[n : n + 1], theirs[n : n + 1], torch.tensor([0]), True) for n in (0, 1)]
    assert [row.divergence for row in rows] == [torch.inf, pytest.approx(torch.log(torch.tensor(2.0)).item())]


@pytest.fixture
def llama(toys):
    return Bundle(Source(str(toys["llama"]), "causal-lm", "float32"), "cpu")


def test_plain_text_is_predicted_from_its_second_token(llama):
    likelihoods = quality.likelihoods(reader(llama), PROMPTS, None, reads(llama))
    assert [row.tokens for row in likelihoods] == [len(llama.tokenizer(p)["input_ids"]) - 1 for p in PROMPTS]


def plain_loop(model, ids, size, stride):
    """Negative log-likelihood and tokens over a long text, as Hugging Face's "Perplexity of fixed-length models" has it."""
    previous = count = total = 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + size, ids.shape[1])
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : previous - begin] = -100
        counted = (labels[:, 1:] != -100).sum().item()
        with torch.no_grad():
            total += model(window, labels=labels).loss.item() * counted if counted else 0
        count, previous = count + counted, end
        if end == ids.shape[1]:
            break
    return total, count


def test_long_texts_are_read_in_windows_as_hugging_face_has_it(llama):
    """Against the loop of transformers' documentation, "Perplexity of fixed-length models"."""
    texts = [" ".join(WORDS[(n * k) % len(WORDS)] for k in range(40)) for n in (3, 7)] + ["the cat sat", "dog"]
    likelihoods = quality.likelihoods(reader(llama, max_tokens=16), texts, None, reads(llama, 40), stride=6)
    for text, (nll, count, *_) in zip(texts, likelihoods, strict=True):
        ids = torch.tensor([llama.tokenizer(text)["input_ids"]])
        expected, counted = plain_loop(llama.model, ids, 16, 6)
        assert count == counted == ids.shape[1] - 1
        assert nll == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stride", [None, 6, 15, 16])
def test_a_stream_is_read_in_windows_as_hugging_face_has_it(llama, stride):
    text = "\n\n".join(" ".join(WORDS[(n * k) % len(WORDS)] for k in range(n)) for n in range(40))
    ids = torch.tensor([llama.tokenizer(text)["input_ids"]])
    expected, counted = plain_loop(llama.model, ids, 16, stride or 16)
    likelihoods, parts = quality.stream_likelihoods(reader(llama, max_tokens=16), text, reads(llama, 40), stride, None, 0)
    assert sum(row.tokens for row in likelihoods) == counted
    assert sum(row.nats for row in likelihoods) == pytest.approx(expected, rel=1e-5)
    assert [len(llama.tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts] == [row.tokens for row in likelihoods]
    assert [part.split() for part in parts[:2]] == [
        text.split()[1:16],
        text.split()[17 if stride in (None, 16) else 16 :][: int(likelihoods[1].tokens)],
    ]
    drawn, some = quality.stream_likelihoods(reader(llama, max_tokens=16), text, reads(llama, 40), stride, 7, 1)
    assert len(drawn) == 7
    rest = zip(parts, likelihoods, strict=True)
    in_order = [
        any(part == other and row == pytest.approx(whole, rel=1e-5) for other, whole in rest) for part, row in zip(some, drawn, strict=True)
    ]
    assert all(in_order)


def test_streams_that_cannot_be_read(llama):
    with pytest.raises(DataError, match=r"data\.stride: 17 is too far for windows of 16 tokens"):
        quality.stream_likelihoods(reader(llama, max_tokens=16), "the cat " * 40, reads(llama), 17, None, 0)
    with pytest.raises(DataError, match="perplexity needs texts of two tokens or more"):
        quality.stream_likelihoods(reader(llama), "", reads(llama), None, None, 0)
    unbounded = reader(llama)
    unbounded.context = None
    with pytest.raises(
        DataError, match=r"data\.join: windows are as long as the model's context, and this one has no limit; give data\.max"
    ):
        quality.stream_likelihoods(unbounded, "the cat", reads(llama), None, None, 0)


def test_windows_count_every_token_but_the_first_once():
    for length in range(1, 40):
        for stride in range(1, 8):
            counted = [token for ids, prefix in quality.windows(list(range(length)), 8, stride) for token in ids[prefix:]]
            assert counted == list(range(1, length))
    with pytest.raises(DataError, match=r"data\.stride: 8 is too far for windows of 8 tokens, which need some context; give 7 at most"):
        quality.windows([1] * 20, 8, 8)


def test_an_input_behind_examples_loses_its_start(llama):
    ids = llama.tokenizer(PROMPTS[1])["input_ids"]
    assert reader(llama, max_tokens=4, keep_end=True).read([PROMPTS[1]]) == [ids[-4:]]


def test_cut_inputs_are_counted_and_keep_their_end_token(llama):
    read = reader(llama, max_tokens=4)
    assert [len(row) for row in read.read(PROMPTS)] == [4, 4, 2, 4]
    assert read.read(PROMPTS)[1][-1] == 1
    assert len(read.cut) == 2  # the same two, read twice


def test_what_does_not_fit_the_context_is_refused_by_name(llama):
    with pytest.raises(DataError, match="64 does not fit the model's context of 64 tokens"):
        reader(llama).to_write(PROMPTS, 64)
    long = " ".join(["cat"] * 100)
    likelihoods = quality.likelihoods(reader(llama), [PROMPTS[0], long], [long, TARGETS[0]], reads(llama))
    assert [row.tokens for row in likelihoods] == [32, 4], "an overlong answer gets half of the context"


def test_chat_prompts_have_one_start_token(llama):
    words = llama.tokenizer
    words.chat_template = "</s>{{ messages[0]['content'] }} and"
    assert reader(llama, chat=True).read(["the cat"]) == [[1, *words("the cat and", add_special_tokens=False)["input_ids"]]]
    words.chat_template = None
    with pytest.raises(DataError, match=r"data\.chat: the model's tokenizer has no chat template"):
        reader(llama, chat=True)


def test_labels_are_read_as_numbers_and_names(toys):
    model = Bundle(Source(str(toys["bert"]), "sequence-classification", "float32"), "cpu").model
    assert [label_number(labels_of(model.config), text) for text in ("1", "LABEL_1")] == [1, 1]
    with pytest.raises(DataError, match="label 'good' is none of the model's: numbers below 2, or LABEL_0, LABEL_1"):
        label_number(labels_of(model.config), "good")


def test_a_label_from_logits_that_are_no_numbers_is_none(toys):
    bert = Bundle(Source(str(toys["bert"]), "sequence-classification", "float32"), "cpu")
    with torch.no_grad():
        bert.model.classifier.bias[1] = float("nan")
    assert reading.classify(bert.model, bert.tokenizer, reader(bert).read(PROMPTS), Batches(bert.model, 24, quiet)) == [None] * 4
