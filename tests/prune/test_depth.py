"""Blocks that do nothing are the ones that go, and what is left computes what it did, with a cache too."""

import json
from itertools import pairwise

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from compress.calibration.stream import batches
from compress.errors import DataError, InputError, ModelError
from compress.methods import Context, Example, quiet
from compress.model.loading import Bundle
from compress.model.source import Source
from compress.prune import depth
from compress.results.stages import NOTES
from compress.structure import block_stacks
from tests import architectures
from tests.blocks import context, examples
from tests.conftest import TASKS
from tests.wide import SEEN, SHAPES, alike, bundle, elsewhere, greedy, logits, run, stored, wide

KINDS = list(TASKS)
# What writes into the residual stream; without it a block hands its input on. Behind BART's and BERT's blocks stands a norm, which would not.
WRITERS = (
    "SelfAttention.o",
    "EncDecAttention.o",
    "wo",
    "out_proj",
    "fc2",
    "o_proj",
    "down_proj",
    "c_proj",
    "attention.output.dense",
    "output.dense",
)


def plant(block):
    for name, layer in block.named_modules():
        if isinstance(layer, torch.nn.Linear | Conv1D) and name.endswith(WRITERS):
            layer.weight.data.zero_()
            if layer.bias is not None:
                layer.bias.data.zero_()


def still_norms(model):
    """The norms of models that have them behind their blocks do nothing to what is normed, as far as eps allows."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.data.fill_(1)
            module.bias.data.zero_()
            module.eps = 0.0


def pruned(folder, kind, drop):
    context = Context("cpu", quiet, [Example(**row) for row in SEEN], 32)
    return depth.apply(bundle(folder, kind), depth.Settings(drop=drop), context).model, context


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, 1, -1])
def test_blocks_that_do_nothing_are_the_ones_that_go(tmp_path, kind, place):
    """The first of T5's stacks is among them: its position bias has to stay."""
    model = wide(kind)
    if kind in ("bart", "bert"):
        still_norms(model)
    stacks = block_stacks(model)
    for blocks in stacks.values():
        plant(blocks[place])
    folder = stored(model, tmp_path / "whole")
    new, context = pruned(folder, kind, 1)
    if kind in ("bart", "bert"):
        still_norms(new)
    left = block_stacks(new)
    for name, blocks in stacks.items():
        assert len(left[name]) == len(blocks) - 1
        number = place % len(blocks)
        sentence = next(sentence for sentence in context.said if name in sentence)
        assert f"{number} " in sentence.split(": ")[1].split(" (dropped)")[0].split(", ")[-1]
    assert alike(logits(new), logits(model))


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_influence_is_the_papers_written_out(tmp_path, kind):
    """1 - cosine, in float64 from transformers' own hidden states, each example by itself without padding."""
    toy = bundle(stored(wide(kind), tmp_path / "whole"), kind)
    context = Context("cpu", quiet, [Example(**row) for row in SEEN], 32)
    stacks = {role: blocks for role, (_, blocks) in depth._stacks(toy.model).items()}
    influences = depth._influences(toy, stacks, context)
    fields = {"encoder": "encoder_hidden_states", "decoder": "decoder_hidden_states", "blocks": "hidden_states"}
    for role, scores in influences.items():
        total, tokens = torch.zeros(len(scores) - 1, dtype=torch.float64), 0
        for row in SEEN:
            (inputs,) = batches(toy.model, toy.tokenizer, Context("cpu", quiet, [Example(**row)], 32))
            with torch.no_grad():
                out = toy.model(**inputs, output_hidden_states=True)
            mask = inputs["decoder_attention_mask" if role == "decoder" else "attention_mask"].bool()
            states = [states[mask].double() for states in out[fields[role]][:-1]]  # the last is behind a norm
            total += torch.stack([torch.nn.functional.cosine_similarity(a, b, dim=-1).sum() for a, b in pairwise(states)])
            tokens += int(mask.sum())
        torch.testing.assert_close(torch.tensor(scores[:-1], dtype=torch.float64), 1 - total / tokens, rtol=1e-4, atol=1e-6)


def test_they_load_without_this_package_and_say_the_same(tmp_path):
    """Also with fewer blocks in T5's encoder than in its decoder, whose cache transformers would make too short."""
    drops = {"t5": {"encoder": 2}, "bart": {"encoder": 1, "decoder": 3}, "llama": 2, "gpt2": 2, "bert": 3}
    models, targets = {}, {}
    for kind in KINDS:
        folder = stored(wide(kind), tmp_path / f"{kind}-whole")
        targets[kind] = run("depth", kind, folder, tmp_path / kind, drop=drops[kind])
        models[kind], _ = pruned(folder, kind, drops[kind])
        sentences = json.loads((targets[kind] / NOTES).read_text())["said"]
        dropped = drops[kind] if isinstance(drops[kind], dict) else {"blocks": drops[kind]}
        assert " ".join(sentences).count("(dropped)") == sum(dropped.values())
    assert {name: len(blocks) for name, blocks in block_stacks(models["bart"]).items()} == {
        "model.encoder.layers": 2,
        "model.decoder.layers": 1,
    }
    for kind, (outside, tokens) in elsewhere(targets).items():
        assert alike(outside, logits(models[kind])), kind
        assert tokens == greedy(models[kind]), kind


@pytest.mark.parametrize(
    ("blocks", "kept"),
    [
        (12, [0]), (12, [0, 6, 11]), (12, [0, 2, 4, 7, 9, 11]), (12, list(range(12))), (16, [0]), (16, [0, 15]), (16, [0, 8, 15]),
        (16, [0, 5, 10, 15]), (16, [0, 3, 6, 9, 12, 15]), (6, [0]), (6, [0, 5]), (6, [0, 2, 5]),
    ],
)  # fmt: skip
def test_spacing_is_the_published_one(blocks, kept):
    """DistilBERT's six of twelve, and shrink-and-fine-tune's of BART (12), Pegasus (16) and Marian (6)."""
    assert depth.spaced(blocks, len(kept)) == kept


