"""The student writes, and learns the teacher's distributions on what it wrote: it is corrected where it goes astray by itself.

Agarwal et al. 2024, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (generalised knowledge
distillation). `student_share` of the sequences are sampled from the student as it is just then; the others are the targets of the train
split. On both the loss is the divergence at each position. Teacher and student have one vocabulary. Writing takes most of the time.
"""

import random
from typing import TYPE_CHECKING, Any

from pydantic import Field

from compress.distill._settings import WRITING, Divergence, DivergenceSettings, Temperature
from compress.methods import Context
from compress.model.loading import Bundle

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibration.stream import Row
    from compress.training.material import Batch

ABOUT = WRITING


class Settings(DivergenceSettings):
    divergence: Divergence = Field("jensen-shannon", description="as for `distill: logits`")
    temperature: Temperature = Field(1.0, description="logits are divided by this before they become distributions")
    student_share: float = Field(0.5, ge=0, le=1, description="the share of the sequences that the student writes; 1 needs no targets")
    max_new_tokens: int = Field(64, ge=1, le=2**20, description="the most tokens that the student writes")


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The student, trained.

    Raises ModelError where teacher and student can't be compared or write nothing, and InputError for a student that can't be made. Raises
    DataError where there is too little to learn from, and RunError where the loss is no longer a number.
    """
    import torch

    from compress.calibration.stream import without_cache
    from compress.distill._divergence import divergence
    from compress.distill._pair import frozen, pair, read_by_both
    from compress.structure import context_length
    from compress.training.loop import train_all
    from compress.writing import prompt_of, write, writer

    teacher, student = pair(bundle, settings, context)
    student_model, taught = writer(student), frozen(teacher)
    both, on_gpu = bool(student_model.config.is_encoder_decoder), [student_model.device] if student_model.device.type == "cuda" else []
    rooms = [context_length(side.model.config, side.tokenizer) for side in (teacher, student)]
    room = min((room for room in rooms if room is not None), default=None)

    def left(prompt: list[int]) -> int:
        """The tokens that may be written behind a prompt."""
        taken = 1 if both else len(prompt)  # an encoder-decoder's first one starts it
        return settings.max_new_tokens if room is None else min(settings.max_new_tokens, room - taken)

    def rewrite(rows: "list[Row]", done: int) -> "list[Row]":
        draw = random.Random(f"{settings.seed} {done} {[example.id for example, _, _ in rows]}")
        prompts = {number: prompt_of(student_model, row) for number, row in enumerate(rows) if draw.random() < settings.student_share}
        prompts = {number: prompt for number, prompt in prompts.items() if prompt and left(prompt) > 0}
        if not prompts:
            return rows
        with torch.random.fork_rng(on_gpu):
            torch.manual_seed(draw.getrandbits(63))
            texts = write(student_model, list(prompts.values()), min(map(left, prompts.values())), num_beams=1, temperature=1.0)
        new = list(rows)
        for (number, prompt), text in zip(prompts.items(), texts, strict=True):
            new[number] = (rows[number][0], prompt if both else [*prompt, *text], text)
        return new

    def loss(model: Any, batch: "Batch") -> "Tensor":
        with torch.no_grad():
            teacher_logits = batch.logits_of(taught)
        return divergence(batch.logits_of(model), teacher_logits, settings)

    with without_cache(taught):
        train_all(student.model, read_by_both(student, teacher, context), settings, context, loss, settings.student_share < 1, rewrite)
        return student
