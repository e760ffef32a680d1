"""The student learns the teacher's distributions, softened by a temperature, and the targets beside them.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network". At each position of the targets, the divergence of the two distributions
times the temperature squared, plus `label_weight` times the cross-entropy. Recovers what pruning lost, or makes a smaller model of a
larger one. Teacher and student have one vocabulary. In memory: the student as in `finetune: full`, and the teacher's weights. With `top_k`
they are there one after the other, and then a step takes as long as one of `finetune: full`. With `shard: true` each process has its part
of both.
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
        description="how many of the teacher's likeliest tokens are kept on disk for each position, with the mass of all others, for all"
        " recipes; null runs the teacher at every step",
    )

    @model_validator(mode="after")
    def _some(self) -> "Settings":
        if not self.logits_weight:
            raise ValueError("logits_weight is 0, so nothing is learned from the teacher; `finetune: full` learns the targets alone")
        if self.shard and self.top_k is not None:
            raise ValueError(
                f"shard: true, and top_k is {self.top_k}, for which each process needs the whole teacher; leave one of the two out"
            )
        return self


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The student, trained.

    Raises ModelError where teacher and student can't be compared, and InputError for a student that can't be made. Raises DataError where
    there is too little to learn from, and RunError where the loss is no longer a number.
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
            student_logits = batch.logits_of(model)
            tokens, teacher_log_probabilities = kept.of(batch.numbers, settings.temperature, student_logits.device)
            apart = divergence_over(student_logits, tokens, teacher_log_probabilities, kept.asked.size, settings)
            return with_targets(apart, student_logits, batch, settings)

        train_all(student.model, material, settings, context, loss_from_disk, needed)
        return student

    taught = split_or_whole(teacher, settings, context)

    def loss(model: Any, batch: "Batch") -> "Tensor":
        with torch.no_grad():
            teacher_logits = batch.logits_of(taught)
        student_logits = batch.logits_of(model)
        return with_targets(divergence(student_logits, teacher_logits, settings), student_logits, batch, settings)

    with without_cache(taught):
        train_all(student.model, material, settings, context, loss, needed)
        return student
