"""Factors and their merging against peft and against training written out in float64; zeros, tied heads, and what it refuses."""

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from compress.errors import DataError, InputError
from compress.methods import Context, Optimisation
from compress.model.loading import AUTO
from compress.training.weights import pruned
from tests.blocks import bundle, context, examples
from tests.conftest import TASKS
from tests.finetune.loops import adamw, calm, doubled, halved, tune

HOW = {"steps": 3, "batch_size": 2, "accumulate": 3, "learning_rate": 1e-2, "warmup": 0.0}


@pytest.fixture
def factors(monkeypatch):
    """A and B of each layer by name, as they begin and as they are merged; filled while `lora` runs."""
    seen: dict = {"begun": {}, "merged": {}}
    begin, merge = peft.get_peft_model, peft.tuners.lora.LoraModel.merge_and_unload

    def look(model, when):
        for name, layer in model.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                seen[when][name] = (a.detach().double().clone(), b.detach().double().clone())

    def begun(model, *rest):
        wrapped = begin(model, *rest)
        look(model, "begun")
        return wrapped

    def merged(self, *rest, **named):
        look(self.model, "merged")
        return merge(self, *rest, **named)

    monkeypatch.setattr(peft, "get_peft_model", begun)
    monkeypatch.setattr(peft.tuners.lora.LoraModel, "merge_and_unload", merged)
    return seen


class Adapted(nn.Module):
    """A weight with factors beside it, written out; where the weight is zero the factors count for nothing."""

    def __init__(self, weight, begun, scale, transposed, masked):
        super().__init__()
        self.a, self.b = nn.Parameter(begun[0].clone()), nn.Parameter(begun[1].clone())
        self.scale, self.transposed = scale, transposed
        self.kept = (weight != 0).double() if masked else torch.ones_like(weight)

    def forward(self, weight):
        change = self.scale * self.b @ self.a
        return weight + self.kept * (change.t() if self.transposed else change)


@pytest.mark.parametrize(("kind", "keep_zeros"), [*[(kind, True) for kind in TASKS], ("llama", False), ("gpt2", False)])
def test_training_and_merging_are_as_written_out(tmp_path, factors, kind, keep_zeros):
    calm(kind, tmp_path)
    halved(tmp_path / kind, kind).save(tmp_path / "halved")
    toy = bundle(tmp_path / "halved", kind)
    seen, before = examples(label=kind == "bert"), {name: tensor.clone() for name, tensor in toy.model.state_dict().items()}
    told = context(examples=seen)
    after = tune(toy, "lora", told, rank=4, alpha=6, keep_zeros=keep_zeros, **HOW).state_dict()

    model = doubled(toy).requires_grad_(False)
    trained = {}
    for name, begun in factors["begun"].items():
        layer = model.get_submodule(name)
        part = Adapted(layer.weight, begun, 6 / 4, isinstance(layer, Conv1D), keep_zeros)
        parametrize.register_parametrization(layer, "weight", part)
        trained |= {f"{name}.a": part.a, f"{name}.b": part.b}
    losses, _ = adamw(model, toy.tokenizer, seen, Optimisation(**HOW), trained)
    assert f"loss {losses[0]:.3g} to {losses[-1]:.3g}" in told.said[0]
    assert len(factors["begun"]) == {"t5": 36, "bart": 32, "llama": 14, "gpt2": 8, "bert": 13}[kind]
    for name in factors["begun"]:
        start, weight, layer = before[f"{name}.weight"].double(), after[f"{name}.weight"].double(), model.get_submodule(name)
        way = (layer.weight - start).detach().norm()
        assert (weight - layer.weight).norm() <= 0.03 * way, name
        a, b = factors["merged"][name]
        change = 6 / 4 * (b @ a).t() if isinstance(layer, Conv1D) else 6 / 4 * b @ a
        assert torch.allclose(weight, start + change * (start != 0) if keep_zeros else start + change, rtol=1e-6, atol=1e-7), name
    same = after.keys() - {f"{name}.weight" for name in factors["begun"]}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in same), "only weights of layers with factors change"


