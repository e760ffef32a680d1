"""The divergence against the textbook's sums in float64; who teaches and who learns; what is refused."""

import math
import re

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from compress.distill import _pair
from compress.distill._divergence import divergence
from compress.errors import DataError, InputError, ModelError, RunError
from compress.methods import Context, Example, find
from compress.model.loading import load_model
from tests.blocks import bundle, context, examples, saved
from tests.conftest import TASKS, make_model, make_tokenizer
from tests.distill import pairs
from tests.distill.pairs import counted, distil, inputs_of, outlives_a_kill, source, two
from tests.test_training import STEPS, until

KINDS = ("forward", "reverse", "jensen-shannon")


def settings(**keywords):
    return find("distill", "logits").Settings(**keywords)


@pytest.mark.parametrize("temperature", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_is_the_textbooks(kind, temperature):
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(7, 50), 3 * torch.randn(7, 50)
    expected = pairs.divergence(student, teacher, kind, temperature) / 7
    loss = divergence(student, teacher, settings(divergence=kind, temperature=temperature)) / 7
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    assert expected > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand_over_two_tokens(kind):
    """Teacher 3/4 and 1/4, student 1/2 and 1/2."""
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
    mixed = (
        0.5 * (0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)) + 0.25 * math.log(0.5 / 0.625) + 0.25 * math.log(0.5 / 0.375)
    )
    expected = {
        "forward": 0.75 * math.log(1.5) + 0.25 * math.log(0.5), "reverse": 0.5 * math.log(2 / 3) + 0.5 * math.log(2), "jensen-shannon": mixed,
    }[kind]  # fmt: skip
    assert float(divergence(student, teacher, settings(divergence=kind, temperature=1))) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_keep_their_size_at_any_temperature(kind):
    """At a high temperature the loss of small logits is half the squared difference over the vocabulary, whatever the temperature (Hinton)."""
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 20).requires_grad_(), torch.randn(3, 20)
    sizes = []
    for temperature in (50, 100):
        (slope,) = torch.autograd.grad(divergence(student, teacher, settings(divergence=kind, temperature=temperature)), student)
        sizes.append(float(slope.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_what_an_embedding_is_padded_with_is_left_out():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 20), torch.randn(3, 24)
    expected = pairs.divergence(student, teacher[:, :20], "forward", 2)
    assert float(divergence(student, teacher, settings())) == pytest.approx(expected, rel=1e-6)
    assert float(divergence(teacher, student, settings())) == pytest.approx(
        pairs.divergence(teacher[:, :20], student, "forward", 2), rel=1e-6
    )


@pytest.mark.parametrize(
    ("kind", "temperature", "how"),
    [
        *[(kind, 2, "forward") for kind in TASKS], ("t5", 1, "reverse"), ("t5", 4, "jensen-shannon"), ("llama", 4, "reverse"),
        ("gpt2", 1, "jensen-shannon"), ("bert", 4, "reverse"),
    ],
)  # fmt: skip
def test_a_step_is_the_mean_over_the_positions_that_count(tmp_path, losses, kind, temperature, how):
    """The reference reads one example at a time, so it has no padding; batches of two and steps of six are the method's own."""
    teacher, student = two(kind, tmp_path)
    seen = examples(label=kind == "bert")
    student_model, teacher_model = (load_model(source(folder, kind), "cpu").double() for folder in (student, teacher))
    apart, hard, count = 0.0, 0.0, 0
    with torch.no_grad():
        for example in seen:
            inputs, where, target = inputs_of(student_model, make_tokenizer(), example)
            mine, theirs = (counted(model(**inputs).logits, where) for model in (student_model, teacher_model))
            apart += pairs.divergence(mine, theirs, how, temperature)
            hard += float(cross_entropy(mine, target, reduction="sum"))
            count += len(target)
    weights = {"logits_weight": 0.7, "label_weight": 0.3}
    distil(
        "logits", bundle(student, kind), teacher, steps=1, batch_size=2, accumulate=3, divergence=how, temperature=temperature, **weights
    )
    assert len(losses) == 3
    assert sum(losses) == pytest.approx((0.7 * apart + 0.3 * hard) / count, abs=1e-6, rel=1e-6)
    assert apart / count > 0.01


@pytest.mark.parametrize("kind", TASKS)
def test_the_student_comes_nearer_and_the_teacher_stays(tmp_path, monkeypatch, losses, kind):
    teacher, student = two(kind, tmp_path)
    seen, plain = [], _pair.frozen
    monkeypatch.setattr(_pair, "frozen", lambda *arguments: seen.append(plain(*arguments)) or seen[-1])
    trained, _ = distil("logits", bundle(student, kind), teacher, steps=30, batch_size=6, learning_rate=1e-2, label_weight=0)
    assert losses[-1] < 0.5 * losses[0]
    (teacher_model,) = seen
    whole = load_model(source(teacher, kind), "cpu").state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in teacher_model.state_dict().items())
    assert not teacher_model.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher_model.parameters())
    assert not trained.model.training


