"""What is written in batches against plain transformers, one example at a time; sampling against its distribution; memory that runs out."""

from collections import Counter

import pytest
import torch
import transformers
from scipy import stats
from transformers import BitsAndBytesConfig, GenerationConfig

from compress.engines.transformers import generation
from compress.engines.transformers.batching import Batches
from compress.engines.transformers.generation import GumbelNoise
from compress.engines.transformers.work import cache_bytes
from compress.errors import RunError
from compress.methods import Context, quiet
from compress.model.loading import Bundle
from compress.model.source import Source
from compress.quantize import int8_dynamic
from compress.recipe import Generation
from compress.runtime import use_cpu_int8
from tests import measuring
from tests.conftest import make_tokenizer

PROMPTS = ["the cat sat", "a big dog ran on the red mat and sat", "the", "blue hat on a small mat was it"]
GREEDY = Generation(max_new_tokens=8).model_dump()
SAMPLED = Generation(max_new_tokens=8, do_sample=True, temperature=0.7, top_k=20, top_p=0.9, seed=3).model_dump()


def writer(bundle, settings, prompts=PROMPTS):
    return measuring.writer(bundle.model, bundle.tokenizer, prompts, settings)


def test_batches_give_the_same_tokens_as_one_at_a_time(random_bundle):
    model, words, both = random_bundle.model, random_bundle.tokenizer, random_bundle.model.config.is_encoder_decoder
    outputs = writer(random_bundle, GREEDY).write(Batches(model, 48, quiet))
    assert len({tuple(tokens) for tokens in outputs}) > 1, "prompts matter"
    for prompt, tokens in zip(PROMPTS, outputs, strict=True):
        ids = words(prompt)["input_ids"]
        ids = torch.tensor([ids if both else ids[:-1]])  # a decoder goes on from the prompt, not from its end token
        single = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
        assert len(tokens) == 8
        assert tokens == single[1 if both else ids.shape[1] :].tolist()


def test_draws_do_not_depend_on_the_batches(random_bundle):
    model, prompts = random_bundle.model, PROMPTS + PROMPTS[:2]
    outputs = [writer(random_bundle, SAMPLED, prompts).write(Batches(model, tokens, quiet)) for tokens in (1, 40, 1000)]
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0][:2] != outputs[0][4:], "each example has draws of its own, also of the same prompt"
    other = writer(random_bundle, {**SAMPLED, "seed": 4}, prompts).write(Batches(model, 1000, quiet))
    assert other != outputs[0]
    assert writer(random_bundle, SAMPLED, prompts).recheck(outputs[0]).differ == 0


def test_rows_that_have_ended_leave_their_batch_and_the_others_go_on(random_bundle):
    """An end token cuts what would be written without one, since draws depend on example and position alone; fewer rows are computed."""
    model, prompts, computed = random_bundle.model, PROMPTS * 3, []
    settings = {**SAMPLED, "max_new_tokens": 20, "temperature": 8.0, "top_k": None, "top_p": None}
    model.generation_config.eos_token_id = None
    whole = writer(random_bundle, settings, prompts).write(Batches(model, 1, quiet))
    end = Counter(token for tokens in whole for token in set(tokens)).most_common(1)[0][0]
    model.generation_config.eos_token_id = end
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: computed.append(len(output)))
    outputs = writer(random_bundle, settings, prompts).write(Batches(model, 10_000, quiet))
    handle.remove()
    assert outputs == [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in whole]
    assert len({len(tokens) for tokens in outputs}) > 3
    assert sum(computed) < 0.9 * len(prompts) * len(computed)
    assert computed == sorted(computed, reverse=True)


