"""The student learns the teacher's distributions, softened by a temperature, and the targets beside them.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network". At each position of the targets, the divergence of the two distributions
times the temperature squared, plus `label_weight` times the cross-entropy. Recovers what pruning lost, or makes a smaller model of a
larger one. Teacher and student have one vocabulary. In memory: the student as in `finetune: full`, and the teacher's weights.
"""

from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from compress.distill._settings import DISTILLED, LogitsSettings
from compress.methods import Context
from compress.model import Bundle

if TYPE_CHECKING:
    from torch import Tensor

    from compress.training import Batch

ABOUT = DISTILLED


class Settings(LogitsSettings):
    @model_validator(mode="after")
    def _some(self) -> "Settings":
        if not self.logits_weight:
            raise ValueError("logits_weight is 0, so the teacher says nothing; `finetune: full` learns the targets alone")
        return self


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The student, trained.

    Raises ModelError where teacher and student can't be compared, InputError where there can't be such a student, DataError where there is
    too little to learn from, RunError where the loss is no longer a number.
    """
    import torch

    from compress.calibration.stream import without_cache
    from compress.distill._divergence import with_targets
    from compress.distill._pair import pair, read, trained

    teacher, student = pair(bundle, settings, context)

    def loss(model: Any, batch: "Batch") -> "Tensor":
        with torch.no_grad():
            known = batch.logits_of(teacher.model)
        return with_targets(batch.logits_of(model), known, batch, settings)

    with without_cache(teacher.model):
        material = read(student, teacher, context)
        return trained(
            student, material, settings, context, loss, known=settings.label_weight > 0 or student.model.config.is_encoder_decoder
        )
