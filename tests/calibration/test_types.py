"""The calibration pass on one small random model of each kind: it shows layers what a plain forward pass does, or says that it can't."""

import pytest
import torch

from compress.calibration.stream import batches
from compress.errors import ModelError
from compress.methods import LayerSettings
from compress.model.loading import Bundle
from compress.model.source import Source
from compress.quantize import rtn
from compress.quantize._calibrated import quantise
from compress.quantize._pack import Packed
from compress.structure import block_stacks
from tests.architectures import ALL, CLASSIFIERS, made, task_of
from tests.blocks import context, examples
from tests.calibration.test_walk import assert_same_moments, one_by_one
from tests.mixtures import MIXTURES

REFUSED = {
    "LEDForConditionalGeneration": r"has hidden states of \(6, 24, 64\) for tokens of \(6, 17\)",
    "ProphetNetForConditionalGeneration": r"has hidden states of \(1, 18, 64\) for tokens of \(1, 6\)",
    "LongformerForSequenceClassification": r"has hidden states of \(6, 24, 64\)",
    "DebertaV2ForSequenceClassification": "changes the hidden states between its blocks 0 and 1",  # with a convolution
    "AlbertForSequenceClassification": "runs its 1 blocks more than once",
}
CONVOLUTION = {"conv_kernel_size": 3, "conv_act": "gelu"}
GPT2 = ("GPT2LMHeadModel",)  # has other layers in the pass, which tests/calibration/test_weights.py compares
FOLLOWED = [name for name in ALL if name not in {*MIXTURES, *GPT2, *REFUSED.keys() - {"DebertaV2ForSequenceClassification"}}]


def shown(name, folder, **changes):
    label = name in CLASSIFIERS
    bundle = Bundle(Source(str(made(name, folder, **changes)), task_of(name), "float32"), "cpu")
    return bundle, context(examples=examples(label=label))


def states_before_blocks(bundle, told):
    """The hidden states that each block of the whole model is given in plain forward passes, batch by batch."""
    model, received = bundle.model, {}
    for stack, blocks in block_stacks(model).items():
        for index, block in enumerate(blocks):
            states = received[f"{stack}.{index}"] = []
            hook = lambda _, args, kwargs, states=states: states.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
            block.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for inputs in batches(model, bundle.tokenizer, told):
            model(**inputs)
    return received


@pytest.mark.parametrize("name", [name for name in ALL if name not in {*GPT2, *REFUSED.keys() - {"DebertaV2ForSequenceClassification"}}])
def test_blocks_are_given_the_states_of_a_forward_pass(name, tmp_path):
    bundle, told = shown(name, tmp_path)
    expected, seen = states_before_blocks(bundle, told), 0

    def look(block):
        nonlocal seen
        for states, real, right in zip(block.given.hidden, block.given.real, expected[block.name], strict=True):
            error = (states - right)[real].norm() / right[real].norm()
            assert error <= 1e-5, block.name
            seen += 1
        block.layers.clear()

    with pytest.raises(Exception, match="every layer was left out"):
        quantise(bundle, LayerSettings(), told, Packed, look)
    assert seen >= 2


@pytest.mark.parametrize("name", FOLLOWED)
def test_layers_are_shown_what_a_forward_pass_gives_them(name, tmp_path):
    bundle, told = shown(name, tmp_path)
    expected, seen = one_by_one(bundle, told), set()

    def look(block):
        for layer in block.layers:
            # one that isn't called gets nothing; Switch's experts are given padding, which these moments count; DeBERTa's are positions'
            if layer in expected and ".experts." not in layer and ".pos_" not in layer:
                assert_same_moments(block, layer, expected[layer])
                seen.add(layer)
        block.layers.clear()

    with pytest.raises(Exception, match="every layer was left out"):
        quantise(bundle, LayerSettings(), told, Packed, look)
    assert len(seen) >= 6


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_and_rounded_without(name, tmp_path):
    bundle, told = shown(name, tmp_path, **(CONVOLUTION if name.startswith("Deberta") else {}))
    with pytest.raises(ModelError, match=f"{name} {REFUSED[name]}.*, which calibration block by block can't follow"):
        quantise(bundle, LayerSettings(), told, Packed, lambda block: None)
    rtn.apply(bundle, rtn.Settings(bits=8), told)
    assert any(sentence.startswith(f"what its layers lost wasn't measured: {name}") for sentence in told.said)
    assert any(layer["bits"] == 8 for layer in told.layers)
