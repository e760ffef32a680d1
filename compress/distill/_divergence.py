"""How far the student's distributions are from the teacher's.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; the divergences as in Agarwal et al. 2024, "On-Policy Distillation of
Language Models".
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from compress.distill._settings import DivergenceSettings, LogitsSettings
from compress.training import Batch


def divergence(told: Tensor, known: Tensor, settings: DivergenceSettings) -> Tensor:
    """The divergence in nats times the temperature squared, summed over the vocabulary and over positions.

    told, known   logits of the student and of the teacher, (positions, vocabulary); of the longer ones the first are taken, since an
                  embedding may be padded to a round size
    """
    size, temperature = min(told.shape[-1], known.shape[-1]), settings.temperature
    student, teacher = (log_softmax(logits[..., :size] / temperature, -1) for logits in (told, known))
    if settings.divergence == "forward":
        apart = _kl(teacher, student)
    elif settings.divergence == "reverse":
        apart = _kl(student, teacher)
    else:
        middle = torch.logaddexp(student, teacher) - math.log(2)
        apart = (_kl(teacher, middle) + _kl(student, middle)) / 2
    return apart * temperature**2  # gradients shrink with the temperature squared; so the learning rate suits any


def with_targets(told: Tensor, known: Tensor, batch: Batch, settings: LogitsSettings) -> Tensor:
    """The divergence and the cross-entropy with the targets by their weights, summed over positions.

    told, known   as for `divergence`, of the positions of the batch that count
    """
    total = settings.logits_weight * divergence(told, known, settings)
    if not settings.label_weight:  # there may be no targets
        return total
    return total + settings.label_weight * cross_entropy(told, batch.targets, reduction="sum")


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) of log-probabilities, summed."""
    return kl_div(q, p, log_target=True, reduction="sum")
