"""Generation configs: each field is classified, what batches give is what single prompts give, what can't be done is refused by name."""

import json
import shutil

import pytest
import torch
from transformers import GenerationConfig

import compress
from compress import decoding
from compress.engines.transformers import timing
from compress.engines.transformers.batching import Batches
from compress.engines.transformers.generation import Writer
from compress.errors import ModelError
from compress.methods import quiet
from compress.model.loading import Bundle
from compress.model.source import BUILTIN, Source
from compress.recipe import Generation
from compress.recipe import load as load_recipe
from tests.conftest import make_model, make_tokenizer, recipe_for
from tests.measuring import reader, writer

PROMPTS = ["the cat sat", "a big dog ran on the red mat and sat", "the", "dog", "dog sat a mat a mat a mat", "was it the cat the cat"]
ENDS = [1, 12, 20, 30, 41, 50]  # so that rows end at different steps
ACTING = {
    "bad_words_ids": [[5], [6, 7], [4, 5, 6]],
    "begin_suppress_tokens": list(range(3, 40)),
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 3.0,
    "exponential_decay_length_penalty": [3, 1.6],
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 1,
    "guidance_scale": 1.5,
    "min_length": 9,
    "min_new_tokens": 6,
    "no_repeat_ngram_size": 1,
    "repetition_penalty": 2.0,
    "sequence_bias": [[[5], 2.0], [[6, 7], -5.0], [[8, 9, 10], 8.0]],
    "use_cache": False,
    "watermarking_config": {"bias": 4.0, "context_width": 3},
}
LEFT_OUT = {
    "max_length": 2,
    "prompt_lookup_num_tokens": 3,
    "cache_implementation": "static",
    "prefill_chunk_size": 2,
    "output_attentions": True,
}


@pytest.fixture(scope="module")
def tokenizer():
    words = make_tokenizer()
    words.pad_token = words.eos_token  # as most chat models have it
    return words


@pytest.fixture(scope="module", params=["bart", "llama"])
def model(request):
    model = make_model(request.param).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def configured(model, **settings):
    """The model with a generation config of its special tokens and these settings."""
    special = {"bos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 1}
    model.generation_config = GenerationConfig(**{**special, "eos_token_id": ENDS, **settings})
    return model


def singly(model, tokenizer, tokens, **extra):
    """What plain transformers writes to each prompt by itself, up to its end."""
    both, rows = model.config.is_encoder_decoder, []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        ids = ids if both else ids[:, :-1]
        row = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=1, **extra
        )[0]
        row = row[1 if both else ids.shape[1] :].tolist()
        rows.append(row[: next((number for number, token in enumerate(row) if token in ENDS), len(row))])
    return rows


def in_batches(model, tokenizer, tokens, **changes):
    settings = Generation(max_new_tokens=tokens, **changes).model_dump()
    return writer(model, tokenizer, PROMPTS, settings).write(Batches(model, 10_000, quiet))


def test_every_field_of_transformers_is_classified():
    """A field that isn't is new: try it, as below, and put it into the set that it belongs to."""
    classified = decoding.FREE | decoding.FREE_BEHIND_ENCODER | decoding.WHOLE | decoding.WHOLE_BEHIND_ENCODER | decoding.EQUAL
    classified |= decoding.OVERRULED | decoding.DETAILS | decoding.REFUSED.keys()
    assert {name for name in vars(GenerationConfig()) if not name.startswith("_")} - classified == set()


@pytest.mark.parametrize("name", ACTING)
def test_a_batch_gives_what_each_prompt_gives_alone(model, tokenizer, name):
    configured(model, **{name: ACTING[name]})
    assert in_batches(model, tokenizer, 10) == singly(model, tokenizer, 10)


def test_a_text_ends_with_its_stop_string_in_a_batch_as_alone():
    bundle = Bundle(Source(str(BUILTIN), "seq2seq", "float32"), "cpu")
    prompts = [
        "Summarize:\n\nAnna: Shall we meet at six?\nTom: Yes.",
        "Anna: Hi",
        "Tom: The train to Rome is late.\nAnna: How late?\nTom: An hour.",
    ]
    bundle.model.generation_config.stop_strings = [" "]
    writer = Writer(
        bundle.model, bundle.tokenizer, reader(bundle.model, bundle.tokenizer).to_write(prompts, 12), Generation(max_new_tokens=12)
    )
    texts = writer.write(Batches(bundle.model, 10_000, quiet))
    assert all(bundle.tokenizer.decode(row).count(" ") <= 1 for row in texts)
    assert writer.recheck(texts).differ == 0