def test_a_teacher_that_is_the_student_teaches_nothing(tmp_path, losses):
    teacher, _ = two("llama", tmp_path)
    distil("logits", bundle(teacher, "llama"), teacher, steps=1, batch_size=6, label_weight=0)
    assert losses == [pytest.approx(0, abs=1e-6)]


def test_zeros_stay(tmp_path):
    teacher, student = two("llama", tmp_path)
    for keep, expected in ((True, 0.5), (False, 0.0)):
        toy = bundle(student, "llama")
        weight = toy.model.model.layers[0].mlp.up_proj.weight
        weight.data[::2] = 0
        after, _ = distil("logits", toy, teacher, steps=3, batch_size=3, learning_rate=1e-2, keep_zeros=keep)
        assert float((after.model.model.layers[0].mlp.up_proj.weight == 0).double().mean()) == expected


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_a_killed_distillation_ends_as_if_it_had_not_been(tmp_path, often, kind):
    teacher, student = two(kind, tmp_path)
    how = {"steps": STEPS, "batch_size": 2, "learning_rate": 1e-2}
    left, steps = outlives_a_kill(lambda told: distil("logits", bundle(student, kind), teacher, told, **how)[0], tmp_path / "scratch", 4)
    assert left == ["checkpoint-3"]
    assert steps == [4, 5, 6, 7]


def test_a_student_that_is_another_model_is_trained_in_its_stead(tmp_path):
    teacher, student = two("llama", tmp_path, num_hidden_layers=1)
    trained, _ = distil("logits", bundle(teacher, "llama"), teacher, student={"id": str(student)}, steps=1, batch_size=2)
    assert len(trained.model.model.layers) == 1
    trained.save(tmp_path / "made")
    assert load_model(source(tmp_path / "made", "llama"), "cpu").config.num_hidden_layers == 1


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("t5", {"num_layers": 1}), ("t5", {"num_decoder_layers": 1}), ("bart", {"encoder_layers": 1, "d_model": 32}), ("llama", {"num_hidden_layers": 1}),
        ("gpt2", {"n_layer": 1}), ("bert", {"num_hidden_layers": 1, "hidden_size": 32}),
    ],
)  # fmt: skip
def test_a_student_with_fresh_weights(toys, tmp_path, kind, changes):
    how = {"student": {"config": changes}, "steps": 1, "batch_size": 2, "seed": 3}
    first, second = (distil("logits", bundle(toys[kind], kind), toys[kind], **how)[0].model for _ in range(2))
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert {key: getattr(first.config, key) for key in changes} == changes
    teacher = bundle(toys[kind], kind).model
    assert sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in teacher.parameters())
    first.save_pretrained(tmp_path)
    again = load_model(source(tmp_path, kind), "cpu")
    if again.can_generate():
        assert again.generation_config.max_new_tokens == 7
        again.generate(input_ids=torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False)


def test_a_config_that_there_is_not_is_refused(toys):
    for kind, changes, message in (
        ("t5", {"num_layer": 1}, "has no 'num_layer'; near it are num_layers"),
        ("t5", {"d_model": "wide"}, "makes no t5"),
        ("llama", {"num_key_value_heads": 3}, "makes no llama"),
        ("llama", {"num_hidden_layers": 0}, "it would have no blocks"),
        ("llama", {"vocab_size": 10}, "vocab_size stays as it is"),
        ("bert", {"id2label": {0: "a"}}, "id2label stays as it is"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            distil("logits", bundle(toys[kind], kind), toys[kind], student={"config": changes})


@pytest.mark.parametrize("kind", ["bart", "gpt2"])
def test_keys_go_by_the_names_that_most_configs_give_them(toys, kind):
    trained, _ = distil("logits", bundle(toys[kind], kind), toys[kind], student={"config": {"num_hidden_layers": 1}}, steps=1, batch_size=2)
    assert trained.model.config.num_hidden_layers == 1


def other_words(folder, kind, count):
    """A model with a tokenizer of other words."""
    model = make_model(kind)
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"word{n}" for n in range(count)])
    tokenizer.save_pretrained(folder)
    return folder


