"""The student writes as it is just then, the teacher scores what it wrote; a kill changes nothing."""

import pytest
import torch

from compress import writing
from compress.errors import DataError, ModelError
from compress.methods import Example
from compress.model.loading import load_model
from tests.blocks import bundle, context, examples, saved
from tests.conftest import make_model
from tests.distill import pairs
from tests.distill.pairs import distil, outlives_a_kill, source, two
from tests.test_training import STEPS

GENERATIVE = ("t5", "bart", "llama", "gpt2")


@pytest.fixture
def wrote(monkeypatch):
    """Prompts, texts and the student's weights of every time that it wrote."""
    seen, plain = [], writing.write

    def write(model, prompts, *how, **named):
        texts = plain(model, prompts, *how, **named)
        seen.append((prompts, texts, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        return texts

    monkeypatch.setattr(writing, "write", write)
    return seen


def by_hand(student, teacher, prompts, texts, kind, temperature):
    """The mean divergence over all that was written, each text read alone, in float64."""
    apart = positions = 0.0
    for prompt, text in zip(prompts, texts, strict=True):
        if student.config.is_encoder_decoder:
            start = [student.config.decoder_start_token_id, *text[:-1]]
            inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([start])}
        else:
            inputs = {"input_ids": torch.tensor([[*prompt, *text[:-1]]])}
        with torch.no_grad():
            student_logits, teacher_logits = (model(**inputs).logits[0, -len(text) :] for model in (student, teacher))
        apart += pairs.divergence(student_logits, teacher_logits, kind, temperature)
        positions += len(text)
    return apart / positions


@pytest.mark.parametrize("kind", GENERATIVE)
def test_the_loss_is_the_divergence_on_what_the_student_wrote(tmp_path, losses, wrote, kind):
    teacher, student = two(kind, tmp_path)
    how = {"divergence": "reverse", "temperature": 2, "student_share": 1, "max_new_tokens": 5}
    distil("on_policy", bundle(student, kind), teacher, steps=1, batch_size=3, accumulate=2, **how)
    prompts, texts = ([row for batch in wrote for row in batch[part]] for part in (0, 1))
    assert len(prompts) == 6
    assert max(map(len, texts)) <= 5
    student_model, teacher_model = (load_model(source(folder, kind), "cpu").double() for folder in (student, teacher))
    assert sum(losses) == pytest.approx(by_hand(student_model, teacher_model, prompts, texts, "reverse", 2), abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_the_student_writes_with_the_weights_of_the_step(tmp_path, wrote, kind):
    """Batches are made one ahead elsewhere; what is written must not be."""
    teacher, student = two(kind, tmp_path)
    trained, _ = distil(
        "on_policy", bundle(student, kind), teacher, steps=4, batch_size=1, accumulate=2, student_share=1, learning_rate=1e-2
    )
    name = "lm_head.weight" if kind == "t5" else "model.norm.weight"
    weights = [state[name] for _, _, state in wrote]
    assert len(weights) == 8
    assert all(torch.equal(weights[n], weights[n + 1]) for n in range(0, 8, 2)), "accumulated batches are of one step"
    assert not any(torch.equal(weights[n], weights[n + 2]) for n in range(6))
    assert torch.equal(weights[0], load_model(source(student, kind), "cpu").state_dict()[name])
    assert not torch.equal(weights[-1], trained.model.state_dict()[name])


@pytest.mark.parametrize(("share", "least", "most"), [(0, 0, 0), (0.5, 30, 66), (1, 96, 96)])
def test_the_share_that_the_student_writes(tmp_path, wrote, share, least, most):
    teacher, student = two("llama", tmp_path)
    distil("on_policy", bundle(student, "llama"), teacher, steps=16, batch_size=6, student_share=share, max_new_tokens=2)
    assert least <= sum(len(prompts) for prompts, _, _ in wrote) <= most


def test_it_is_drawn_anew_at_every_step(tmp_path, wrote):
    teacher, student = two("llama", tmp_path)
    told = context(examples=examples(1))
    distil("on_policy", bundle(student, "llama"), teacher, told, steps=24, batch_size=1, max_new_tokens=4)
    assert 4 <= len(wrote) <= 20
    assert len({tuple(texts[0]) for _, texts, _ in wrote}) > 2


def test_without_the_students_share_it_is_distill_logits(tmp_path):
    teacher, student = two("t5", tmp_path)
    how = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, "divergence": "jensen-shannon", "temperature": 1}
    on_policy, logits = (
        distil(method, bundle(student, "t5"), teacher, **how, **more)[0].model.state_dict()
        for method, more in (("on_policy", {"student_share": 0}), ("logits", {"label_weight": 0}))
    )
    assert all(torch.equal(on_policy[name], logits[name]) for name in on_policy)


@pytest.mark.parametrize("kind", GENERATIVE)
def test_the_student_comes_nearer(tmp_path, losses, kind):
    teacher, student = two(kind, tmp_path)
    distil("on_policy", bundle(student, kind), teacher, steps=30, batch_size=6, learning_rate=1e-2, student_share=1, max_new_tokens=4)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize(("kind", "accumulate", "kill"), [("t5", 1, 5), ("gpt2", 2, 4), ("gpt2", 2, 5)])  # amid an epoch, and at its end
def test_a_killed_training_ends_as_if_it_had_not_been(toys, tmp_path, often, kind, accumulate, kill):
    """The toys have dropout, which draws numbers too."""
    teacher, _ = two(kind, tmp_path)
    how = {"steps": STEPS, "batch_size": 2, "accumulate": accumulate, "learning_rate": 1e-2, "max_new_tokens": 4, "student_share": 1}
    outlives_a_kill(lambda told: distil("on_policy", bundle(toys[kind], kind), teacher, told, **how)[0], tmp_path / "scratch", kill)


@pytest.mark.parametrize("kind", GENERATIVE)
def test_targets_are_needed_only_where_they_are_learned_from(toys, wrote, kind):
    bare = [Example(example.id, example.prompt, []) for example in examples()]
    distil("on_policy", bundle(toys[kind], kind), toys[kind], context(examples=bare), steps=1, batch_size=6, student_share=1)
    assert len(wrote[0][0]) == 6
    assert all(1 not in prompt for prompt in wrote[0][0]) or kind in ("t5", "bart")
    if kind in ("t5", "bart"):
        with pytest.raises(DataError, match="none of the 6 examples"):
            distil("on_policy", bundle(toys[kind], kind), toys[kind], context(examples=bare))


def test_what_is_written_fits_the_context_of_both(tmp_path, wrote):
    _, student = two("gpt2", tmp_path)
    short = make_model("gpt2").config
    short.n_positions = 12
    folder = saved(type(make_model("gpt2"))(short), tmp_path / "short")
    distil("on_policy", bundle(student, "gpt2"), folder, steps=2, batch_size=2, student_share=1, max_new_tokens=50)
    assert wrote
    assert all(len(prompt) + len(text) <= 12 for prompts, texts, _ in wrote for prompt, text in zip(prompts, texts, strict=True))


def test_classifiers_are_refused(toys):
    with pytest.raises(ModelError, match="a classifier writes no text"):
        distil("on_policy", bundle(toys["bert"], "bert"), toys["bert"])
