"""Examples as methods see them: their tokens, what is cut and left out, and the batches they go in."""

import pytest
import torch
from transformers import BartConfig, BartForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from compress.calibration.stream import BATCH_TOKENS, batches, encoded
from compress.errors import DataError, ModelError
from compress.methods import Example
from tests.blocks import bundle, context, examples


def test_a_decoders_target_ends_with_the_end_token(toys):
    """Else a model trained on it would never learn to stop."""
    original = bundle(toys["llama"], "llama")
    for example, ids, answer in encoded(original.model, original.tokenizer, context()):
        expected = [*original.tokenizer(example.references[0], add_special_tokens=False).input_ids, original.tokenizer.eos_token_id]
        assert answer == expected
        assert ids[-len(answer) :] == answer


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_what_was_cut_or_left_out_is_said_once(toys, kind):
    original, told = bundle(toys[kind], kind), context(max_tokens=6)
    told.examples.append(Example("empty", "", [""] if kind == "llama" else ["dog"]))
    cut = 0
    for example in told.examples:
        prompt, target = (
            len(original.tokenizer(text, add_special_tokens=False).input_ids) for text in (example.prompt, example.references[0])
        )
        cut += prompt + target + (target > 0) > 6 if kind == "llama" else prompt + 1 > 6 or target + 1 > 5
    for _ in range(2):
        encoded(original.model, original.tokenizer, told)
    assert told.said == [
        f"{cut} of the 7 examples were longer than 6 tokens and were cut at an end",
        "1 of the 7 examples had fewer than two tokens and were left out",
    ]


def test_a_chat_without_a_template_is_refused(toys):
    original = bundle(toys["llama"], "llama")
    with pytest.raises(DataError, match="the model's tokenizer has no chat template"):
        encoded(original.model, original.tokenizer, context(chat=True))


def test_an_encoder_decoder_that_classifies_is_refused_with_the_way_out(toys):
    original = bundle(toys["bart"], "bart")
    config = BartConfig(**{**original.model.config.to_dict(), "num_labels": 2})
    with pytest.raises(ModelError, match="an encoder-decoder that classifies can't be shown examples here"):
        encoded(BartForSequenceClassification(config), original.tokenizer, context())


def test_a_decoder_that_classifies_is_told_what_padding_is(toys):
    original = bundle(toys["gpt2"], "gpt2")
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=2)).eval()
    told = context(examples=examples(label=True))
    with torch.no_grad():
        for inputs in batches(model, original.tokenizer, told):
            assert model(**inputs).logits.shape == (6, 2)


@pytest.mark.parametrize("side", ["prompt", "target"])
def test_batches_are_as_large_as_their_longer_side_allows(toys, side):
    long, short = " ".join(["cat"] * 40), "cat sat"
    told = context(max_tokens=64)
    told.examples[:] = [Example(str(n), *((long, [short]) if side == "prompt" else (short, [long]))) for n in range(200)]
    original = bundle(toys["t5"], "t5")
    groups = batches(original.model, original.tokenizer, told)
    assert sum(len(inputs["input_ids"]) for inputs in groups) == 200
    sizes = [inputs["input_ids"].shape[0] * max(inputs["input_ids"].shape[1], inputs["decoder_input_ids"].shape[1]) for inputs in groups]
    assert 0.8 * BATCH_TOKENS < max(sizes) <= BATCH_TOKENS
