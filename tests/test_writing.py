"""What models write, against one token at a time without padding, batches or cache."""

import pytest
import torch

from compress import writing
from compress.errors import ModelError
from tests.blocks import bundle, examples
from tests.distill.pairs import speaker

GENERATIVE = ("t5", "bart", "llama", "gpt2")


def step_by_step(model, prompt, most):
    """Greedy tokens, the end token with them."""
    both, tokens = model.config.is_encoder_decoder, []
    while len(tokens) < most and (not tokens or tokens[-1] != 1):
        if both:
            inputs = {
                "input_ids": torch.tensor([prompt]),
                "decoder_input_ids": torch.tensor([[model.config.decoder_start_token_id, *tokens]]),
            }
        else:
            inputs = {"input_ids": torch.tensor([[*prompt, *tokens]])}
        with torch.no_grad():
            tokens.append(int(model(**inputs).logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("kind", GENERATIVE)
def test_what_is_written_is_what_one_token_at_a_time_gives(tmp_path, kind):
    bundled = bundle(speaker(kind, tmp_path), kind)
    prompts = [bundled.tokenizer(example.prompt, add_special_tokens=False).input_ids for example in examples()]
    model = bundled.model.train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.9
    rows = writing.write(model, prompts, 6, 1, None)
    assert model.training, "as it was"
    model.eval()
    assert rows == [step_by_step(model, prompt, 6) for prompt in prompts]
    assert len({tuple(row) for row in rows}) > 1


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_it_ends_with_the_end_token(tmp_path, kind):
    bundled = bundle(speaker(kind, tmp_path), kind)
    with torch.no_grad():
        bundled.model.get_output_embeddings().weight[1] = 0.5  # the end token is likely, but not the likeliest everywhere
    torch.manual_seed(0)
    rows = writing.write(bundled.model, [[5, 6], [7, 8, 9]] * 20, 12, 1, 1.5)
    ended = [row for row in rows if row[-1] == 1]
    assert len(ended) > 0
    assert all(1 not in row[:-1] for row in rows)
    assert all(len(row) == 12 for row in rows if row not in ended)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_samples_follow_the_models_own_distribution(tmp_path, kind):
    bundled = bundle(speaker(kind, tmp_path), kind)
    bundled.model.generation_config.top_k = 2  # a model's own narrowing doesn't count
    bundled.model.generation_config.repetition_penalty = 3.0
    torch.manual_seed(0)
    prompt = [5, 6, 7]
    tokens = torch.tensor([row[0] for row in writing.write(bundled.model, [prompt] * 4000, 1, 1, 0.5)])
    start = {"decoder_input_ids": torch.tensor([[bundled.model.config.decoder_start_token_id]])} if kind == "t5" else {}
    with torch.no_grad():
        expected = (bundled.model(input_ids=torch.tensor([prompt]), **start).logits[0, -1].double() / 0.5).softmax(-1)
    shares = torch.bincount(tokens, minlength=23).double() / 4000
    assert (shares - expected).abs().max() < 5 * (expected.max() / 4000).sqrt()
    assert int((shares > 0).sum()) > 2


@pytest.mark.parametrize(("kind", "ids", "answer", "expected"), [
    ("llama", [5, 6, 7, 8], [7, 8], [5, 6]), ("llama", [5, 6, 1], [], [5, 6]), ("t5", [5, 6, 1], [7, 1], [5, 6, 1]),
])  # fmt: skip
def test_the_prompt_of_an_example(toys, kind, ids, answer, expected):
    assert writing.prompt_of(bundle(toys[kind], kind).model, (examples(1)[0], ids, answer)) == expected


def test_a_classifier_does_not_write(toys):
    with pytest.raises(ModelError, match="a classifier writes no text to learn from; `distill: logits` is for classifiers"):
        writing.writer(bundle(toys["bert"], "bert"))
