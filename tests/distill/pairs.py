"""Toy teachers and students, and distillation written out in float64 one example at a time, without padding or batches."""

import pytest
import torch

from compress.methods import Context, find
from compress.model.source import Source
from tests.blocks import bundle, context, examples, saved
from tests.conftest import TASKS
from tests.finetune.loops import calm
from tests.test_training import Killed, checkpoints, until


def source(folder, kind, dtype="float32"):
    return Source(str(folder), TASKS[kind], dtype)


def distil(method, stage_model, original, told=None, **settings):
    """The bundle after `distill: method`, and what was told meanwhile.

    original   a folder; what the recipe's own model is
    """
    module, task = find("distill", method), stage_model.source.task
    chosen = module.Settings(**settings)
    told = told or context(examples=examples(label=task == "sequence-classification"))
    told.models["original"] = Source(str(original), task, "float32")
    told.models.update({role: Source(other.id, task, other.dtype, bits=other.bits) for role, other in chosen.models().items()})
    return module.apply(stage_model, chosen, told), told


def outlives_a_kill(distilled, scratch, step, max_tokens=32):
    """Asserts that a training which is killed at a step and taken up again ends bitwise as one that is not.

    distilled   gives a bundle, from the context that it is told

    Gives the checkpoints that the killed one left, and the steps that were taken afterwards.
    """

    def run(scratch, kill=None):
        seen = []
        told = Context("cpu", until(kill, seen), examples(), max_tokens, scratch=scratch)
        return distilled(told).model.state_dict(), seen

    whole, _ = run(None)
    with pytest.raises(Killed):
        run(scratch, step)
    left = checkpoints(scratch)
    resumed, steps = run(scratch)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    return left, steps


def two(kind, folder, **changes):
    """Folders of a lively teacher and of another student without dropout; `changes` are of the student's config."""
    teacher = calm(kind, folder / "teacher")
    student = calm(kind, folder / "student", **changes)
    model = bundle(student, kind).model
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.tie_weights()
    return teacher, saved(model, folder / "student" / kind)


def speaker(kind, folder):
    """A folder with a model that says words of the tokenizer, and not the same to everybody."""
    model = bundle(calm(kind, folder, vocab_size=23), kind).model
    with torch.no_grad():
        for parameter in model.parameters():
            if kind == "t5" and len(parameter) == 23:
                parameter.mul_(0.1)  # else it has two favourites
            elif kind != "t5" and parameter.ndim > 1:
                parameter.mul_(4 if kind == "llama" else 8)
    return saved(model, folder / kind)


def inputs_of(model, tokenizer, example):
    """One example as the model is called with it, which of its positions count, and their targets."""
    end, answer = tokenizer.eos_token_id, example.references[0]
    ids = tokenizer(example.prompt, add_special_tokens=False).input_ids
    if model.config.model_type == "bert":
        return {"input_ids": torch.tensor([[*ids, end]])}, None, torch.tensor([int(answer)])
    target = [*tokenizer(answer, add_special_tokens=False).input_ids, end]
    if model.config.is_encoder_decoder:
        decoder_ids = torch.tensor([[model.config.decoder_start_token_id, *target[:-1]]])
        return {"input_ids": torch.tensor([[*ids, end]]), "decoder_input_ids": decoder_ids}, slice(None), torch.tensor(target)
    return {"input_ids": torch.tensor([[*ids, *target]])}, slice(len(ids) - 1, -1), torch.tensor(target)


def counted(logits, where):
    """The logits that count, (positions, vocabulary)."""
    return logits if where is None else logits[0, where]


def softened(logits, temperature):
    weights = ((logits - logits.max(-1, keepdim=True).values) / temperature).exp()
    return weights / weights.sum(-1, keepdim=True)


def kl(p, q):
    return float((p * (p / q).log()).sum())


def divergence(student, teacher, kind, temperature):
    """The textbook's sums over the vocabulary, in float64, of all positions."""
    q, p = softened(student.double(), temperature), softened(teacher.double(), temperature)
    apart = {"forward": kl(p, q), "reverse": kl(q, p), "jensen-shannon": (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2}
    return temperature**2 * apart[kind]
