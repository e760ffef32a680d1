"""llama.cpp as an engine, against transformers on the same weights: what it writes, how likely it finds texts, what it refuses."""

import ctypes
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.engines import Opening, Piece, llama_cpp
from compress.errors import ModelError
from compress.export import gguf
from compress.methods import quiet
from compress.model.loading import Bundle
from compress.model.source import Source
from compress.quantize import rtn
from compress.recipe import Generation, Runtime
from tests.blocks import context
from tests.decoders import decoder

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
PROMPTS = [[(5 + 31 * row + 7 * place) % 300 for place in range(9 + 4 * row)] for row in range(3)]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
KINDS = {
    "llama": {"kind": "llama"},
    "llama3": {"kind": "llama", "rope_parameters": LLAMA3, "tie_word_embeddings": False, "attention_bias": True},
    "linear": {"kind": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, "mlp_bias": True},
    "mistral": {"kind": "mistral", "tie_word_embeddings": False},
    "qwen2": {"kind": "qwen2", "head_dim": 16},
    "qwen3": {"kind": "qwen3"},
}


def exported(folder, target, **settings):
    target.mkdir()
    gguf.apply(Bundle(Source(str(folder), "causal-lm"), "cpu"), gguf.Settings(**settings), context()).save(target)
    return target


def opened(folder, cache="f32", threads=1, tokens=None):
    opening = Opening(Source(str(folder), "causal-lm"), "cpu", threads, Runtime(), llama_cpp.Settings(cache=cache))
    engine = llama_cpp.make(opening, tokens)
    engine.open()
    return engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("llama")
    return decoder(place / "model"), exported(place / "model", place / "made", weights="f32")


@pytest.fixture(scope="module")
def engine(folder):
    return opened(folder[1])