def test_another_vocabulary_is_refused_with_both_sizes_and_two_ways_out(toys, tmp_path):
    other = other_words(tmp_path, "llama", 5)
    with pytest.raises(
        ModelError,
        match=r"teacher .* has 28 tokens, the student .* has 23, and 23 have the same id .* `distill: sequence` .* `distill: universal`",
    ):
        distil("logits", bundle(toys["llama"], "llama"), other)


def test_another_padding_of_the_embedding_is_no_other_vocabulary(toys, tmp_path, losses):
    wide = bundle(toys["llama"], "llama").model
    wide.resize_token_embeddings(72)
    distil("logits", bundle(toys["llama"], "llama"), saved(wide, tmp_path), steps=1, batch_size=6, label_weight=0)
    assert losses == [pytest.approx(0, abs=1e-5)]


def test_other_labels_and_other_tasks_are_refused(toys, tmp_path):
    many = make_model("bert").config
    many.num_labels = 3
    folder = saved(type(make_model("bert"))(many), tmp_path)
    with pytest.raises(ModelError, match=r"has the labels LABEL_0, LABEL_1, LABEL_2, the student .* has LABEL_0, LABEL_1; a teacher with"):
        distil("logits", bundle(toys["bert"], "bert"), folder)
    with pytest.raises(ModelError, match="serves seq2seq, and the recipe's task is causal-lm"):
        distil("logits", bundle(toys["llama"], "llama"), toys["llama"], teacher={"id": str(toys["bart"])})


def test_no_targets_are_needed_where_they_weigh_nothing(toys):
    bare = [Example(example.id, example.prompt, []) for example in examples()]
    for kind in ("bert", "llama"):
        distil("logits", bundle(toys[kind], kind), toys[kind], context(examples=bare), steps=1, batch_size=2, label_weight=0)
    for kind, weight in (("bert", 0.5), ("t5", 0)):
        with pytest.raises(DataError, match="none of the 6 examples of the train split has a target"):
            distil("logits", bundle(toys[kind], kind), toys[kind], context(examples=bare), label_weight=weight)


def test_what_is_left_out_and_what_is_cut_is_counted(toys):
    seen = [*examples(), Example("6", "red cat", []), Example("7", "the " * 100, ["dog"]), Example("8", "the", ["dog " * 100])]
    _, told = distil("logits", bundle(toys["t5"], "t5"), toys["t5"], context(examples=seen), steps=1, batch_size=2)
    assert "2 of the 9 examples were longer than 32 tokens and were cut at an end" in told.said
    assert "1 of 9 examples have no target and were left out" in told.said


def test_examples_are_cut_to_the_teachers_context_too(tmp_path):
    _, student = two("gpt2", tmp_path)
    short = make_model("gpt2").config
    short.n_positions = 8
    folder = saved(type(make_model("gpt2"))(short), tmp_path / "short")
    _, told = distil("logits", bundle(student, "gpt2"), folder, steps=1, batch_size=2)
    assert any(sentence.endswith("were longer than 8 tokens and were cut at an end") for sentence in told.said)


def test_a_loss_that_is_no_number_stops_at_once_and_names_step_and_examples(tmp_path):
    teacher, student = two("llama", tmp_path)
    broken = bundle(teacher, "llama").model
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    folder, seen = saved(broken, tmp_path / "broken"), []
    told = Context("cpu", until(None, seen), examples(), 32)
    with pytest.raises(
        RunError,
        match=r"the loss became nan in step 1 of 500, on the examples \d, \d; nothing was learned yet, so it comes from model, teacher",
    ):
        distil("logits", bundle(student, "llama"), folder, told, steps=500, batch_size=2)
    assert seen == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student": {}}, "either id or config is expected"),
        ({"student": {"id": "x", "config": {"n": 1}}}, "either id or config is expected"),
        ({"logits_weight": 0}, "`finetune: full` learns the targets alone"),
        ({"temperature": 0}, r"greater than or equal to 0\.01"),
        ({"temperature": 1e200}, "less than or equal to 100"),
        ({"student": {"config": {"n": 1}, "revision": "x"}}, "revision is of an id"),
        ({"divergence": "backward"}, "'forward', 'reverse' or 'jensen-shannon'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        settings(**options)
