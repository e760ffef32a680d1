"""The student learns how sure the teacher is at each position; vocabularies may differ, since sorted probabilities are compared.

Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs". Each model reads the
examples by its own tokenizer. Position n of the student's target is held against position n of the teacher's, as far as the shorter of
the two goes: the absolute differences of the sorted probabilities, summed, the smaller vocabulary filled up with zeros. The
cross-entropy with the targets stands beside it. Which token is probable isn't passed, and where the tokenizers cut a target differently
positions drift apart, so the targets do most of the teaching; the paper's are answers that the teacher wrote, here they are the train
split's. In memory: what `distill: logits` needs, and both distributions sorted.
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
    universal_weight: float = Field(1.5, gt=0, description="of the sorted probabilities' differences; 1.5 is the paper's")
    label_weight: float = Field(1.0, ge=0, description="of the cross-entropy with the targets, which are needed in any case")
    temperature: Temperature = Field(1.0, description="logits are divided by this before they become distributions")


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The student, trained.

    Raises ModelError for a classifier, InputError where there can't be such a student, DataError where there is too little to learn from,
    RunError where the loss is no longer a number.
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
    mine, theirs = matched(student, teacher, context)
    watched, their_watched = matched(student, teacher, replace(context, examples=context.validation)) if context.validation else ([], [])
    material, theirs = Material(mine, watched, student.tokenizer), [*theirs, *their_watched]

    def loss(model: Any, batch: "Batch") -> "Tensor":
        """Summed over positions; divided by the trainer, a mean over the student's, those beyond the teacher's target with them."""
        shown = batch_of(taught, [theirs[number] for number in batch.numbers], batch.numbers, known=True)
        with torch.no_grad():
            known = shown.logits_of(taught)
        told = batch.logits_of(model)
        ours, others = (torch.split(part, (side.wanted != IGNORED).sum(dim=1).tolist()) for part, side in ((told, batch), (known, shown)))
        apart = [distance(one[: len(other)], other[: len(one)], settings.temperature) for one, other in zip(ours, others, strict=True)]
        return settings.universal_weight * sum(apart) + settings.label_weight * cross_entropy(told, batch.targets, reduction="sum")

    with without_cache(taught):
        train_all(student.model, material, settings, context, loss, known=True)
        return student


def distance(told: "Tensor", known: "Tensor", temperature: float) -> "Tensor":
    """The absolute differences of the sorted probabilities, summed over ranks and positions; at most 2 a position.

    told, known   logits of the student and of the teacher, (positions, vocabulary of each)
    """
    from torch.nn.functional import pad, softmax

    size = max(told.shape[-1], known.shape[-1])
    student, teacher = (softmax(logits / temperature, -1).sort(descending=True).values for logits in (told, known))
    return (pad(student, (0, size - student.shape[-1])) - pad(teacher, (0, size - teacher.shape[-1]))).abs().sum()


def matched(student: Bundle, teacher: Bundle, context: Context) -> "tuple[list[Row], list[Row]]":
    """The examples with a target by the student's tokenizer, and the same ones, in the same order, by the teacher's.

    Plain texts are left out: where one tokenizer puts a token before them and the other doesn't, position n is not the same in both.

    Raises DataError where none is left, and what `encoded` raises.
    """
    from compress.calibration.stream import encoded

    count = len(context.examples)
    shown = [example for example in context.examples if any(example.references[:1])]
    if not shown:
        raise DataError(f"training: none of the {count} examples has a target; look at data.target")
    if lacking := count - len(shown):
        context.say(f"{lacking:,} of {count:,} examples have no target and were left out")
    heard = replace(context, examples=shown, said=[])
    known = {id(row[0]): row for row in encoded(teacher.model, teacher.tokenizer, heard) if _has_both(teacher, row)}
    for said in heard.said:
        context.say(f"by the teacher's tokenizer, {said}")
    mine = [row for row in encoded(student.model, student.tokenizer, replace(context, examples=shown)) if _has_both(student, row)]
    mine = [row for row in mine if id(row[0]) in known]
    if not mine:
        raise DataError(f"training: none of the {len(shown)} targets is one, behind a prompt, to both tokenizers; look at data.prompt")
    if lost := len(shown) - len(mine):
        context.say(f"{lost:,} of the {len(shown):,} targets are none, or have no prompt, to one of the two tokenizers and were left out")
    return mine, [known[id(row[0])] for row in mine]


def _has_both(bundle: Bundle, row: "Row") -> bool:
    """Whether a row has a target, and before a decoder's first token of it another."""
    _, ids, answer = row
    return bool(answer) and (bundle.model.config.is_encoder_decoder or len(ids) > len(answer))
