"""The student learns the teacher's hidden states layer by layer, and if wanted its attention maps, besides its distributions.

Jiao et al. 2020, "TinyBERT" (mean squared error of the hidden states, through a learned projection where
the widths differ); Wang et al. 2020, "MiniLM" (divergence of the attention maps). The loss is a weighted sum; a weight of 0 leaves a part
out. The projection is dropped at the end. Attention maps need as many heads in both models. They are learned without dropout, which would
show in them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from compress import methods
from compress.distill._settings import DISTILLED, LogitsSettings
from compress.errors import InputError, ModelError
from compress.methods import Context
from compress.model.loading import Bundle

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from compress.training.material import Batch

ABOUT = DISTILLED
Number = Annotated[int, Field(ge=0)]
Layers = dict[Number, Number]
PREFIXES = {"encoder": "encoder_", "decoder": "decoder_", "blocks": ""}  # of what a model's output calls the states of a stack


class StackLayers(methods.Settings):
    """Which layers learn from which, in either stack of an encoder-decoder."""

    encoder: Layers = Field({}, description="maps layers of the student's encoder to the teacher's")
    decoder: Layers = Field({}, description="maps layers of the student's decoder to the teacher's")

    @model_validator(mode="after")
    def _some(self) -> "StackLayers":
        if not self.encoder and not self.decoder:
            raise ValueError("names no layer: give encoder, decoder or both a map such as {1: 2}")
        return self


class Settings(LogitsSettings):
    hidden_weight: float = Field(1.0, ge=0, description="weight of the hidden states' mean squared error, the mean over the layers")
    attention_weight: float = Field(0.0, ge=0, description="weight of the attention maps' divergence, the mean over the layers")
    layers: Annotated[Layers, Field(min_length=1)] | StackLayers | None = Field(
        None,
        description="maps layers of the student to the teacher's, counted from 1, 0 being the embedding; of an encoder-decoder as"
        " {encoder: {1: 2}, decoder: {1: 3}}; null spreads the student's evenly over the teacher's",
    )

    @model_validator(mode="after")
    def _some(self) -> "Settings":
        if not self.hidden_weight and not self.attention_weight:
            raise ValueError("hidden_weight and attention_weight are both 0, which is `distill: logits`; give one of them more")
        return self


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The student, trained.

    Raises ModelError where teacher and student can't be compared, and InputError for a student that can't be made or layers that there
    aren't. Raises DataError where there is too little to learn from, and RunError where the loss is no longer a number.
    """
    import torch
    from torch import nn

    from compress.calibration.stream import padded, without_cache
    from compress.distill._divergence import divergence, with_targets
    from compress.distill._pair import pair, read_by_both, split_or_whole
    from compress.training.loop import train_all
    from compress.training.material import IGNORED

    teacher, student = pair(bundle, settings, context)
    student_model, taught, maps = student.model, split_or_whole(teacher, settings, context), settings.attention_weight > 0
    asked = {"output_hidden_states": True, "output_attentions": maps}

    def loss(model: Any, batch: "Batch") -> "Tensor":
        if maps:
            model.eval()
        with torch.no_grad():
            output = taught(**batch.inputs, **asked)
            teacher_layers = _seen(output, {role: list(pairs.values()) for role, pairs in links.items()})
            teacher_logits = batch.counted(output.logits)
            del output  # and with it the layers that nobody learns from
        output = model(**batch.inputs, **asked)
        student_layers, student_logits = _seen(output, {role: list(pairs) for role, pairs in links.items()}), batch.counted(output.logits)
        total = with_targets(divergence(student_logits, teacher_logits, settings), student_logits, batch, settings)
        count = (batch.labels != IGNORED).reshape(len(batch.labels), -1).sum(dim=-1)
        for role in links:
            real = batch.inputs["decoder_attention_mask" if role == "decoder" else "attention_mask"].bool()
            learned = getattr(model, "module", model).projections
            project = learned[role] if role in learned else nn.Identity()
            for (states, attention), (teacher_states, teacher_attention) in zip(student_layers[role], teacher_layers[role], strict=True):
                if settings.hidden_weight:
                    error = states_apart(project(states.float()), teacher_states.float())
                    total = total + settings.hidden_weight / layers * over(error, real, count)
                if attention is not None and teacher_attention is not None:
                    total = total + settings.attention_weight / mapped * over(maps_apart(attention, teacher_attention), real, count)
        return total

    with without_cache(taught), _with_maps(taught, maps), _with_maps(student_model, maps):
        material = read_by_both(student, teacher, context)
        probe = padded(student_model, [material.train[0][1:]])
        with torch.no_grad():
            student_output = student_model(**probe, **asked)
            teacher_output = taught(**{name: tensor.to(taught.device) for name, tensor in probe.items()}, **asked)
        links = linked(_stacks(student_output), _stacks(teacher_output), settings)
        pairs_of_layers = [pair for pairs in links.values() for pair in pairs.items()]
        layers, mapped = len(pairs_of_layers), sum(1 for layer, teachers in pairs_of_layers if layer and teachers)
        torch.manual_seed(settings.seed)
        student_model.projections = nn.ModuleDict()  # a part of the student while it is trained, so that checkpoints have it
        for role in links:
            width, teacher_width = (_states(output, role)[0].shape[-1] for output in (student_output, teacher_output))
            if width != teacher_width:
                student_model.projections[role] = nn.Linear(width, teacher_width, bias=False, device=student_model.device)
        try:
            train_all(student_model, material, settings, context, loss, settings.needs_targets(student_model.config.is_encoder_decoder))
        finally:
            del student_model.projections
    return student


