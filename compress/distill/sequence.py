"""The teacher writes the targets, by beam search or by sampling, and the student learns them as it would learn any.

Kim and Rush 2016, "Sequence-Level Knowledge Distillation". The teacher goes on from each prompt of the train split once, before the
training; what is written survives a kill. It passes as text, so teacher and student may have different vocabularies. Then cross-entropy,
as in `finetune: full`, the teacher being out of memory.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from compress.distill._settings import WRITING, DistillSettings, Temperature
from compress.errors import DataError
from compress.methods import Context, Example
from compress.model.loading import Bundle

if TYPE_CHECKING:
    from compress.calibration.stream import Row

ABOUT = WRITING
WRITTEN = "written.jsonl"  # [number, text] of each example, a line each; every process has its own


class Settings(DistillSettings):
    num_beams: int = Field(
        4, ge=1, le=1000, description="beams of the search that writes the targets; 1 takes the likeliest token each time"
    )
    sampling_temperature: Temperature | None = Field(None, description="the temperature to sample at; null searches instead")
    max_new_tokens: int = Field(128, ge=1, le=2**20, description="the most tokens that the teacher writes for a target")

    @model_validator(mode="after")
    def _one_way(self) -> "Settings":
        if self.sampling_temperature is not None and "num_beams" in self.model_fields_set:
            raise ValueError("num_beams is for a search and sampling_temperature for sampling; one of the two is expected")
        return self

    def why_not_first(self) -> None:
        """A model can learn what it writes itself."""


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The student, trained on what the teacher wrote.

    Raises ModelError where the teacher writes nothing, and InputError for a student that can't be made. Raises DataError where there is too
    little to learn from, and RunError where the loss is no longer a number.
    """
    from compress.distill._pair import student_of, teacher_of
    from compress.training.loop import train_all
    from compress.training.material import read, targets_loss

    student = student_of(bundle, settings, context)
    examples = written(teacher_of(settings, context), settings, context)
    answered = [example for example in examples if example.references]
    if not answered:
        raise DataError(f"the teacher wrote nothing on any of the {len(examples)} examples; look at its generation config and data.prompt")
    if len(answered) < len(examples):
        context.say(f"the teacher wrote nothing on {len(examples) - len(answered):,} of {len(examples):,} examples, which were left out")
    material = read(student.model, student.tokenizer, replace(context, examples=answered))
    train_all(student.model, material, settings, context, targets_loss, needs_targets=True)
    return student


def written(teacher: Bundle, settings: Settings, context: Context) -> list[Example]:
    """The examples with what the teacher writes in the place of their references; goes on from what `context.scratch` has of it.

    Raises ModelError for a model that writes nothing, DataError where max_new_tokens leaves no room for a prompt.
    """
    import torch

    from compress.calibration.stream import encoded
    from compress.structure import context_length
    from compress.writing import prompt_of, write, writer

    model = writer(teacher)
    room, most = context_length(model.config, teacher.tokenizer), settings.max_new_tokens
    limit = context.max_tokens
    if room is not None:
        limit = min(limit, room if model.config.is_encoder_decoder else room - most)
        if limit < 1 or most >= room:
            raise DataError(f"max_new_tokens: {most} does not fit the teacher's context of {room} tokens")
    bare = [replace(example, references=[]) for example in context.examples]
    rows = encoded(model, teacher.tokenizer, replace(context, examples=bare, max_tokens=limit))
    texts, beams = _kept(context), 1 if settings.sampling_temperature else settings.num_beams
    mine = list(enumerate(_batches(rows, settings.batch_size), settings.seed))[context.rank :: context.processes]
    count = sum(len(numbers) for _, numbers in mine)
    for seed, numbers in mine:
        context.progress("the teacher writes", len(texts), count)
        if all(number in texts for number in numbers):
            continue
        torch.manual_seed(seed)
        answers = write(model, [prompt_of(model, rows[n]) for n in numbers], most, beams, settings.sampling_temperature)
        new = {n: teacher.tokenizer.decode(ids, skip_special_tokens=True) for n, ids in zip(numbers, answers, strict=True)}
        _keep(new, context)
        texts |= new
    context.progress("the teacher writes", count, count)
    texts = _of_all(texts, context)
    return [replace(example, references=[texts[number]] if texts[number].strip() else []) for number, (example, _, _) in enumerate(rows)]


def _batches(rows: "list[Row]", size: int) -> Iterator[list[int]]:
    """The numbers of the rows, longest prompts first, so that memory runs out at once or not at all."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number][1]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _of_all(texts: dict[int, str], context: Context) -> dict[int, str]:
    """What all processes wrote."""
    from torch.distributed import all_gather_object

    if context.processes == 1:
        return texts
    parts: list[dict[int, str]] = [{} for _ in range(context.processes)]
    all_gather_object(parts, texts)
    return {number: text for part in parts for number, text in part.items()}


def _file(context: Context) -> Path | None:
    """Where this process keeps what was written."""
    return context.scratch / f"{context.rank or ''}{WRITTEN}" if context.scratch else None


def _kept(context: Context) -> dict[int, str]:
    """What was written before a kill; a line that was cut off is deleted."""
    file = _file(context)
    if file is None or not file.exists():
        return {}
    lines = [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    os.truncate(file, sum(map(len, lines)))
    return dict(map(json.loads, lines))


def _keep(texts: dict[int, str], context: Context) -> None:
    if (place := _file(context)) is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("a", encoding="ascii") as file:
            file.writelines(f"{json.dumps(pair)}\n" for pair in texts.items())
