"""Quantisation-aware training: weights are rounded in every forward pass, and they and their scales learn to live with it.

Esser et al. 2020, "Learned Step Size Quantization" (LSQ), with the straight-through estimator (Bengio et al. 2013). Learns from the
recipe's targets or from the uncompressed model's own distributions, on the calibration examples: give `calibration.samples` a few
thousand. What stands outside the blocks stays as it is. The whole model is in memory, with gradients and optimiser states. Best at 2
and 3 bits.
"""

import copy
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress.architecture import label_number
from compress.methods import Context, Example
from compress.model import Bundle
from compress.quantize._grid import PACKED, Grid, GridSettings, fit

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ABOUT = PACKED


class Settings(GridSettings):
    loss: Literal["targets", "teacher"] = Field("teacher", description="cross-entropy with the targets, or divergence from the original")
    steps: int = Field(500, ge=1)
    batch_size: int = Field(8, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    seed: int = Field(0, ge=0, lt=2**32)


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with packed integer weights.

    Raises DataError when there is nothing to learn from, ModelError for T5 in float16.
    """
    import torch
    from torch import nn
    from torch.nn.utils import parametrize

    from compress.architecture import as_linear, block_stacks
    from compress.calibration.walk import check_dtype, layers_in_blocks
    from compress.quantize._bits import plan
    from compress.quantize._calibrated import files_of

    check_dtype(bundle.model)
    original = as_linear(bundle.model).requires_grad_(False)
    model = copy.deepcopy(original).float()
    stacks = block_stacks(model)
    layers = layers_in_blocks(model, stacks, settings, context)
    kinds = plan(bundle, model, settings, context, layers)
    store = files_of(settings)(model, kinds)
    for stack in stacks.values():
        stack.requires_grad_(True)
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and name not in kinds:  # left out, so left as it is
            part.requires_grad_(False)
    rounded = {}
    for name, kind in kinds.items():
        weight = layers[name].weight.data
        rounded[name] = _rounded(fit(weight, settings, kind.bits), weight != 0 if settings.keep_zeros else torch.ones_like(weight))
    for name, rounding in rounded.items():
        parametrize.register_parametrization(layers[name], "weight", rounding)
    _train(model, original, bundle.tokenizer, settings, context)
    solved = {}
    errors = _errors(original, model, rounded, bundle.tokenizer, context)
    for name, rounding in rounded.items():
        layer = layers[name]
        solved[name] = rounding.solution(layer.parametrizations.weight.original.data)  # type: ignore
        parametrize.remove_parametrizations(layer, "weight")
        context.note(name, kinds[name].bits, errors.get(name))
    model = model.to(original.dtype)
    for name, solution in solved.items():
        model.set_submodule(name, store.packed(name, layers[name], solution))
    store.describe(model.to("cpu"))
    return bundle.holding(model)


def _rounded(grid: Grid, kept: "Tensor") -> Any:
    """A weight's parametrization: rounded to a grid whose scale is learned; zero where it isn't kept, (rows, columns)."""
    import torch

    from compress.quantize._solution import Quantised

    class Rounded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(grid.scale.clone())

        def solution(self, weight: "Tensor") -> Quantised:
            learned = replace(grid, scale=self.scale.detach().clamp(min=1e-10))
            return Quantised(learned, learned.integers(weight * kept))

        def forward(self, weight: "Tensor") -> "Tensor":
            # the step sizes' gradient is large beside the weights': LSQ divides it by the root of weights a step times levels
            share = (grid.scale.numel() / (weight.numel() * grid.top)) ** 0.5
            scale = (self.scale * share + (self.scale * (1 - share)).detach()).clamp(min=1e-10)
            scale, zero = replace(grid, scale=scale).columns(weight.shape[1])
            wanted = weight * kept / scale + zero
            inside = wanted.clamp(0, grid.top)
            return (inside + (inside.round() - inside).detach() - zero) * scale

    return Rounded()


def _train(
    model: "PreTrainedModel", original: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", settings: Settings, context: Context
) -> None:
    """Train what wants a gradient, in place, by Hugging Face's Trainer."""
    import torch
    from torch.nn.functional import cross_entropy, kl_div, log_softmax
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from compress.calibration.stream import encoded, padded, without_cache

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            context.progress("training", state.global_step, settings.steps)

    class Learn(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            model.eval()  # without dropout: rounding is noise enough
            wanted = inputs.pop("labels")
            logits = model(**inputs).logits
            real = wanted != -100
            logits, wanted = logits[real].float(), wanted[real]
            if settings.loss == "targets":
                loss = cross_entropy(logits, wanted)
            else:
                with torch.no_grad():
                    known = original(**inputs).logits[real].float()
                loss = kl_div(log_softmax(logits, -1), log_softmax(known, -1), log_target=True, reduction="batchmean")
            return (loss, logits) if return_outputs else loss

    def collate(rows: list[tuple[Example, list[int], list[int]]]) -> dict[str, Any]:
        inputs = padded(model, [(ids, answer) for _, ids, answer in rows])
        return {**inputs, "labels": _labels(model, inputs, rows, settings.loss == "targets")}

    rows = encoded(model, tokenizer, context)
    on_gpu = model.device.type == "cuda"
    with tempfile.TemporaryDirectory() as scratch, without_cache(model), without_cache(original):
        arguments = TrainingArguments(
            output_dir=scratch, max_steps=settings.steps, per_device_train_batch_size=settings.batch_size, seed=settings.seed,
            learning_rate=settings.learning_rate, lr_scheduler_type="cosine", warmup_steps=settings.steps // 20, weight_decay=0.0,
            bf16=on_gpu, use_cpu=not on_gpu, remove_unused_columns=False, dataloader_pin_memory=False,
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        Learn(model, arguments, collate, train_dataset=rows, callbacks=[Watch()]).train()
    model.eval()


def _labels(
    model: "PreTrainedModel", inputs: dict[str, Any], rows: list[tuple[Example, list[int], list[int]]], known: bool = True
) -> "Tensor":
    """What each position of the logits should give, -100 where it counts for nothing; for classifiers one label an example."""
    import torch

    if not model.can_generate() and not known:  # any label will do to say that the position counts
        return torch.zeros(len(rows), dtype=torch.long, device=model.device)
    if not model.can_generate():
        return torch.tensor([label_number(model.config, (example.references or [""])[0]) for example, _, _ in rows], device=model.device)
    both = model.config.is_encoder_decoder
    labels = torch.full_like(inputs["decoder_input_ids" if both else "input_ids"], -100)
    for row, (_, ids, answer) in zip(labels, rows, strict=True):
        if both:
            row[: len(answer)] = torch.tensor(answer)
        else:  # position n gives token n + 1; plain texts are learned whole
            start = max(len(ids) - len(answer), 1) if answer else 1
            row[start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
    return labels


def _errors(
    original: "PreTrainedModel", model: "PreTrainedModel", names: Iterable[str], tokenizer: "PreTrainedTokenizerBase", context: Context
) -> dict[str, float]:
    """What each trained and rounded layer changes of its output on the calibration examples."""
    import torch

    from compress.calibration.lost import measuring
    from compress.calibration.stream import batches, without_cache

    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    weights: dict[str, Any] = {name: original.get_submodule(name).weight for name in names}
    with torch.no_grad(), without_cache(model), measuring(layers, weights, lambda states: states.flatten(end_dim=-2)) as errors:
        for inputs in batches(model, tokenizer, context):
            model(**inputs)
    return errors