@pytest.mark.parametrize("name", ["Lfm2ForCausalLM", "MambaForCausalLM", "Qwen3NextForCausalLM"])
def test_rows_leave_a_batch_whose_cache_holds_states_in_place_of_keys(name):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    hybrid = {"layer_types": ["linear_attention" if "Next" in name else "conv", "full_attention"]} if "Mamba" not in name else {}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16} if "Mamba" not in name else {}
    experts = {"num_experts": 2, "num_experts_per_tok": 1} if "Next" in name else {}
    config = kind.config_class(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        pad_token_id=0,
        eos_token_id=1,
        **hybrid,
        **heads,
        **experts,
    )
    model, words = kind(config).eval(), make_tokenizer()
    settings = {**SAMPLED, "max_new_tokens": 12, "temperature": 8.0, "top_k": None, "top_p": None}
    model.generation_config.eos_token_id = list(range(1, 12))

    def written(tokens):
        return measuring.writer(model, words, PROMPTS * 3, settings).write(Batches(model, tokens, quiet))

    single, together = written(1), written(10_000)
    assert len({len(tokens) for tokens in single}) > 3
    assert together == single
    cache = model(torch.arange(2, 10)[None], use_cache=True).past_key_values
    states = [
        state
        for layer in cache.layers
        for state in [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    ]
    assert cache_bytes(cache) >= sum(state.nbytes for state in states if state is not None) > 0


def test_a_fewest_number_of_tokens_counts_from_the_prompt(random_bundle):
    """transformers counts min_new_tokens from where a continuation begins."""
    model, prompts = random_bundle.model, PROMPTS * 3
    settings = {**SAMPLED, "max_new_tokens": 12, "temperature": 8.0, "top_k": None, "top_p": None}
    model.generation_config.min_new_tokens = 5
    outputs = writer(random_bundle, settings, prompts).write(Batches(model, 10_000, quiet))
    assert outputs == writer(random_bundle, settings, prompts).write(Batches(model, 1, quiet))


def test_the_encoder_keeps_nothing_for_gradients(random_bundle, monkeypatch):
    model = random_bundle.model
    if not model.config.is_encoder_decoder:
        pytest.skip("it has no encoder")
    kept = []
    handle = model.get_encoder().register_forward_hook(lambda module, inputs, output: kept.append(output[0].requires_grad))
    writer(random_bundle, GREEDY).write(Batches(model, 1000, quiet))
    handle.remove()
    assert kept == [False]


@pytest.mark.parametrize("tokens", [1, 12, 1000])
def test_an_encoder_is_given_a_few_rows_at_a_time(random_bundle, monkeypatch, tokens):
    if not random_bundle.model.config.is_encoder_decoder:
        pytest.skip("it has no encoder")
    writing = writer(random_bundle, GREEDY)
    inputs, _ = writing._inputs([1, 3, 0, 2])
    assert inputs["attention_mask"].sum(dim=1).tolist() == [11, 9, 4, 2]
    with torch.inference_mode():
        whole = random_bundle.model.get_encoder()(**inputs).last_hidden_state
    calls = []

    def note(module, inputs, named, output):
        calls.append(named["input_ids"].shape)

    handle = random_bundle.model.get_encoder().register_forward_hook(note, with_kwargs=True)
    monkeypatch.setattr(generation, "ENCODED", tokens)
    states = writing._encode(inputs)
    handle.remove()
    real = inputs["attention_mask"].bool()
    assert states.shape == whole.shape
    torch.testing.assert_close(states[real], whole[real])
    assert sum(rows for rows, _ in calls) == len(PROMPTS)
    assert all(rows == 1 or rows * longest <= tokens for rows, longest in calls)
    assert len(calls) == {1: 4, 12: 3, 1000: 1}[tokens]


def test_noise_makes_draws_from_the_distribution():
    """Counts of 4,000 draws against the softmax, by a chi-squared test."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    drawn = torch.zeros(5)
    for position in range(4):
        noise = GumbelNoise(0, list(range(1000)), 1)
        drawn += noise(torch.zeros(1000, 1 + position), logits.expand(1000, 5)).argmax(1).bincount(minlength=5)
    assert stats.chisquare(drawn.numpy(), (4000 * logits.softmax(0)).numpy()).pvalue > 0.01


def test_draws_are_bent_as_transformers_bends_them(random_bundle):
    """The tokens that the settings leave, and no others, are drawn; what a recipe leaves out is the model's own generation config's."""
    model = random_bundle.model
    model.generation_config.suppress_tokens = None
    model.generation_config.top_k = 2
    asked = {**SAMPLED, "max_new_tokens": 1, "temperature": None, "top_k": None, "top_p": None}
    drawn = {tokens[0] if tokens else 1 for tokens in writer(random_bundle, asked, [PROMPTS[1]] * 60).write(Batches(model, 4000, quiet))}
    ids = random_bundle.tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    if model.config.is_encoder_decoder:
        logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[model.config.decoder_start_token_id]])).logits[0, -1]
    else:
        logits = model(input_ids=ids[:, :-1]).logits[0, -1]
    assert drawn <= set(logits.topk(2).indices.tolist()) | {1}
    assert isinstance(model.generation_config, GenerationConfig)


def test_a_batch_that_finds_no_memory_is_halved():
    done, sizes = [], []

    def work(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        done.extend(batch)

    batches = Batches(None, 100, quiet)
    batches.each([10] * 10, work, "working")
    assert (sizes, sorted(done), batches.halved, batches.tokens) == ([10, 5, 2, 2, 2, 2, 2], list(range(10)), 2, 20)
    with pytest.raises(RuntimeError, match="can't allocate"):
        Batches(None, 1, quiet).each([5], lambda batch: (_ for _ in ()).throw(RuntimeError("can't allocate memory")), "working")


def test_batches_hold_tokens_and_not_rows():
    seen = []
    Batches(None, 100, quiet).each([10, 90, 50, 30, 30, 200], seen.append, "working")
    assert seen == [[5], [1], [2, 3], [4, 0]]


def test_outputs_that_change_alone_are_counted_and_ties_told_from_others(random_bundle):
    model = random_bundle.model
    writing = writer(random_bundle, GREEDY)
    outputs = writing.write(Batches(model, 1000, quiet))
    assert writing.recheck(outputs).sentence == "4 examples were done once more, each alone: all came out as in their batch"
    other = (outputs[1][3] + 1) % 64
    changed = [outputs[0], [*outputs[1][:3], other, *outputs[1][4:]], outputs[2][:5], outputs[3]]
    with pytest.raises(
        RunError,
        match=r"example 2 of those drawn .* its token 4 is .* Of 4 examples that were checked 2 do so, .*quality_batch_tokens: 1 every example",
    ):
        writing.recheck(changed)
    head, first = model.get_output_embeddings().weight, outputs[0][0]
    twin = 40 if first != 40 else 41
    with torch.no_grad():  # two tokens with the same logits
        head[twin] = head[first]
    outputs = writing.write(Batches(model, 1000, quiet))
    other = ({first, twin} - {outputs[0][0]}).pop()
    recheck = writing.recheck([[other, *outputs[0][1:]], *outputs[1:]])
    assert (recheck.differ, recheck.ties) == (1, 1)


def test_an_example_that_a_look_confirms_is_not_written_again(random_bundle, monkeypatch):
    """The look is at all tokens and at the end behind them; where another token is added to a score, it isn't the model's own."""
    model = random_bundle.model
    model.generation_config.suppress_tokens = None
    free = writer(random_bundle, GREEDY).write(Batches(model, 1000, quiet))
    place, ended, end = max((row.index(token), example, token) for example, row in enumerate(free) for token in row)
    model.generation_config.eos_token_id = [1, end]
    writing = writer(random_bundle, GREEDY)
    outputs = writing.write(Batches(model, 1000, quiet))
    assert place > 0
    assert outputs[ended] == free[ended][:place]
    written, own = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: written.append(inputs["input_ids"]) or own(**inputs))
    assert (writing.recheck(outputs).differ, len(written)) == (0, 0)
    for wrong in (outputs[ended][:-1], [*outputs[ended], 5]):
        written.clear()
        with pytest.raises(RunError, match=f"example {ended + 1} of those drawn comes out otherwise"):
            writing.recheck([*outputs[:ended], wrong, *outputs[ended + 1 :]])
        assert len(written) == 1
    for changes in ({"repetition_penalty": 1.3}, {"num_beams": 2}, {"do_sample": True, "top_k": 3}):
        written.clear()
        writer(random_bundle, {**GREEDY, **changes}).recheck(writer(random_bundle, {**GREEDY, **changes}).write(Batches(model, 1, quiet)))
        assert len(written) == 8, "four in batches of one, and four alone"


def test_what_differs_for_a_reason_that_is_known_is_said_and_ends_nothing(toys):
    bundle = Bundle(Source(str(toys["llama"]), "causal-lm", "float32"), "cpu")
    bundle.model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    wrote = writer(bundle, GREEDY)
    outputs = [[(token + 1) % 64 for token in tokens] for tokens in wrote.write(Batches(bundle.model, 1000, quiet))]
    assert "4 came out otherwise than in their batch" in (sentence := wrote.recheck(outputs).sentence)
    assert sentence.endswith(
        "bitsandbytes holds a column in 16 bits when any input of a batch has an outlier there, so what is served together matters"
    )


def test_layers_that_round_their_inputs_make_steps_of_what_a_batch_differs_by(toys):
    """As with SmolLM2 in bfloat16 and int8: scores 0.5 apart where the model's own noise is 0.06."""
    plain = Bundle(Source(str(toys["llama"]), "causal-lm", "float32"), "cpu")
    bundle = int8_dynamic.apply(plain, int8_dynamic.Settings(), Context(device="cpu", progress=quiet))
    wrote = writer(bundle, GREEDY)
    outputs = wrote.write(Batches(bundle.model, 1000, quiet))
    assert "round" not in wrote.recheck(outputs).sentence
    changed = [[(token + 1) % 64 for token in tokens] for tokens in outputs]
    assert wrote.recheck(changed).sentence.endswith(
        "its layers round their inputs, which makes whole steps of what sums of a batch differ by"
    )
    use_cpu_int8(bundle.model)
    assert wrote.recheck(changed).differ == 4


def test_beams_that_differ_are_counted(toys):
    bundle = Bundle(Source(str(toys["llama"]), "causal-lm", "float32"), "cpu")
    wrote = writer(bundle, {**GREEDY, "num_beams": 2})
    outputs = wrote.write(Batches(bundle.model, 1000, quiet))
    assert wrote.recheck(outputs).differ == 0
    assert wrote.recheck([[5, 5, 5], *outputs[1:]]).sentence.endswith("each alone: 1 came out otherwise than in their batch")
