"""The student learns the teacher's distributions, softened by a temperature, and the targets beside them.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network". At each position of the targets, the divergence of the two distributions
times the temperature squared, plus `label_weight` times the cross-entropy. Recovers what pruning lost, or makes a smaller model of a
larger one. Teacher and student have one vocabulary. In memory: the student as in `finetune: full`, and the teacher's weights; with `top_k`
one after the other, and then a step takes as long as one of `finetune: full`; with `shard: true` each process has its part of both.
"""

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from compress.distill._settings import DISTILLED, LogitsSettings
from compress.methods import Context
from compress.model.loading import Bundle

if TYPE_CHECKING:
    from torch import Tensor

    from compress.training.material import Batch

ABOUT = DISTILLED


class Settings(LogitsSettings):
    top_k: int | None = Field(
        None,
        ge=1,
        description="the teacher's likeliest tokens at each position and the mass of all others are worked out once, kept on"
        " disk and shared by recipes; null runs the teacher at every step",
    )

    @model_validator(mode="after")
    def _some(self) -> "Settings":
        if not self.logits_weight:
            raise ValueError("logits_weight is 0, so the teacher says nothing; `finetune: full` learns the targets alone")
        if self.shard and self.top_k is not None:
            raise ValueError(
                f"shard: true, and top_k is {self.top_k}, for which each process asks a whole teacher by itself; leave one of the two out"
            )
        return self


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The student, trained.

    Raises ModelError where teacher and student can't be compared, InputError where there can't be such a student, DataError where there is
    too little to learn from, RunError where the loss is no longer a number.
    """
    import torch

    from compress.calibration.stream import without_cache
    from compress.distill._divergence import divergence, divergence_over, with_targets
    from compress.distill._pair import pair, read_by_both, split_or_whole
    from compress.distill._teacher_cache import teacher_cache
    from compress.training.loop import train_all

    teacher, student = pair(bundle, settings, context)
    material, needed = read_by_both(student, teacher, context), settings.needs_targets(student.model.config.is_encoder_decoder)
    if settings.top_k is not None:
        kept = teacher_cache(teacher, student.model, material, settings.top_k, settings.temperature, context)

        def loss_from_disk(model: Any, batch: "Batch") -> "Tensor":
            told = batch.logits_of(model)
            tokens, known = kept.of(batch.numbers, settings.temperature, told.device)
            return with_targets(divergence_over(told, tokens, known, kept.asked.size, settings), told, batch, settings)

        train_all(student.model, material, settings, context, loss_from_disk, needed)
        return student

    taught = split_or_whole(teacher, settings, context)

    def loss(model: Any, batch: "Batch") -> "Tensor":
        with torch.no_grad():
            known = batch.logits_of(taught)
        told = batch.logits_of(model)
        return with_targets(divergence(told, known, settings), told, batch, settings)

    with without_cache(taught):
        train_all(student.model, material, settings, context, loss, needed)
        return student
