"""Heads, channels and width go, and what is left computes what it did: against models in which the units that go were zero."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn.functional import layer_norm
from transformers.pytorch_utils import Conv1D

from compress.architectures import WIDTH
from compress.errors import BrokenPromise, DataError, InputError, ModelError
from compress.methods import Context, Example, quiet
from compress.model.loading import AUTO, Bundle, parameter_count
from compress.model.source import Source
from compress.prune import structured
from compress.prune._coupled import Coupling
from compress.results.stages import NOTES
from compress.structure import trial_inputs
from tests import architectures
from tests.conftest import TASKS
from tests.wide import SEEN, alike, bundle, elsewhere, greedy, logits, run, stored, wide

KINDS = list(TASKS)
CUTS = [["channels"], ["channels", "heads"], ["channels", "heads", "width"]]


def pruned(folder, kind, **settings):
    """The model in memory, and what was said about it."""
    context = Context("cpu", quiet, [Example(**row) for row in SEEN], 32)
    return structured.apply(bundle(folder, kind), structured.Settings(**settings), context).model, context


# What each architecture's layers are called, written down apart from the method's own table: queries, keys and values; what gathers the
# heads; the feed-forward's inner and outer layers; what else reads the hidden states; tables of embeddings; norms.
NAMES = {
    "t5": ("q k v", "o", "wi_0 wi_1", "wo", "", "shared", "layer_norm final_layer_norm"),
    "bart": (
        "q_proj k_proj v_proj", "out_proj", "fc1", "fc2", "", "shared embed_positions",
        "layernorm_embedding self_attn_layer_norm encoder_attn_layer_norm final_layer_norm",
    ),
    "llama": ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj", "", "embed_tokens", "input_layernorm post_attention_layernorm norm"),
    "gpt2": ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "", "wte wpe", "ln_1 ln_2 ln_f"),
    "bert": (
        "query key value", "attention.output.dense", "intermediate.dense", "output.dense", "classifier",
        "word_embeddings position_embeddings token_type_embeddings", "LayerNorm",
    ),
}  # fmt: skip


def layers(model, kind, which):
    ends = NAMES[kind][which].split()
    return {
        name: module
        for name, module in model.named_modules()
        if any(f".{name}".endswith(f".{end}") for end in ends) and not (which == 3 and "attention" in name)
    }


def rows(layer):
    """A layer's weight with its outputs as rows; a view."""
    return layer.weight.data.t() if isinstance(layer, Conv1D) else layer.weight.data


def clear(layer, outputs=(), inputs=()):
    rows(layer)[list(outputs)] = 0
    rows(layer)[:, list(inputs)] = 0
    if getattr(layer, "bias", None) is not None:
        layer.bias.data[list(outputs)] = 0


def block_of(name):
    """encoder.block.3.layer.0.SelfAttention.q -> (encoder.block, 3)"""
    parts = name.split(".")
    at = next(n for n, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:at]), int(parts[at])