def test_spacing_is_even():
    for blocks in range(2, 40):
        for left in range(2, blocks + 1):
            kept = depth.spaced(blocks, left)
            steps = {after - before for before, after in pairwise(kept)}
            assert (kept[0], kept[-1], len(kept)) == (0, blocks - 1, left)
            assert min(steps) >= 1 and max(steps) - min(steps) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_spaced_blocks_stay_and_no_example_is_looked_at(tmp_path, kind):
    """What goes are blocks that do nothing, so the logits stay."""
    model = wide(kind, **{key: 5 for key in SHAPES[kind] if "layer" in key})
    if kind in ("bart", "bert"):
        still_norms(model)
    for blocks in block_stacks(model).values():
        for place in (1, 3):
            plant(blocks[place])
    folder = stored(model, tmp_path / "whole")
    target = run("depth", kind, folder, tmp_path / "made", seen=[], drop=2, by="spacing")
    new = bundle(target, kind).model
    if kind in ("bart", "bert"):
        still_norms(new)
    assert alike(logits(new), logits(model))
    sentences = json.loads((target / NOTES).read_text())["said"]
    assert sentences == [f"blocks evenly spaced in {name}, 5 -> 3 blocks: 0, 2, 4 are kept" for name in block_stacks(model)]


def test_generation_with_a_cache_says_what_it_says_without(tmp_path):
    for kind, drop in (("llama", 2), ("gpt2", 1), ("t5", {"encoder": 3}), ("bart", {"decoder": 2})):
        new, _ = pruned(stored(wide(kind), tmp_path / kind), kind, drop)
        ids = torch.arange(3, 13)[None]
        asked = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
        assert new.generate(ids, use_cache=True, **asked).tolist() == new.generate(ids, use_cache=False, **asked).tolist(), kind


def test_lists_that_have_an_entry_a_block_are_cut_alike(tmp_path):
    """Qwen's sliding windows stay with their blocks."""
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, use_sliding_window=True, sliding_window=4, max_window_layers=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    for block in (1, 2):
        plant(model.model.layers[block])
    new, _ = pruned(stored(model, tmp_path / "whole"), "llama", 2)
    assert new.config.layer_types == ["full_attention", "sliding_attention"]
    torch.testing.assert_close(logits(new), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "drop", "message"),
    [
        ("llama", 4, r"drop: 4 of the 4 blocks of model\.layers would leave none; at most 3 can go"),
        ("t5", {"decoder": 3}, r"drop: 3 of the 3 blocks of decoder\.block would leave none"),
        ("gpt2", {"decoder": 1}, r"GPT2LMHeadModel has one stack of 4 blocks, transformer\.h; say drop: and a number below 4"),
    ],
)
def test_what_cannot_be_dropped_is_refused(tmp_path, kind, drop, message):
    with pytest.raises(InputError, match=message):
        run("depth", kind, stored(wide(kind), tmp_path / "whole"), tmp_path / "made", drop=drop)
    assert not (tmp_path / "made").exists()


def test_without_examples_it_is_refused(tmp_path):
    with pytest.raises(DataError, match="no example"):
        run("depth", "llama", stored(wide("llama"), tmp_path / "whole"), tmp_path / "made", seen=[], drop=1)


def test_attention_scaled_by_the_number_of_its_block_is_refused(tmp_path):
    folder = stored(wide("gpt2", scale_attn_by_inverse_layer_idx=True), tmp_path / "whole")
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx"):
        pruned(folder, "gpt2", 1)


@pytest.mark.parametrize("drop", [0, -1, {}, {"encoder": 0, "decoder": 0}, {"encodr": 1}])
def test_settings_that_drop_nothing_are_refused(drop):
    with pytest.raises(ValueError, match="drop"):
        depth.Settings(drop=drop)


@pytest.mark.parametrize(
    ("kinds", "first", "going", "kept"),
    [
        ("abbb", 1, 2, [0, 3]),  # a dense block before those with experts stays whatever its score
        ("aabb", 2, 1, [0, 1, 3]),
        ("abab", 0, 2, [2, 3]),
        ("aabaa", 0, 3, [2, 4]),  # of each kind one
        ("ab", 0, 0, [0, 1]),
    ],
)
def test_blocks_of_several_kinds(kinds, first, going, kept):
    """The first ones have the lowest scores, and so would go."""
    kinds = [frozenset({(kind, (1,))}) for kind in kinds]
    assert depth._first(kinds) == first
    assert depth._kept(kinds, first, going, list(range(len(kinds)))) == kept


@pytest.mark.parametrize("name", ["ModernBertForSequenceClassification", "Lfm2ForCausalLM"])
def test_models_with_a_block_that_none_can_stand_for_lose_others(name, tmp_path):
    """ModernBERT's first block has no norm; LFM2 has one attention among convolutions."""
    folder, kind = architectures.made(name, tmp_path / "whole"), architectures.task_of(name)
    told = context(examples=examples(label=name in architectures.CLASSIFIERS))
    model = depth.apply(Bundle(Source(str(folder), kind), "cpu"), depth.Settings(drop=1), told).model
    assert len(next(iter(block_stacks(model).values()))) == 2
    with pytest.raises(InputError, match=r"of its kinds of blocks|would leave none"):
        depth.apply(Bundle(Source(str(folder), kind), "cpu"), depth.Settings(drop=2 if name.startswith("Lfm2") else 3), told)
