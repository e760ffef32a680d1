"""The teacher writes the targets once, whatever its vocabulary; what is written outlives a kill; then cross-entropy."""

import json

import pytest
import torch

from compress import writing
from compress.distill import sequence
from compress.errors import DataError, ModelError
from compress.methods import Context, Example, find, quiet
from tests.blocks import bundle, context, examples
from tests.conftest import make_model, make_tokenizer
from tests.distill.pairs import distil, speaker, two
from tests.finetune.loops import tune
from tests.test_training import Killed

GENERATIVE = ("t5", "bart", "llama", "gpt2")


def chosen(**keywords):
    return find("distill", "sequence").Settings(**{"max_new_tokens": 5, "batch_size": 2, **keywords})


@pytest.mark.parametrize("kind", GENERATIVE)
@pytest.mark.parametrize("beams", [1, 3])
def test_the_targets_are_what_the_teacher_alone_makes_of_each_prompt(tmp_path, kind, beams):
    teacher = speaker(kind, tmp_path)
    toy = bundle(teacher, kind)
    targets = sequence.written(toy, chosen(num_beams=beams), context())
    for example, now in zip(examples(), targets, strict=True):
        ids = torch.tensor([toy.tokenizer(example.prompt, add_special_tokens=toy.model.config.is_encoder_decoder).input_ids])
        out = toy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, num_beams=beams, do_sample=False, pad_token_id=0
        )
        out = out[0, 0 if toy.model.config.is_encoder_decoder else ids.shape[1] :]
        assert now.prompt == example.prompt
        assert now.references == ([text] if (text := toy.tokenizer.decode(out, skip_special_tokens=True)).strip() else [])
    assert sum(bool(example.references) for example in targets) >= 3


def test_samples_are_drawn_with_the_seed(tmp_path):
    teacher = speaker("llama", tmp_path)
    draws = [sequence.written(bundle(teacher, "llama"), chosen(sampling_temperature=1.5, seed=seed), context()) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("kind", GENERATIVE)
def test_what_is_trained_is_what_fine_tuning_on_those_targets_makes(tmp_path, kind):
    _, student = two(kind, tmp_path / "pair")
    teacher = speaker(kind, tmp_path)
    how = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, "seed": 5}
    trained, _ = distil("sequence", bundle(student, kind), teacher, **how, max_new_tokens=5)
    targets = sequence.written(bundle(teacher, kind), chosen(num_beams=4), context())
    expected = tune(bundle(student, kind), "full", context(examples=[e for e in targets if e.references]), **how)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in trained.model.state_dict().items())


def test_a_teacher_of_another_vocabulary_teaches_by_text(toys, tmp_path):
    model, tokenizer = make_model("gpt2"), make_tokenizer()
    tokenizer.add_tokens(["word"])
    with torch.no_grad():
        model.lm_head.weight[5:9] += 1
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    distil("sequence", bundle(toys["llama"], "llama"), tmp_path, steps=1, batch_size=2, max_new_tokens=4)


class Stops:
    """Progress that ends the process at a line of its own."""

    def __init__(self, at):
        self.at, self.lines = at, []

    def __call__(self, what, done, total):
        self.lines.append((what, done, total))
        if len(self.lines) == self.at:
            raise Killed


@pytest.mark.parametrize("temperature", [None, 1.5])
@pytest.mark.parametrize("half", [False, True])
def test_what_was_written_before_a_kill_is_not_written_again(tmp_path, monkeypatch, temperature, half):
    teacher = speaker("llama", tmp_path)
    settings, scratch, calls, plain = chosen(sampling_temperature=temperature), tmp_path / "scratch", [], writing.write
    monkeypatch.setattr(writing, "write", lambda *arguments: calls.append(arguments[1]) or plain(*arguments))
    whole = sequence.written(bundle(teacher, "llama"), settings, Context("cpu", quiet, examples(), 32))
    assert len(calls) == 3
    with pytest.raises(Killed):
        sequence.written(bundle(teacher, "llama"), settings, Context("cpu", Stops(3), examples(), 32, scratch=scratch))
    assert len(calls) == 5
    file = scratch / sequence.WRITTEN
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 4
    if half:
        file.write_text(file.read_text()[:-3])
    again = Stops(None)
    assert sequence.written(bundle(teacher, "llama"), settings, Context("cpu", again, examples(), 32, scratch=scratch)) == whole
    assert len(calls) == (7 if half else 6)
    assert again.lines[-1] == ("the teacher writes", 6, 6)
    assert len(file.read_text().splitlines()) == (7 if half else 6)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_where_the_teacher_writes_nothing_nothing_is_learned(toys, tmp_path, monkeypatch, kind):
    teacher = speaker(kind, tmp_path)
    monkeypatch.setattr(writing, "write", lambda model, prompts, *how: [[1], *[[5, 1]] * (len(prompts) - 1)])
    told = context()
    distil("sequence", bundle(toys[kind], kind), teacher, told, num_beams=1, max_new_tokens=5, batch_size=3, steps=1)
    assert "the teacher wrote nothing on 2 of 6 examples, which were left out" in told.said
    assert any("steps of 3 on 4 examples" in sentence for sentence in told.said)
    monkeypatch.setattr(writing, "write", lambda model, prompts, *how: [[1]] * len(prompts))
    with pytest.raises(DataError, match="the teacher wrote nothing on any of the 6 examples"):
        distil("sequence", bundle(toys[kind], kind), teacher, num_beams=1, max_new_tokens=5)


def test_prompts_leave_room_for_what_is_written(toys):
    seen = [Example("0", "the cat " * 40, ["dog"]), *examples(2)]
    told = context(examples=seen, max_tokens=512)
    sequence.written(bundle(toys["gpt2"], "gpt2"), chosen(max_new_tokens=30), told)
    assert told.said == ["1 of the 3 examples were longer than 34 tokens and were cut at an end"]
    with pytest.raises(DataError, match="max_new_tokens: 64 does not fit the teacher's context of 64 tokens"):
        sequence.written(bundle(toys["gpt2"], "gpt2"), chosen(max_new_tokens=64), told)


def test_classifiers_are_refused(toys):
    with pytest.raises(ModelError, match="a classifier writes no text"):
        distil("sequence", bundle(toys["bert"], "bert"), toys["bert"])