@pytest.mark.parametrize(("kind", "dtype", "computed"), [("gpt2", "float16", "float32"), ("t5", "bfloat16", "bfloat16")])
def test_what_pruning_made_zero_stays_zero_in_the_dtypes_it_came_in(toys, kind, dtype, computed):
    """Small gradients vanish in float16, not in bfloat16."""
    toy, seen = halved(toys[kind], kind, dtype), set()
    zeros = {name: weight == 0 for name, weight in pruned(toy.model).items()}
    dtypes = {name: tensor.dtype for name, tensor in toy.model.state_dict().items()}
    told = Context("cpu", lambda *_: seen.add(toy.model.dtype), examples(), 32)
    after = tune(toy, "lora", told, rank=4, steps=4, batch_size=3, learning_rate=1e-2, dropout=0.1)
    assert seen == {getattr(torch, computed)}
    assert {name: tensor.dtype for name, tensor in after.state_dict().items()} == dtypes
    assert {name: weight == 0 for name, weight in pruned(after).items()}.keys() == zeros.keys()
    for name, zero in zeros.items():
        weight = after.get_submodule(name).weight
        assert not weight[zero].any(), name
        assert (weight == 0).sum() <= zero.sum() + 2, "in 16 bits a change may happen to be as large as its weight"


@pytest.mark.parametrize("kind", ["t5", "gpt2", "bert"])
def test_the_artifact_is_an_ordinary_model(toys, tmp_path, kind):
    toy, tuned_bundle = bundle(toys[kind], kind), bundle(toys[kind], kind)
    names = toy.model.state_dict().keys()
    tuned = tune(tuned_bundle, "lora", rank=4, steps=2, batch_size=3, learning_rate=1e-2)
    assert type(tuned) is type(toy.model)
    assert not tuned.training
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in tuned.modules())
    tuned_bundle.holding(tuned).save(tmp_path)
    loaded, info = getattr(transformers, AUTO[TASKS[kind]]).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert loaded.state_dict().keys() == names
    ids = torch.arange(3, 23)[None]
    extra = {"decoder_input_ids": ids[:, :8]} if tuned.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits = [model(input_ids=ids, **extra).logits for model in (toy.model, tuned, loaded)]
    assert torch.equal(logits[1], logits[2])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_a_tied_head_is_not_touched(toys):
    toy = bundle(toys["llama"], "llama")
    embedding = toy.model.model.embed_tokens.weight.clone()
    after = tune(toy, "lora", rank=4, steps=2, batch_size=3, learning_rate=1e-2)
    assert torch.equal(after.model.embed_tokens.weight, embedding)
    assert after.lm_head.weight is after.model.embed_tokens.weight
    with pytest.raises(InputError, match="targets: lm_head shares its weights with the embedding, which factors would change too"):
        tune(bundle(toys["llama"], "llama"), "lora", targets=["lm_head", "q_proj"])


def test_layers_named_as_targets_get_factors_and_no_others(tmp_path):
    """The head of this model is a weight of its own."""
    toy, told = bundle(calm("llama", tmp_path, tie_word_embeddings=False), "llama"), context()
    before = {name: tensor.clone() for name, tensor in toy.model.state_dict().items()}
    after = tune(toy, "lora", told, targets=["lm_head", "re:.*v_proj"], rank=2, batch_size=3).state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"lm_head.weight", *(f"model.layers.{n}.self_attn.v_proj.weight" for n in (0, 1))}
    assert told.said[1] == f"factors of rank 2 on 3 layers: {2 * (64 + 64) + 2 * 2 * (32 + 64):,} weights were trained"


def test_all_weights_can_be_trained_afterwards(toys):
    """What peft froze is free again."""
    model = tune(bundle(toys["llama"], "llama"), "lora", rank=2, batch_size=3)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["q_prj"]}, r"targets: 'q_prj' matches no linear layer of this model; near it are .*q_proj"),
        ({"targets": ["q_proj", "attn"]}, r"targets: 'attn' matches no linear layer"),
        ({"rank": 33}, r"rank: 33 is larger than model\.layers\.0\.self_attn\.k_proj, which is 32 x 64; at most 32"),
    ],
)
def test_targets_and_ranks_that_there_are_not_are_refused(toys, settings, message):
    with pytest.raises(InputError, match=message):
        tune(bundle(toys["llama"], "llama"), "lora", **settings)


def test_no_targets_in_the_data_are_refused(toys):
    with pytest.raises(DataError, match="has a target"):
        tune(bundle(toys["t5"], "t5"), "lora", context(examples=[type(e)(e.id, e.prompt, []) for e in examples()]))


def test_zeros_by_chance_are_no_pruning(toys):
    """A few of a large model's weights are zero in bfloat16; keeping them would cost LoRA its cheap products."""
    model = bundle(toys["llama"], "llama").model
    layer = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        layer[:2] = 0
    assert pruned(model) == {}
    with torch.no_grad():
        layer[:86] = 0
    assert list(pruned(model)) == ["model.layers.0.mlp.up_proj"]
