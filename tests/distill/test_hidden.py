"""Hidden states and attention maps against sums written out in float64; the layer map; the projection; what is refused."""

import json
import re

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from compress.distill import hidden
from compress.errors import InputError, ModelError
from compress.methods import find
from compress.model.loading import load_model
from tests.blocks import bundle, examples
from tests.conftest import TASKS, make_tokenizer
from tests.distill import pairs
from tests.distill.pairs import counted, distil, inputs_of, outlives_a_kill, source, two


def settings(**keywords):
    return find("distill", "hidden").Settings(**keywords)


DEPTH = {
    "t5": {"num_layers": 1, "num_decoder_layers": 1}, "bart": {"encoder_layers": 1, "decoder_layers": 1}, "llama": {"num_hidden_layers": 1},
    "gpt2": {"n_layer": 1}, "bert": {"num_hidden_layers": 1},
}  # fmt: skip
WIDTH = {
    "t5": {"d_model": 32}, "bart": {"d_model": 32}, "llama": {"hidden_size": 32, "head_dim": 8}, "gpt2": {"n_embd": 32},
    "bert": {"hidden_size": 32},
}  # fmt: skip


def by_hand(student, teacher, seen, chosen, projections, links):
    """The loss of all examples, each read alone, in float64. links: (student's, teacher's) layer of each stack."""
    stacks = ("encoder_", "decoder_") if student.config.is_encoder_decoder else ("",)
    total, positions = 0.0, 0
    for example in seen:
        inputs, where, target = inputs_of(student, make_tokenizer(), example)
        with torch.no_grad():
            mine, theirs = (model(**inputs, output_hidden_states=True, output_attentions=True) for model in (student, teacher))
        student_logits, teacher_logits = (counted(out.logits, where) for out in (mine, theirs))
        states = maps = 0.0
        for stack in stacks:
            for layer, teacher_layer in links:
                a, b = mine[f"{stack}hidden_states"][layer][0], theirs[f"{stack}hidden_states"][teacher_layer][0]
                weight = projections.get(stack)
                a = a if weight is None else a @ weight.double().T
                states += float(((a - b) ** 2).mean()) / len(links) / len(stacks)
                if not layer or not teacher_layer:  # the embedding has no map
                    continue
                p, q = theirs[f"{stack}attentions"][teacher_layer - 1][0], mine[f"{stack}attentions"][layer - 1][0]
                rows = torch.where(p > 0, p * (p / q).log(), 0).sum(-1)  # (heads, tokens)
                maps += float(rows.mean()) / sum(1 for pair in links if all(pair)) / len(stacks)
        total += chosen.logits_weight * pairs.divergence(student_logits, teacher_logits, chosen.divergence, chosen.temperature)
        total += chosen.label_weight * float(cross_entropy(student_logits, target, reduction="sum"))
        total += (chosen.hidden_weight * states + chosen.attention_weight * maps) * len(target)
        positions += len(target)
    return total / positions


@pytest.mark.parametrize(
    ("kind", "changes", "options", "links"),
    [
        *[(kind, DEPTH[kind], {}, [(1, 2)]) for kind in TASKS],
        *[(kind, {}, {"attention_weight": 2.0, "hidden_weight": 0.0}, [(1, 1), (2, 2)]) for kind in TASKS],
        *[(kind, {**WIDTH[kind], **DEPTH[kind]}, {"attention_weight": 0.5}, [(1, 2)]) for kind in TASKS],
        ("llama", {}, {"layers": {0: 0, 1: 1, 2: 2}, "attention_weight": 1.0}, [(0, 0), (1, 1), (2, 2)]),
        ("llama", {}, {"layers": {2: 1}, "temperature": 4, "divergence": "reverse", "label_weight": 0}, [(2, 1)]),
        ("t5", {}, {"layers": {"encoder": {1: 2}, "decoder": {1: 2}}, "attention_weight": 1, "logits_weight": 0}, [(1, 2)]),
    ],
)
def test_a_step_is_the_weighed_sum_of_all_parts(tmp_path, losses, monkeypatch, kind, changes, options, links):
    teacher, student = two(kind, tmp_path, **changes)
    seen, kept, plain = examples(label=kind == "bert"), {}, hidden.states_apart
    chosen = settings(**{"logits_weight": 0.7, "hidden_weight": 1.3, "label_weight": 0.4, **options})
    toy, narrow = bundle(student, kind), any(key in changes for key in WIDTH[kind])

    def watched(states, teacher_states):
        for name, layer in toy.model.projections.items():
            kept.setdefault("" if name == "blocks" else f"{name}_", layer.weight.detach().clone())
        return plain(states, teacher_states)

    monkeypatch.setattr(hidden, "states_apart", watched)
    after, _ = distil("hidden", toy, teacher, steps=1, batch_size=2, accumulate=3, **chosen.model_dump(exclude_unset=True))
    assert bool(kept) == narrow
    student_model, teacher_model = (load_model(source(folder, kind), "cpu").double() for folder in (student, teacher))
    for model in (student_model, teacher_model):
        model.set_attn_implementation("eager")
    assert sum(losses) == pytest.approx(by_hand(student_model, teacher_model, seen, chosen, kept, links), abs=1e-6, rel=1e-6)
    assert not any("projections" in name for name in after.model.state_dict())
    assert after.model.config._attn_implementation == bundle(student, kind).model.config._attn_implementation