@pytest.mark.parametrize("name", ["min_length", "no_repeat_ngram_size", "encoder_repetition_penalty", "early_stopping"])
def test_beams_too(model, tokenizer, name):
    configured(model, **{name: ACTING.get(name, True)})
    assert in_batches(model, tokenizer, 8, num_beams=3) == singly(model, tokenizer, 8, num_beams=3)


def test_what_the_harness_decides_is_left_out_and_said(model, tokenizer):
    plain = singly(configured(model), tokenizer, 6)
    configured(model, **LEFT_OUT)
    assert in_batches(model, tokenizer, 6) == plain
    assert decoding.overruled(model.generation_config) == [
        "cache_implementation: static",
        "prefill_chunk_size: 2",
        "prompt_lookup_num_tokens: 3",
    ]


def test_a_field_that_nobody_knows_goes_the_safest_way():
    assert decoding.batching(GenerationConfig(), encoder=False) == "leaving"
    assert decoding.batching(GenerationConfig(min_length=0, no_repeat_ngram_size=0), encoder=False) == "leaving"
    assert decoding.batching(GenerationConfig(of_a_newer_release=3), encoder=True) == "equal"
    assert decoding.batching(GenerationConfig(exponential_decay_length_penalty=(4, 1.5)), encoder=True) == "whole"


def test_timed_generations_take_nothing_from_the_generation_config(model):
    ids = torch.arange(3, 11)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    hostile = {
        **ACTING, **LEFT_OUT, "max_time": 1e-9, "penalty_alpha": 0.6, "top_k": 4, "dola_layers": "low", "token_healing": True,
        "num_beams": 3, "num_return_sequences": 2, "encoder_no_repeat_ngram_size": 0,
    }  # fmt: skip
    configured(model, **hostile)
    steps = []
    handle = model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: steps.append(len(output)))
    told = []
    timing.generate(model, inputs, 5, timing.Told(lambda: told.append(1)))
    handle.remove()
    assert len(told) == 5
    assert steps == [1] * 5
    assert model.generation_config.max_time == 1e-9, "it is as it was"


REFUSALS = [
    ({"penalty_alpha": 0.6}, False, "penalty_alpha: 0.6: transformers loads code from the hub"),
    ({"dola_layers": "low"}, False, "dola_layers: low: transformers loads code from the hub"),
    ({"num_beam_groups": 2}, False, "num_beam_groups: 2: transformers loads code"),
    ({"force_words_ids": [[5]]}, False, "force_words_ids"),
    ({"max_time": 1}, False, "max_time: 1: a text that the clock ends"),
    ({"token_healing": True}, False, "token_healing: True"),
    ({"cache_implementation": "quantized"}, False, "cache_implementation: quantized: keys and values are held whole"),
    ({"decoder_start_token_id": [1, 2]}, False, r"decoder_start_token_id: \[1, 2\]: must be a single token"),
    ({"forced_bos_token_id": 900}, False, "forced_bos_token_id: 900 is no token of the model, which has 64"),
    ({"bad_words_ids": [[5], [6, 64]]}, False, "bad_words_ids: 64 is no token"),
    ({"eos_token_id": [64, 900]}, False, "eos_token_id: 64 is no token of the model, which has 64, so that it would never end"),
    ({"temperature": 0.0}, True, "temperature: 0.0: must be above 0 where generation.do_sample is true"),
]


@pytest.mark.parametrize(("settings", "sampled", "sentence"), REFUSALS)
def test_what_cannot_be_done_is_refused_by_key_and_file(settings, sampled, sentence):
    with pytest.raises(ModelError, match=f"^m/generation_config.json: {sentence}"):
        decoding.refuse(settings, 64, "m/generation_config.json", sampled)


def test_what_does_nothing_is_not_refused():
    idle = {"penalty_alpha": None, "num_beam_groups": 1, "token_healing": False, "eos_token_id": [1, 900], "temperature": 0.0}
    decoding.refuse(idle, 64, "m", sampled=False)


def test_a_run_refuses_it_before_the_work(toys, rows, tmp_path, write_recipe):
    folder = shutil.copytree(toys["t5"], tmp_path / "model")
    file = folder / decoding.FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_time": 5}))
    recipe = load_recipe(write_recipe(recipe_for("t5", folder, rows, stages=[{"quantize": "int8_dynamic"}])))
    with pytest.raises(ModelError, match=rf"{folder}: generation_config.json: max_time: 5: a text that the clock ends"):
        compress.run(recipe, tmp_path / "reports")
    assert not (tmp_path / "reports").exists()
    file.write_text("[]")
    with pytest.raises(ModelError, match=rf"{file}: not a JSON object"):
        compress.run(recipe, tmp_path / "reports")