def plant_channels(model, kind):
    """A quarter of the channels of each block is zero, others in each."""
    for name, layer in layers(model, kind, 2).items():
        clear(layer, outputs=chosen(block_of(name), rows(layer).shape[0], rows(layer).shape[0] // 4))
    for name, layer in layers(model, kind, 3).items():
        clear(layer, inputs=chosen(block_of(name), rows(layer).shape[1], rows(layer).shape[1] // 4))


def parameters_of(model, kind, *which):
    return sum(layer.weight.numel() for each in which for layer in layers(model, kind, each).values())


def chosen(key, size, count):
    generator = torch.Generator().manual_seed(sum(map(ord, str(key))))
    return torch.randperm(size, generator=generator)[:count].tolist()


def plant_heads(model, kind, count, heads):
    """So many heads (groups of them for Llama) of each attention are zero, others in each; for T5's self-attention others in each stack."""

    def units(name, size, parts=1):
        stack, block = block_of(name)
        cross = "EncDecAttention" in name or "encoder_attn" in name
        key = (stack,) if kind == "t5" and not cross else (stack, block, cross)
        each = size // heads // parts
        return [p * size // parts + unit * each + n for p in range(parts) for unit in chosen(key, heads, count) for n in range(each)]

    for name, layer in layers(model, kind, 0).items():
        clear(layer, outputs=units(name, rows(layer).shape[0], 3 if kind == "gpt2" else 1))
    for name, layer in layers(model, kind, 1).items():
        clear(layer, inputs=units(name, rows(layer).shape[1]))


def plant_width(model, kind, gone):
    """These hidden units are zero everywhere; norms count the others alone."""
    left = [unit for unit in range(64) if unit not in gone]
    for which in (0, 2, 4):
        for layer in layers(model, kind, which).values():
            clear(layer, inputs=gone)
    for which in (1, 3):
        for layer in layers(model, kind, which).values():
            clear(layer, outputs=gone)
    if kind == "bert":
        clear(model.bert.pooler.dense, outputs=gone, inputs=gone)
    for table in layers(model, kind, 5).values():
        table.weight.data[:, gone] = 0
    for norm in layers(model, kind, 6).values():
        clear_norm(norm, gone, left)


def clear_norm(norm, gone, left):
    norm.weight.data[gone] = 0
    bias = getattr(norm, "bias", None)
    if bias is not None:
        bias.data[gone] = 0

    def forward(states):
        out = torch.zeros_like(states)
        if bias is not None:
            out[..., left] = layer_norm(states[..., left], (len(left),), norm.weight[left], bias[left], norm.eps)
        else:
            mean = states[..., left].square().mean(dim=-1, keepdim=True)
            out = norm.weight * states * torch.rsqrt(mean + norm.variance_epsilon)
        return out

    norm.forward = forward


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", CUTS, ids="-".join)
@pytest.mark.parametrize("keep", [0.8, 0.6])
def test_the_share_of_parameters_is_met_and_told(tmp_path, kind, cut, keep):
    folder = stored(wide(kind), tmp_path / "whole")
    whole = parameter_count(bundle(folder, kind).model)
    if kind == "bart" and keep == 0.6 and "width" not in cut:  # half of it is attention
        with pytest.raises(InputError, match="can't be reached by cutting channels 128"):
            pruned(folder, kind, cut=cut, keep=keep, multiple=4)
        return
    target = run("structured", kind, folder, tmp_path / "made", cut=cut, keep=keep, multiple=4)
    left = parameter_count(bundle(target, kind).model)
    assert left == pytest.approx(keep * whole, rel=0.02)
    sentences = " ".join(json.loads((target / NOTES).read_text())["said"])
    assert f"kept {left / whole:.1%} of {whole:,} parameters (asked: {keep:.1%}): feed-forward channels " in sentences
    assert ("so all heads stay" in sentences) == (cut == ["channels", "heads"] and kind in ("bart", "gpt2", "bert"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_channels_that_do_nothing_are_the_ones_that_go(tmp_path, kind, importance):
    model = wide(kind)
    plant_channels(model, kind)
    folder = stored(model, tmp_path / "whole")
    keep = 1 - parameters_of(model, kind, 2, 3) / 4 / parameter_count(model)
    new, _ = pruned(folder, kind, cut=["channels"], keep=keep, importance=importance)
    assert parameter_count(new) == pytest.approx(keep * parameter_count(model), rel=0.005)
    assert alike(logits(new), logits(model))


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_heads_that_do_nothing_are_the_ones_that_go(tmp_path, kind, importance):
    """T5's position bias keeps its columns of the heads that stay; Llama's groups of queries go with their keys and values."""
    model = wide(kind)
    plant_heads(model, kind, 2, model.config.num_key_value_heads if kind == "llama" else 8)
    folder = stored(model, tmp_path / "whole")
    share = 2 / (4 if kind == "llama" else 8)
    new, _ = pruned(
        folder, kind, cut=["heads"], keep=1 - parameters_of(model, kind, 0, 1) * share / parameter_count(model), importance=importance
    )
    assert new.config.num_attention_heads == (4 if kind == "llama" else 6)
    assert alike(logits(new), logits(model))


def test_t5s_self_attention_keeps_the_heads_that_its_position_bias_keeps(tmp_path):
    """One choice for each stack, whose bias is made in the first block; cross-attention chooses in each block."""
    model = wide("t5")
    new, _ = pruned(stored(model, tmp_path / "whole"), "t5", cut=["heads"], keep=0.82)
    left = new.config.num_heads
    assert left < 8

    def heads(before, after):
        old, now = before.q.weight.view(8, 8, 64), after.q.weight.view(left, 8, 64)
        return [next(head for head in range(8) if torch.equal(old[head], kept)) for kept in now]

    choices = {}
    for name in ("encoder", "decoder"):
        stacks = getattr(model, name).block, getattr(new, name).block
        (choices[name],) = {tuple(heads(old.layer[0].SelfAttention, now.layer[0].SelfAttention)) for old, now in zip(*stacks, strict=True)}
        old, now = (stack[0].layer[0].SelfAttention.relative_attention_bias.weight for stack in stacks)
        assert torch.equal(now, old[:, list(choices[name])])
    pairs = zip(model.decoder.block, new.decoder.block, strict=True)
    crossing = {tuple(heads(old.layer[1].EncDecAttention, now.layer[1].EncDecAttention)) for old, now in pairs}
    assert len({*choices.values(), *crossing}) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_width_that_does_nothing_is_what_goes(tmp_path, kind):
    """With as many heads where the config binds them. Against the whole model with norms over the units that stay."""
    model, bound = wide(kind), kind in ("bart", "gpt2", "bert")
    gone = chosen("width", 64, 16)
    plant_width(model, kind, gone)
    if bound:
        plant_heads(model, kind, 2, 8)
    folder = stored(model, tmp_path / "whole")
    keep = 0.75  # all weights but some biases have a width; where heads are bound to it, attention has it on both sides
    if bound:
        both = parameters_of(model, kind, 0, 1) + (model.bert.pooler.dense.weight.numel() if kind == "bert" else 0)
        keep -= 0.75 * 0.25 * both / parameter_count(model)
    new, _ = pruned(folder, kind, cut=["width"], keep=keep)
    assert new.config.hidden_size == 48
    assert parameter_count(new) == pytest.approx(keep * parameter_count(model), rel=0.01)
    assert alike(logits(new), logits(model))


def test_they_load_without_this_package_and_say_the_same(tmp_path):
    settings = {"cut": ["channels", "heads", "width"], "keep": 0.5, "importance": "taylor"}
    models, targets = {}, {}
    for kind in KINDS:
        folder = stored(wide(kind), tmp_path / f"{kind}-whole")
        targets[kind] = run("structured", kind, folder, tmp_path / kind, **settings)
        models[kind], _ = pruned(folder, kind, **settings)
    for kind, (outside, tokens) in elsewhere(targets).items():
        assert alike(outside, logits(models[kind])), kind
        assert tokens == greedy(models[kind]), kind


def test_taylor_is_the_change_of_the_loss_written_out(tmp_path):
    """One channel's score on one example, against weight times gradient by autograd on transformers' own loss."""
    folder = stored(wide("llama"), tmp_path / "whole")
    toy = bundle(folder, "llama")
    coupling = structured.Coupling(toy.model)
    context = Context("cpu", quiet, [Example("0", "the cat sat", ["on a mat"])], 32)
    scores = structured._scores(toy, coupling, structured.Settings(importance="taylor"), context)["channels", "model.layers.2"]
    ids = toy.tokenizer("the cat sat on a mat </s>", add_special_tokens=False, return_tensors="pt").input_ids
    model = bundle(folder, "llama").model
    model(input_ids=ids, labels=torch.where(torch.arange(7) < 3, -100, ids)).loss.backward()
    mlp = model.model.layers[2].mlp
    parts = [(mlp.gate_proj.weight, 1), (mlp.up_proj.weight, 1), (mlp.down_proj.weight, 0)]
    expected = sum((weight * weight.grad).abs().sum(dim=axis) for weight, axis in parts)
    torch.testing.assert_close(scores, expected.detach(), rtol=1e-3, atol=1e-6)


def test_magnitude_is_the_norm_of_all_that_belongs_to_a_head(tmp_path):
    toy = bundle(stored(wide("llama"), tmp_path / "whole"), "llama")
    scores = structured._scores(toy, structured.Coupling(toy.model), structured.Settings(), Context("cpu", quiet))
    attention = toy.model.model.layers[1].self_attn
    second = [
        attention.q_proj.weight[16:32],
        attention.k_proj.weight[8:16],
        attention.v_proj.weight[8:16],
        attention.o_proj.weight[:, 16:32],
    ]
    assert float(scores["heads", "model.layers.1"][1]) == pytest.approx(
        float(torch.cat([part.detach().flatten() for part in second]).norm()), rel=1e-5
    )


def test_relatives_are_cut_alike(tmp_path):
    """Biases of queries, norms of heads, and a classifier of two layers."""
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    grouped = {"num_key_value_heads": 4, "head_dim": 8}
    settings = {"cut": ["channels", "heads", "width"], "keep": 0.6}
    models, targets = {}, {}
    for name in ("mistral", "qwen2", "qwen3", "roberta"):
        kind = "bert" if name == "roberta" else "llama"
        config = transformers.AutoConfig.for_model(name, **sizes, **(grouped if kind == "llama" else {}))
        folder = stored(getattr(transformers, AUTO[TASKS[kind]]).from_config(config), tmp_path / f"{name}-whole")
        models[name], _ = pruned(folder, kind, **settings)
        whole = parameter_count(bundle(folder, kind).model)
        assert parameter_count(models[name]) == pytest.approx(0.6 * whole, rel=0.02)
        targets[name] = run("structured", kind, folder, tmp_path / name, **settings)
    for name, (outside, tokens) in elsewhere(targets).items():
        torch.testing.assert_close(outside, logits(models[name]), rtol=1e-5, atol=1e-5)
        assert tokens == greedy(models[name])
        if name != "roberta":
            config = models[name].config
            assert (config.num_attention_heads / config.num_key_value_heads, config.head_dim) == (2, 8)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("bert", {}), ("bart", {}), ("t5", {"tie_word_embeddings": False}), ("llama", {"num_key_value_heads": 8})],
)
def test_what_goes_together_is_what_torch_pruning_finds_by_tracing(kind, changes):
    """Its graph knows these models; grouped queries and GPT-2's Conv1D it does not."""
    torch_pruning = pytest.importorskip("torch_pruning")
    model, ids = wide(kind, **changes), torch.arange(3, 13)[None]
    model.config.use_cache = False
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    plain = [(p, 0) for name, p in model.named_parameters() if p.dim() == 1 and not name.endswith("bias")]  # norms it does not know
    traced = torch_pruning.DependencyGraph().build_dependency(
        model, inputs, output_transform=lambda out: out.logits, unwrapped_parameters=plain if kind in ("t5", "llama") else None
    )
    coupling = Coupling(model)
    names = {module: name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    checked = 0
    for module, name in names.items():
        axis = coupling.axes[f"{name}.weight"][0]
        if axis is None or (dimension := axis.dimension) == WIDTH:
            continue
        steps = [step for step, _ in traced.get_pruning_group(module, torch_pruning.prune_linear_out_channels, idxs=[5])]
        theirs = {
            (names[dependency.target.module], dependency.handler.__name__) for dependency in steps if dependency.target.module in names
        }
        group = coupling.group(f"{name}.weight", dimension)
        ours = {
            (other, f"prune_{side}_channels")
            for other in names.values()
            for counted, side in zip(coupling.axes[f"{other}.weight"], ("out", "in"), strict=True)
            if counted and coupling.group(f"{other}.weight", counted.dimension) == group
        }
        assert theirs == ours, name
        checked += 1
    assert checked >= 16


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"),
    [
        ("t5", {"keep": 0.05}, InputError, r"keep: 0.05 of [\d,]+ parameters can't be reached .* is left; cut: \[channels, heads, width\]"),
        ("llama", {"multiple": 200, "cut": ["channels"]}, InputError, "multiple: 200 is more than the 160 channels"),
        ("bart", {"cut": ["heads"]}, InputError, "bart: its config can't describe fewer heads of the same size"),
        ("gpt2", {"cut": ["width"], "keep": 0.97}, InputError, r"can't be met within 2% .* near it are 0\.\d+ and 1\.000"),
        ("bert", {"cut": ["channels"], "multiple": 128}, InputError, "keep: 0.75"),
    ],
)
def test_what_cannot_be_reached_is_refused_with_what_can(tmp_path, kind, settings, error, message):
    with pytest.raises(error, match=message):
        run("structured", kind, stored(wide(kind), tmp_path / "whole"), tmp_path / "made", **settings)
    assert not (tmp_path / "made").exists()


def test_the_least_share_that_is_named_can_be_reached(tmp_path):
    folder = stored(wide("bert"), tmp_path / "whole")
    with pytest.raises(InputError) as caught:
        pruned(folder, "bert", keep=0.01)
    least = float(str(caught.value).split(" is left")[0].split()[-1])
    assert least > 0.3
    new, _ = pruned(folder, "bert", keep=least)
    assert new.config.intermediate_size == 8


# the feed-forward's inner and outer layers of types of which nothing is written down; where gate and up are one layer, twice the rows
FEED_FORWARD = {
    "OPTForCausalLM": ("fc1", "fc2"), "FalconForCausalLM": ("dense_h_to_4h", "dense_4h_to_h"), "Phi3ForCausalLM": ("gate_up_proj", "down_proj"),
    "GPTNeoXForCausalLM": ("dense_h_to_4h", "dense_4h_to_h"), "GPTNeoForCausalLM": ("c_fc", "mlp.c_proj"),
    "Gemma2ForCausalLM": ("gate_proj up_proj", "down_proj"), "Glm4ForCausalLM": ("gate_up_proj", "down_proj"),
    "Starcoder2ForCausalLM": ("c_fc", "mlp.c_proj"), "Olmo2ForCausalLM": ("gate_proj up_proj", "down_proj"),
    "MBartForConditionalGeneration": ("fc1", "fc2"), "PegasusForConditionalGeneration": ("fc1", "fc2"), "MarianMTModel": ("fc1", "fc2"),
    "M2M100ForConditionalGeneration": ("fc1", "fc2"), "UMT5ForConditionalGeneration": ("wi_0 wi_1 wi", "DenseReluDense.wo"),
    "DistilBertForSequenceClassification": ("lin1", "lin2"), "ModernBertForSequenceClassification": ("mlp.Wi", "mlp.Wo"),
    "DebertaV2ForSequenceClassification": ("intermediate.dense", "output.dense"),
}  # fmt: skip


@pytest.mark.parametrize("name", FEED_FORWARD)
def test_channels_go_from_types_of_which_nothing_is_written_down(name, tmp_path):
    """A quarter of them is zero, others in each block, and nothing changes."""
    folder = architectures.made(name, tmp_path / "whole")
    model = Bundle(Source(str(folder), architectures.task_of(name), "float32"), "cpu").model

    def ending(ends):
        modules = model.named_modules()
        return {n: m for n, m in modules if any(n.endswith(f".{e}") for e in ends.split()) and "attention.output" not in n}

    inner, outer = map(ending, FEED_FORWARD[name])
    channels = next(iter(outer.values())).weight.shape[1]
    for owner, layer in inner.items():
        gone = chosen(block_of(owner), channels, channels // 4)
        clear(layer, outputs=[copy * channels + unit for copy in range(rows(layer).shape[0] // channels) for unit in gone])
    for owner, layer in outer.items():
        clear(layer, inputs=chosen(block_of(owner), channels, channels // 4))
    model.save_pretrained(folder)
    whole, whole_logits = parameter_count(model), model(**trial_inputs(model)).logits.detach()
    keep = 1 - sum(layer.weight.numel() for layer in (*inner.values(), *outer.values())) / 4 / whole
    toy = Bundle(Source(str(folder), architectures.task_of(name), "float32"), "cpu")
    new = structured.apply(toy, structured.Settings(keep=keep, cut=["channels"]), Context("cpu", quiet, [], 32)).model
    assert parameter_count(new) == pytest.approx(keep * whole, rel=0.01)
    torch.testing.assert_close(new(**trial_inputs(new)).logits, whole_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("BloomForCausalLM", "channels: bloom: its config has no size of the feed-forward that can be changed alone; heads: bloom: "),
        ("MixtralForCausalLM", "mixtral: structured pruning doesn't cut a mixture's experts; prune: experts takes"),
    ],
)
def test_what_a_config_cannot_say_is_refused(name, why, tmp_path):
    folder = architectures.made(name, tmp_path / "whole")
    with pytest.raises((InputError, ModelError), match=why):
        structured.apply(Bundle(Source(str(folder), "causal-lm"), "cpu"), structured.Settings(), Context("cpu", quiet, [], 32))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Phi3ForCausalLM", "qkv_proj.weight holds queries with keys and values"),
        ("Olmo2ForCausalLM", "q_norm.weight runs over all"),
        ("HeliumForCausalLM", "the layer that takes what they give has a size of its own"),
        ("GPTNeoXForCausalLM", "fewer heads of the same size at the same width"),
    ],
)
def test_heads_stay_where_they_hang_together_otherwise(name, why, tmp_path):
    folder, context = architectures.made(name, tmp_path / "whole"), Context("cpu", quiet, [], 32)
    structured.apply(Bundle(Source(str(folder), "causal-lm"), "cpu"), structured.Settings(keep=0.9, multiple=2), context)
    assert any(why in sentence and "all heads stay" in sentence for sentence in context.said)


def test_a_cut_that_leaves_something_else_is_found_out(tmp_path, monkeypatch):
    """Gate and up taken for one run of channels, whose neighbours would go together."""
    folder, probed = architectures.made("Phi3ForCausalLM", tmp_path / "whole"), Coupling._probed

    def in_one_run(self, model, dimension, keys):
        axes = probed(self, model, dimension, keys)
        return {name: tuple(axis and replace(axis, copies=1) for axis in row) for name, row in axes.items()}

    monkeypatch.setattr(Coupling, "_probed", in_one_run)
    with pytest.raises(BrokenPromise, match="phi3: without some of its channels its logits differ from those with zeros in their place"):
        structured.apply(Bundle(Source(str(folder), "causal-lm"), "cpu"), structured.Settings(keep=0.9), Context("cpu", quiet, [], 32))


def test_taylor_without_examples_is_refused(tmp_path):
    folder = stored(wide("llama"), tmp_path / "whole")
    with pytest.raises(DataError, match="no example"):
        run("structured", "llama", folder, tmp_path / "made", seen=[], importance="taylor")


def test_broken_weights_are_refused(tmp_path):
    sick = wide("llama")
    sick.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(BrokenPromise, match=r"model\.layers\.1: the scores of its channels are inf or NaN"):
        run("structured", "llama", stored(sick, tmp_path / "whole"), tmp_path / "made")
