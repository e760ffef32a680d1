"""Teacher and student: located, and checked against each other before anything is trained."""

import difflib
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from compress.calibration.stream import padded
from compress.distill._settings import DistillSettings
from compress.errors import InputError, ModelError
from compress.methods import Context
from compress.model.loading import Bundle, skeleton, task_of
from compress.structure import block_stacks, context_length, size_cache_by_decoder
from compress.training.material import Material, read
from compress.training.sharded import split

FIXED = {
    "vocab_size", "model_type", "dtype", "is_encoder_decoder", "decoder_start_token_id", "pad_token_id", "eos_token_id",
    "id2label", "label2id",
}  # fmt: skip

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pair(bundle: Bundle, settings: DistillSettings, context: Context) -> tuple[Bundle, Bundle]:
    """Teacher, not yet loaded, and student.

    They give distributions over the same things: the same tokens by the same ids, or the same labels. Only how many rows an embedding is
    padded to may differ. Raises ModelError, and what `teacher_of` and `student_of` raise.
    """
    teacher, student = teacher_of(settings, context), student_of(bundle, settings, context)
    teacher_tokens, student_tokens = teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()
    if student_tokens != teacher_tokens:
        same = len(student_tokens.items() & teacher_tokens.items())
        way_out = "with any two, `distill: sequence` passes text and `distill: universal` compares sorted probabilities"
        if not student.model.can_generate():
            way_out = "a student with the teacher's tokenizer is expected"
        raise ModelError(
            f"the teacher {teacher.source.id} has {len(teacher_tokens):,} tokens, the student {student.source.id} has"
            f" {len(student_tokens):,}, and {same:,} have the same id in both, so their distributions can't be compared token by token;"
            f" {way_out}"
        )
    if not student.model.can_generate() and (labels := student.model.config.label2id) != teacher.config.label2id:
        raise ModelError(
            f"the teacher {teacher.source.id} has the labels {', '.join(teacher.config.label2id or {})},"
            f" the student {student.source.id} has {', '.join(labels or {})}; a teacher with the student's labels is expected"
        )
    return teacher, student


def teacher_of(settings: DistillSettings, context: Context) -> Bundle:
    """The teacher, not yet loaded. Raises ModelError."""
    return _other("teacher", settings, context) if settings.teacher else Bundle(context.models["original"], _place(settings, context))


def frozen(teacher: Bundle) -> "PreTrainedModel":
    """The teacher's model, without gradients and dropout."""
    return teacher.model.eval().requires_grad_(False)


def split_or_whole(teacher: Bundle, settings: DistillSettings, context: Context) -> "PreTrainedModel":
    """As `frozen`, split over the processes where the settings say so. Raises what `split` raises."""
    taught = frozen(teacher)
    if settings.sharded():
        split(taught, context)
        context.say(f"the teacher's weights were split over {context.processes} processes")
    return taught


def student_of(bundle: Bundle, settings: DistillSettings, context: Context) -> Bundle:
    """The student: the model as the stage finds it, another, or a fresh one.

    Raises ModelError where its weights are packed, InputError for keys that its config doesn't have or that make no model.
    """
    student = bundle
    if settings.student is not None:
        changes = settings.student.config
        student = _other("student", settings, context) if changes is None else _fresh(bundle, changes, settings.seed)
    if getattr(student.model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"{student.source.id}: packed weights can't be trained; distil first and quantise afterwards, or use quantize: qat"
        )
    return student


def read_by_both(student: Bundle, teacher: Bundle, context: Context) -> Material:
    """The examples by the student's tokenizer, as long as both models have room for. Raises DataError."""
    room = context_length(teacher.config, teacher.tokenizer) or context.max_tokens
    return read(student.model, student.tokenizer, replace(context, max_tokens=min(context.max_tokens, room)))


def _place(settings: DistillSettings, context: Context) -> str:
    """The device that models are loaded to."""
    return "cpu" if settings.sharded() else context.device


def _other(role: str, settings: DistillSettings, context: Context) -> Bundle:
    """A model that the settings name. Raises ModelError where it serves another task."""
    source = context.models[role]
    if (task := task_of(source)) != source.task:
        raise ModelError(f"{role}: {source.id} serves {task}, and the recipe's task is {source.task}; teacher and student need the same")
    return Bundle(source, _place(settings, context))


def _fresh(bundle: Bundle, changes: dict[str, Any], seed: int) -> Bundle:
    """The bundle with a model of the same kind in it that has a changed config and fresh weights."""
    bare: PreTrainedModel = skeleton(bundle.source)
    other_names = getattr(bare.config, "attribute_map", {})
    changes, original = {other_names.get(key, key): value for key, value in changes.items()}, bare.config.to_dict()
    for key in changes:
        if key not in original:
            near = difflib.get_close_matches(key, original, n=3) or sorted(original)
            raise InputError(f"student.config: a {bare.config.model_type} has no {key!r}; near it are {', '.join(near)}")
        if key in FIXED:
            raise InputError(f"student.config: {key} stays as it is, {original[key]!r}; change what says how large the model is")
    original.pop("layer_types", None)  # the kind of each block, worked out anew for another number of blocks
    torch.manual_seed(seed)
    try:
        config = type(bare.config).from_dict({**original, **changes})
        size_cache_by_decoder(config)
        model: PreTrainedModel = type(bare)(config)
        if not all(map(len, block_stacks(model).values())) or not block_stacks(model):
            raise ValueError("it would have no blocks")
        with torch.no_grad():  # some mistakes show only when it is run
            model(**padded(model, [([1, 2, 3], [1, 2] if model.can_generate() else [])]))
    except Exception as error:  # configs and models check themselves, each in its own way
        raise InputError(f"student.config: {changes} makes no {bare.config.model_type}: {error}") from None
    if model.can_generate():
        with suppress(OSError):  # a model may come without one
            model.generation_config = GenerationConfig.from_pretrained(bundle.source.id, revision=bundle.source.revision)
    return bundle.holding(model.to(device=bundle.device, dtype=bare.dtype).eval())