def nats(model, ids, labels):
    """What transformers makes of a text, float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum", ignore_index=-100).item()


def continued(model, prompt, count):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", KINDS)
def test_float32_is_what_transformers_computes(name, tmp_path):
    folder = decoder(tmp_path / "model", **KINDS[name])
    model, engine = AutoModelForCausalLM.from_pretrained(folder), opened(exported(folder, tmp_path / "made", weights="f32"))
    engine.traits = replace(engine.traits, ends=frozenset())  # so that all go as far
    written = engine.write(PROMPTS, Generation(max_new_tokens=12), quiet).tokens
    assert written == [continued(model, prompt, 12) for prompt in PROMPTS]
    long = [(3 + 11 * place * place) % 300 for place in range(200)]
    (read,) = engine.read([Piece(0, long, long)], quiet)
    assert read.nats == pytest.approx(nats(model, long, long), rel=1e-5)


def test_likelihoods_count_the_labels_alone(folder, engine):
    model = AutoModelForCausalLM.from_pretrained(folder[0])
    long = [(3 + 11 * place * place) % 300 for place in range(255)]
    pieces = [
        Piece(n, ids, [-100] * skipped + ids[skipped:]) for n, (ids, skipped) in enumerate(((long, 40), (PROMPTS[1], 5), ([7, 8], 2)))
    ]
    likelihoods = engine.read(pieces, quiet)
    assert [likelihood.tokens for likelihood in likelihoods] == [215, 8, 0]
    assert [likelihood.nats for likelihood in likelihoods] == pytest.approx(
        [*(nats(model, p.ids, p.labels) for p in pieces[:2]), 0], rel=1e-5
    )


def test_run_writes_so_many_tokens_whatever_ends_a_text(folder, engine):
    model = AutoModelForCausalLM.from_pretrained(folder[0])
    prompts = [prompt[:9] for prompt in PROMPTS]
    expected = [continued(model, prompt, 6) for prompt in prompts]
    steps = []
    decoded = engine._decode
    engine._decode = lambda rows: steps.append(len(rows)) or decoded(rows)
    for _ in range(2):  # nothing is kept from one call to the next
        engine.run(engine.prepare(prompts), 6, lambda: steps.append("watched"))
    del engine._decode
    assert steps == [27, "watched", *[3, "watched"] * 5] * 2
    assert engine._search(prompts, 6, frozenset(), lambda: None) == expected
    ends = frozenset({expected[0][2]})
    cut = [row[: min([row.index(end) for end in ends if end in row], default=6)] for row in expected]
    assert engine._search(prompts, 6, ends, lambda: None) == cut
    assert len(cut[0]) <= 2


def test_many_prompts_are_answered_as_each_alone(folder, engine):
    single = [engine.write([prompt], Generation(max_new_tokens=5), quiet).tokens[0] for prompt in PROMPTS]
    many = opened(folder[1], tokens=30)
    assert many.write(PROMPTS * 30, Generation(max_new_tokens=5), quiet).tokens == single * 30


def test_integers_are_multiplied_as_they_are_stored(tmp_path):
    """But for inputs that are rounded to 8 bits, it computes what transformers does with the unpacked weights."""
    folder = decoder(tmp_path / "model")
    settings = rtn.Settings(group_size=32, symmetric=True)
    rtn.apply(Bundle(Source(str(folder), "causal-lm"), "cpu"), settings, context()).save(tmp_path / "packed")
    model, engine = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed"),
        opened(exported(tmp_path / "packed", tmp_path / "made"), "f16"),
    )
    (read,) = engine.read([Piece(0, PROMPTS[2], PROMPTS[2])], quiet)
    assert engine.traits.dtype == "q4_0"
    assert read.nats == pytest.approx(nats(model, PROMPTS[2], PROMPTS[2]), rel=0.02)
    held = engine.weights()
    assert held.parameters == sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())
    layers = 2 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 128)
    assert held.weight_bytes == layers * 18 // 32 + 2 * 64 * 384 + 4 * 5 * 64


@pytest.mark.parametrize("split", ["gpt2", "digits", "qwen2", "llama3", "sentencepiece"])
def test_its_own_tokenizer_gives_the_same_tokens(split, tmp_path):
    """Whoever serves the file elsewhere hands it texts."""
    folder = decoder(tmp_path / "model", split=split)
    engine, own = opened(exported(folder, tmp_path / "made")), AutoTokenizer.from_pretrained(folder)
    library, room = engine._library, (ctypes.c_int32 * 256)()
    library.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    for text in (
        "the cat sat on that tat",
        "Hello, hello: don't they'll 1984 12345",
        "caf\u00e9 \u4f60\u597d!\n\n  it's\ta  cat ",
        "the</s>",
    ):
        data = text.encode()
        count = library.llama_tokenize(library.llama_model_get_vocab(engine._model), data, len(data), room, 256, True, True)
        assert room[:count] == own(text).input_ids, text


def test_what_it_doesnt_do_is_refused(folder, engine, tmp_path):
    for settings, named in (
        ({"do_sample": True}, "generation.do_sample"),
        ({"num_beams": 2}, "generation.num_beams: 2"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
    ):
        with pytest.raises(ModelError, match=named):
            engine.write(PROMPTS, Generation(**settings), quiet)
    with pytest.raises(ModelError, match="is not in the format that it opens, which `export: gguf` writes"):
        opened(folder[0])
    broken = exported(folder[0], tmp_path / "broken")
    (broken / "model.gguf").write_bytes((broken / "model.gguf").read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"model\.gguf: .*file bounds"):
        opened(broken)
    own = json.loads((folder[1] / "generation_config.json").read_text())
    strict = exported(folder[0], tmp_path / "strict", weights="f32")
    (strict / "generation_config.json").write_text(json.dumps({**own, "no_repeat_ngram_size": 3}))
    with pytest.raises(ModelError, match="no_repeat_ngram_size isn't supported"):
        opened(strict).write(PROMPTS, Generation(), quiet)


def test_another_library_than_the_known_one_is_refused(monkeypatch):
    """The one here has every function, and structures as they are declared; where it hasn't, no call is made."""
    llama_cpp.library.cache_clear()
    llama_cpp.library()
    for name, value in (("SIGNATURES", {**llama_cpp.SIGNATURES, "llama_gone": (None, [])}), ("DEFAULTS", (512, 2048, 512, 2))):
        llama_cpp.library.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(llama_cpp, name, value)
            with pytest.raises(ModelError, match=r"this xllamacpp has .*install xllamacpp 20"):
                llama_cpp.library()
    llama_cpp.library.cache_clear()
