"""Which scales can be folded where, and that folding changes nothing but what the layers are given."""

import pytest
import torch

from compress.calibration.inputs import in_order, inputs
from compress.quantize._fold import fold_before
from tests.blocks import bundle, lively, saved, visit

T5_SELF = {
    "layer.0.SelfAttention.k+q+v": "layer.0.layer_norm",
    "layer.0.SelfAttention.o": "layer.0.SelfAttention.v",
}
BART = {  # norms feed the residuals too
    "self_attn.k_proj+q_proj+v_proj": None,
    "self_attn.out_proj": "self_attn.v_proj",
    "fc1": None,
}
# what can be folded to, by the layers of a block
FOLDS = {
    "llama": {
        "self_attn.k_proj+q_proj+v_proj": "input_layernorm",
        "self_attn.o_proj": None,  # two query heads share a value head
        "mlp.gate_proj+up_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.up_proj",
    },
    "t5 encoder": {
        **T5_SELF,
        "layer.1.DenseReluDense.wi_0+wi_1": "layer.1.layer_norm",
        "layer.1.DenseReluDense.wo": "layer.1.DenseReluDense.wi_1",
    },
    "t5 decoder": {
        **T5_SELF,
        "layer.1.EncDecAttention.q": "layer.1.layer_norm",
        "layer.1.EncDecAttention.k+v": None,  # the encoder's states
        "layer.1.EncDecAttention.o": "layer.1.EncDecAttention.v",
        "layer.2.DenseReluDense.wi_0+wi_1": "layer.2.layer_norm",
        "layer.2.DenseReluDense.wo": "layer.2.DenseReluDense.wi_1",
    },
    "bart encoder": {**BART, "fc2": None},
    "bart decoder": {
        **BART,
        "encoder_attn.q_proj": None,
        "encoder_attn.k_proj+v_proj": None,
        "encoder_attn.out_proj": "encoder_attn.v_proj",
        "fc2": None,
    },
    "gpt2": {
        "attn.c_attn": "ln_1",
        "attn.c_proj": None,  # values come out of a layer three times as wide
        "mlp.c_fc": "ln_2",
        "mlp.c_proj": None,  # GELU
    },
}


def all_value_heads(config):
    config.num_key_value_heads = config.num_attention_heads


def relu(config):
    if config.model_type == "t5":
        config.feed_forward_proj, config.dense_act_fn, config.is_gated_act = "relu", "relu", False
    else:
        config.activation_function = "relu"


CHANGES = {"llama with all value heads": ("llama", all_value_heads), "bart with relu": ("bart", relu), "t5 with relu": ("t5", relu)}
CASES = ["llama", "t5", "bart", "gpt2", *CHANGES]


@pytest.fixture(scope="module")
def lively_toys(tmp_path_factory):
    bundles = {}
    for case in CASES:
        kind, change = CHANGES.get(case, (case, lambda config: None))
        bundles[case] = bundle(saved(lively(kind, change), tmp_path_factory.mktemp("lively") / "toy"), kind)
    return bundles


def short(block, names):
    """The layers of a group as one name: the path once, then the last parts."""
    parts = [name.removeprefix(f"{block.name}.").rpartition(".") for name in names]
    return parts[0][0] + parts[0][1] + "+".join(sorted(last for _, _, last in parts))


def folds(block):
    by_layers = {short(block, group): fold_before(block, group) for group in in_order(block)}
    return {layers: fold and fold.before for layers, fold in by_layers.items()}


def stack_of(case, block):
    return f"{case} {'decoder' if 'decoder' in block.name else 'encoder'}" if case in ("t5", "bart") else case


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama", "t5", "bart", "gpt2"])
def test_the_folds_of_each_architecture_are_found(lively_toys, case, dtype):
    folded = []
    visit(bundle(lively_toys[case].source.id, case, dtype), lambda block: folded.append((stack_of(case, block), folds(block))))
    assert len(folded) == (4 if case in ("t5", "bart") else 2)
    for stack, before in folded:
        assert before == FOLDS[stack]


@pytest.mark.parametrize("case", ["llama", "bart", "gpt2"])
def test_no_wrong_fold_is_found_in_float16_whose_smallest_numbers_round(lively_toys, case):
    folded = []
    visit(bundle(lively_toys[case].source.id, case, "float16"), lambda block: folded.append((stack_of(case, block), folds(block))))
    for stack, by_layers in folded:
        assert all(before in (None, FOLDS[stack][layers]) for layers, before in by_layers.items())


@pytest.mark.parametrize(
    ("case", "layer", "before"),
    [
        ("llama with all value heads", "self_attn.o_proj", "self_attn.v_proj"),
        ("bart with relu", "fc2", "fc1"),
        ("t5 with relu", "DenseReluDense.wo", "DenseReluDense.wi"),
    ],
)
def test_a_layer_is_folded_to_where_the_config_lets_its_input_through(lively_toys, case, layer, before):
    folded = []
    visit(lively_toys[case], lambda block: folded.extend((key, b) for key, b in folds(block).items() if key.endswith(layer)))
    assert folded
    assert all(b is not None and b.endswith(before) for _, b in folded)


@pytest.mark.parametrize("case", CASES)
def test_looking_for_a_fold_leaves_the_weights_as_they_are(lively_toys, case):
    def look(block):
        kept = {name: parameter.detach().clone() for name, parameter in block.module.named_parameters()}
        where = {name: parameter.data_ptr() for name, parameter in block.module.named_parameters()}
        folds(block)
        for name, parameter in block.module.named_parameters():
            assert torch.equal(parameter, kept[name])
            assert parameter.data_ptr() == where[name]
        assert all(block.weights[name].data_ptr() == layer.weight.data_ptr() for name, layer in block.layers.items())

    visit(lively_toys[case], look)


@pytest.mark.parametrize("case", CASES)
def test_folding_any_scale_divides_the_input_and_keeps_the_output(lively_toys, case):
    generator = torch.Generator().manual_seed(0)
    applied = []

    def look(block):
        expected = [block.output(batch).double() for batch in range(len(block.given.hidden))]
        for group in in_order(block):
            if (fold := fold_before(block, group)) is None:
                continue
            scale = torch.exp(torch.randn(block.layers[group[0]].in_features, generator=generator))
            states, weights = torch.cat(list(inputs(block, group[0]))), {name: block.weights[name] for name in group}
            fold.apply(scale)
            applied.append(fold.before)
            assert torch.allclose(torch.cat(list(inputs(block, group[0]))) * scale, states, rtol=1e-4, atol=1e-5)
            for name in group:
                assert torch.allclose(block.weights[name], weights[name] * scale)
                assert torch.equal(block.weights[name], block.layers[name].weight)
        for batch, output in enumerate(expected):
            assert (block.output(batch).double() - output).norm() <= 1e-5 * output.norm()

    visit(lively_toys[case], look)
    assert applied
