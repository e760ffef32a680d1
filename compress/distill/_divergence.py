"""How far the student's distributions are from the teacher's.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; the divergences as in Agarwal et al. 2024, "On-Policy Distillation of
Language Models".
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from compress.distill._settings import DivergenceSettings, LogitsSettings
from compress.training.material import Batch


def divergence(student_logits: Tensor, teacher_logits: Tensor, settings: DivergenceSettings) -> Tensor:
    """The divergence in nats times the temperature squared, summed over the vocabulary and over positions.

    student_logits, teacher_logits   (positions, vocabulary). Of the longer ones the first are taken, since an embedding may be padded to
                                     a round size.
    """
    size = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student, teacher = (log_softmax(logits[..., :size] / settings.temperature, -1) for logits in (student_logits, teacher_logits))
    return _summed(student, teacher, settings)


def divergence_over(student_logits: Tensor, tokens: Tensor, teacher: Tensor, size: int, settings: DivergenceSettings) -> Tensor:
    """As `divergence`, over some tokens and "any other": only differences among the other tokens are lost.

    student_logits   (positions, vocabulary), of which the first `size` count
    tokens           (positions, k)
    teacher          log-probabilities at the temperature, (positions, k + 1), the last of any other token
    """
    student: Tensor = _SomeAndOther.apply(student_logits[..., :size], tokens, settings.temperature)  # type: ignore[no-untyped-call]
    return _summed(student.log_softmax(dim=-1), teacher, settings)


class _SomeAndOther(torch.autograd.Function):
    """Logits over the temperature of some tokens, and their like for "any other": (positions, k + 1).

    Vocabularies are large: autograd's own backward pass of a gather, a scatter and a division takes four times as long.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        softened = logits / temperature
        some = softened.gather(-1, tokens)
        other = softened.scatter_(-1, tokens, -math.inf).logsumexp(dim=-1, keepdim=True)
        ctx.save_for_backward(logits, tokens, other)
        ctx.temperature = temperature
        return torch.cat([some, other], dim=-1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens, other = ctx.saved_tensors
        share = (logits / ctx.temperature).sub_(other).exp_()  # of each other token in the mass of all others
        return share.mul_(slope[..., -1:]).scatter_(-1, tokens, slope[..., :-1]).div_(ctx.temperature), None, None


def _summed(student: Tensor, teacher: Tensor, settings: DivergenceSettings) -> Tensor:
    """The divergence of log-probabilities, (positions, events), summed, times the temperature squared."""
    if settings.divergence == "forward":
        total = _kl(teacher, student)
    elif settings.divergence == "reverse":
        total = _kl(student, teacher)
    else:
        middle = torch.logaddexp(student, teacher) - math.log(2)
        total = (_kl(teacher, middle) + _kl(student, middle)) / 2
    return total * settings.temperature**2  # gradients shrink with the temperature squared; this way one learning rate suits any


def with_targets(divergence_sum: Tensor, student_logits: Tensor, batch: Batch, settings: LogitsSettings) -> Tensor:
    """A divergence and the cross-entropy with the targets by their weights, summed over positions.

    student_logits   at the positions of the batch that count, (positions, vocabulary)
    """
    total = settings.logits_weight * divergence_sum
    if not settings.label_weight:  # there may be no targets
        return total
    return total + settings.label_weight * cross_entropy(student_logits, batch.targets, reduction="sum")


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) of log-probabilities, summed."""
    return kl_div(q, p, log_target=True, reduction="sum")
