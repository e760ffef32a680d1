"""Learned rounding where there is little to learn from."""

from compress.model import load_model
from compress.quantize import autoround, gptq
from tests.blocks import bundle, context, lively, saved


def weight(made, folder, method, seen, **settings):
    """Of the first layer, as it is read."""
    method.apply(made, method.Settings(bits=3, group_size=32, **settings), seen).save(folder)
    model = load_model(bundle(folder, "llama").source, "cpu")
    return model.model.layers[0].self_attn.q_proj.weight.detach()


def test_a_few_steps_turn_few_roundings(tmp_path):
    """Steps of a whole rounding each would turn most of them, by the sign of whatever noise there is."""
    model = lively("llama", lambda config: setattr(config, "intermediate_size", 160))
    made, seen = bundle(saved(model, tmp_path / "toy"), "llama"), context()
    original = made.model.model.layers[0].self_attn.q_proj.weight.detach()
    start, learned = weight(made, tmp_path / "start", gptq, seen), weight(made, tmp_path / "learned", autoround, seen, steps=3)
    assert 0 < (learned - start).norm() < 0.8 * (start - original).norm()


def test_examples_too_few_for_the_layers_are_said(tmp_path):
    made, seen = bundle(saved(lively("llama"), tmp_path / "toy"), "llama"), context()
    tokens = sum(len(made.tokenizer(example.prompt).input_ids) + 1 + len(example.references[0].split()) for example in seen.examples)
    assert tokens < 172, "the width of its widest layer"
    gptq.apply(made, gptq.Settings(), seen)
    assert any("tokens, fewer than the 172 inputs of its widest layer" in sentence for sentence in seen.said)