@pytest.mark.parametrize("kind", ["t5", "llama", "bert"])
def test_the_student_comes_nearer_through_a_projection_that_learns(tmp_path, losses, kind):
    teacher, student = two(kind, tmp_path, **WIDTH[kind], **DEPTH[kind])
    how = {"batch_size": 6, "learning_rate": 1e-2, "logits_weight": 0, "label_weight": 0}
    trained, _ = distil("hidden", bundle(student, kind), teacher, steps=60, **how)
    assert losses[-1] < 0.6 * losses[0]
    trained.save(tmp_path / "made")
    load_model(source(tmp_path / "made", kind), "cpu")


def test_a_killed_training_keeps_its_projection(tmp_path, often):
    teacher, student = two("llama", tmp_path, **WIDTH["llama"])
    how = {"steps": 5, "batch_size": 2, "learning_rate": 1e-2}
    outlives_a_kill(lambda told: distil("hidden", bundle(student, "llama"), teacher, told, **how)[0], tmp_path / "scratch", 4)


@pytest.mark.parametrize(
    ("blocks", "most", "expected"),
    [
        (6, 12, {1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 12}), (3, 12, {1: 4, 2: 8, 3: 12}), (2, 2, {1: 1, 2: 2}), (2, 3, {1: 2, 2: 3}),
        (4, 2, {1: 1, 2: 1, 3: 2, 4: 2}),
    ],
)  # fmt: skip
def test_layers_are_spread_evenly_and_the_last_learns_from_the_last(blocks, most, expected):
    assert hidden.linked({"blocks": (blocks, None)}, {"blocks": (most, None)}, settings()) == {"blocks": expected}


def test_layers_as_the_recipe_says():
    both, teacher = {"encoder": (2, None), "decoder": (3, None)}, {"encoder": (4, None), "decoder": (6, None)}
    assert hidden.linked(both, teacher, settings(layers={"decoder": {0: 0, 3: 6}})) == {"decoder": {0: 0, 3: 6}}
    for student, layers, message in (
        (both, {1: 2}, "layers: this model has encoder and decoder; write them as {encoder: {1: 2}, decoder: {1: 2}}"),
        ({"blocks": (2, None)}, {"encoder": {1: 2}}, "layers: this model has blocks; write them as {1: 2}"),
        ({"blocks": (2, None)}, {3: 2}, "layers: the student has no layer 3; the last of its blocks is 2, and 0 is the embedding"),
        ({"blocks": (2, None)}, {2: 7}, "layers: the teacher has no layer 7; the last of its blocks is 6, and 0 is the embedding"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            hidden.linked(student, {**teacher, "blocks": (6, None)}, settings(layers=layers))


def test_maps_of_other_heads_are_refused(tmp_path):
    teacher, student = two("gpt2", tmp_path, n_head=2)
    with pytest.raises(ModelError, match="attention_weight: maps of 2 heads can't be compared with the teacher's 4"):
        distil("hidden", bundle(student, "gpt2"), teacher, attention_weight=1.0)
    distil("hidden", bundle(student, "gpt2"), teacher, steps=1, batch_size=2)


def test_maps_are_learned_without_dropout(toys, losses):
    """The toys have dropout, so a model that is its own teacher would be apart from itself."""
    distil("hidden", bundle(toys["bert"], "bert"), toys["bert"], steps=1, batch_size=6, attention_weight=1.0, label_weight=0)
    assert losses == [pytest.approx(0, abs=1e-6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_weight": 0}, "which is `distill: logits`"),
        ({"layers": {"encoder": {}}}, "names no layer"),
        ({"layers": {}}, "at least 1 item"),
        ({"layers": {-1: 2}}, "greater than or equal to 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        settings(**options)


def test_settings_survive_their_way_to_the_working_process():
    for options in ({"layers": {1: 2}}, {"layers": {"encoder": {0: 0}}}, {}):
        chosen = settings(**options)
        again = settings(**json.loads(json.dumps(chosen.model_dump(mode="json"))))
        assert again == chosen