def states_apart(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """The mean squared error of hidden states, (examples, tokens, width), at each token: (examples, tokens)."""
    return (student - teacher).pow(2).mean(dim=-1)


def maps_apart(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """KL(teacher, student) in nats of attention maps, (examples, heads, tokens, tokens), the mean over heads: (examples, tokens)."""
    import torch
    from torch.nn.functional import kl_div

    student = student.float().clamp(min=torch.finfo(torch.float32).tiny).log()  # what a mask hides is 0 in both
    return kl_div(student, teacher.float(), reduction="none").sum(dim=-1).mean(dim=1)


def over(error: "Tensor", real: "Tensor", count: "Tensor") -> "Tensor":
    """Each example's mean over its real tokens, times its positions that count in the logits, summed.

    So the trainer's division by all positions that count leaves a mean in which an example weighs as it does in the logits' part. How
    examples are put into batches makes no difference.

    error, real   (examples, tokens)
    count         (examples)
    """
    means = error.masked_fill(~real, 0).sum(dim=-1) / real.sum(dim=-1)
    return (means * count).sum()


def linked(student: dict[str, tuple[int, int | None]], teacher: dict[str, tuple[int, int | None]], settings: Settings) -> dict[str, Layers]:
    """Which layer of the teacher each layer of the student learns from, by stack.

    student, teacher   blocks and heads of each stack; None where heads don't matter

    Raises InputError for layers that there aren't, ModelError where attention maps differ in their heads.
    """
    links: dict[str, Layers] = {}
    for role, (blocks, heads) in student.items():
        teacher_blocks, teacher_heads = teacher[role]
        if heads != teacher_heads:
            raise ModelError(f"attention_weight: maps of {heads} heads can't be compared with the teacher's {teacher_heads}; leave it at 0")
        pairs = {number: max(1, round(number * teacher_blocks / blocks)) for number in range(1, blocks + 1)}
        if isinstance(settings.layers, StackLayers) and role != "blocks":
            pairs = settings.layers.encoder if role == "encoder" else settings.layers.decoder
        elif settings.layers is not None:
            if isinstance(settings.layers, StackLayers) or role != "blocks":
                form = "{1: 2}" if role == "blocks" else "{encoder: {1: 2}, decoder: {1: 2}}"
                raise InputError(f"layers: this model has {' and '.join(student)}; write them as {form}")
            pairs = settings.layers
        for side, numbers, last in (("student", pairs, blocks), ("teacher", pairs.values(), teacher_blocks)):
            if beyond := [number for number in numbers if number > last]:
                raise InputError(f"layers: the {side} has no layer {beyond[0]}; the last of its {role} is {last}, and 0 is the embedding")
        if pairs:
            links[role] = pairs
    if settings.attention_weight and not any(layer and teachers for pairs in links.values() for layer, teachers in pairs.items()):
        raise InputError("attention_weight: layer 0 is the embedding, which has no attention map; name others under layers")
    return links


def _stacks(output: Any) -> dict[str, tuple[int, int | None]]:
    """Blocks, and heads where there are maps, of each stack that a model's output shows."""
    roles = ("encoder", "decoder") if "encoder_hidden_states" in output else ("blocks",)
    return {role: (len(_states(output, role)) - 1, maps[0].shape[1] if (maps := _maps(output, role)) else None) for role in roles}


def _seen(output: Any, layers: dict[str, list[int]]) -> "dict[str, list[tuple[Tensor, Tensor | None]]]":
    """Hidden states and attention map, None where there is none, of these layers of each stack."""
    return {
        role: [(_states(output, role)[n], maps[n - 1] if n and (maps := _maps(output, role)) else None) for n in numbers]
        for role, numbers in layers.items()
    }


def _states(output: Any, role: str) -> "tuple[Tensor, ...]":
    states: tuple[Tensor, ...] = output[f"{PREFIXES[role]}hidden_states"]
    return states


def _maps(output: Any, role: str) -> "tuple[Tensor, ...] | None":
    maps: tuple[Tensor, ...] | None = output.get(f"{PREFIXES[role]}attentions")
    return maps


@contextmanager
def _with_maps(model: "PreTrainedModel", maps: bool) -> Iterator[None]:
    """The model with attention that shows its maps, which faster kinds never hold in memory."""
    usual = model.config._attn_implementation
    if maps:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if maps:
            model.set_attn_implementation(usual)
