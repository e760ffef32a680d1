"""The student learns how sure the teacher is at each position; vocabularies may differ, since sorted probabilities are compared.

Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs". Each model reads the
examples by its own tokenizer. Position n of the student's target is compared with position n of the teacher's, up to the end of the
shorter one. The absolute differences of the sorted probabilities are summed; the smaller vocabulary is filled up with zeros. The
cross-entropy with the targets is added. Which token is probable isn't passed, and where the tokenizers cut a target differently positions
drift apart. So the targets do most of the teaching. The paper's are answers that the teacher wrote; here they are the train split's. In
memory: what `distill: logits` needs, and both distributions sorted.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from compress.distill._settings import WRITING, DistillSettings, Temperature
from compress.errors import DataError, ModelError
from compress.methods import Context
from compress.model.loading import Bundle

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibration.stream import Row
    from compress.training.material import Batch

ABOUT = WRITING


class Settings(DistillSettings):
    universal_weight: float = Field(1.5, gt=0, description="weight of the sorted probabilities' differences; 1.5 is the paper's")
    label_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy with the targets, which are needed in any case")
    temperature: Temperature = Field(1.0, description="logits are divided by this before they become distributions")


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The student, trained.

    Raises ModelError for a classifier, and InputError for a student that can't be made. Raises DataError where there is too little to learn
    from, and RunError where the loss is no longer a number.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from compress.calibration.stream import without_cache
    from compress.distill._pair import frozen, student_of, teacher_of
    from compress.training.loop import train_all
    from compress.training.material import IGNORED, Material, batch_of

    teacher, student = teacher_of(settings, context), student_of(bundle, settings, context)
    if not student.model.can_generate():
        raise ModelError(f"{student.source.id}: a classifier has no vocabulary; `distill: logits` is for classifiers")
    taught = frozen(teacher)
    student_rows, teacher_rows = matched(student, teacher, context)
    student_validation, teacher_validation = (
        matched(student, teacher, replace(context, examples=context.validation)) if context.validation else ([], [])
    )
    material, teacher_rows = Material(student_rows, student_validation, student.tokenizer), [*teacher_rows, *teacher_validation]

    def loss(model: Any, batch: "Batch") -> "Tensor":
        """Summed over positions. The trainer divides by all of the student's, those beyond the teacher's target included."""
        teacher_batch = batch_of(taught, [teacher_rows[number] for number in batch.numbers], batch.numbers, needs_targets=True)
        with torch.no_grad():
            teacher_logits = teacher_batch.logits_of(taught)
        student_logits = batch.logits_of(model)
        sides = ((student_logits, batch), (teacher_logits, teacher_batch))
        ours, theirs = (torch.split(logits, (side.labels != IGNORED).sum(dim=1).tolist()) for logits, side in sides)
        apart = [distance(a[: len(b)], b[: len(a)], settings.temperature) for a, b in zip(ours, theirs, strict=True)]
        targets_part = cross_entropy(student_logits, batch.targets, reduction="sum")
        return settings.universal_weight * sum(apart) + settings.label_weight * targets_part

    with without_cache(taught):
        train_all(student.model, material, settings, context, loss, needs_targets=True)
        return student


def distance(student_logits: "Tensor", teacher_logits: "Tensor", temperature: float) -> "Tensor":
    """The absolute differences of the sorted probabilities, summed over ranks and positions; at most 2 a position.

    student_logits, teacher_logits   (positions, vocabulary of each)
    """
    from torch.nn.functional import pad, softmax

    size = max(student_logits.shape[-1], teacher_logits.shape[-1])
    student, teacher = (softmax(logits / temperature, -1).sort(descending=True).values for logits in (student_logits, teacher_logits))
    return (pad(student, (0, size - student.shape[-1])) - pad(teacher, (0, size - teacher.shape[-1]))).abs().sum()


def matched(student: Bundle, teacher: Bundle, context: Context) -> "tuple[list[Row], list[Row]]":
    """The examples with a target by the student's tokenizer, and the same ones, in the same order, by the teacher's.

    Plain texts are left out: where one tokenizer puts a token before them and the other doesn't, position n is not the same in both.

    Raises DataError where none is left, and what `encoded` raises.
    """
    from compress.calibration.stream import encoded

    count = len(context.examples)
    with_target = [example for example in context.examples if any(example.references[:1])]
    if not with_target:
        raise DataError(f"training: none of the {count} examples has a target; look at data.target")
    if lacking := count - len(with_target):
        context.say(f"{lacking:,} of {count:,} examples have no target and were left out")
    by_teacher = replace(context, examples=with_target, said=[])
    teacher_rows = {id(row[0]): row for row in encoded(teacher.model, teacher.tokenizer, by_teacher) if _has_both(teacher, row)}
    for sentence in by_teacher.said:
        context.say(f"by the teacher's tokenizer, {sentence}")
    by_student = replace(context, examples=with_target)
    student_rows = [row for row in encoded(student.model, student.tokenizer, by_student) if _has_both(student, row)]
    student_rows = [row for row in student_rows if id(row[0]) in teacher_rows]
    if not student_rows:
        raise DataError(f"training: none of the {len(with_target)} targets has tokens and a prompt by both tokenizers; look at data.prompt")
    if lost := len(with_target) - len(student_rows):
        context.say(
            f"{lost:,} of the {len(with_target):,} targets have no tokens or no prompt by one of the two tokenizers and were left out"
        )
    return student_rows, [teacher_rows[id(row[0])] for row in student_rows]


def _has_both(bundle: Bundle, row: "Row") -> bool:
    """Whether a row has a target, and for a decoder a token before it."""
    _, ids, answer = row
    return bool(answer) and (bundle.model.config.is_encoder_decoder or len(ids) > len(answer))
