"""Quantisation-aware training: weights are rounded in every forward pass, and they and their scales learn to live with it.

Esser et al. 2020, "Learned Step Size Quantization" (LSQ), with the straight-through estimator (Bengio et al. 2013). Learns from the
recipe's targets or from the uncompressed model's own distributions, on the calibration examples: give `calibration.samples` a few
thousand. What stands outside the blocks stays as it is. The whole model is in memory, with gradients and optimiser states. Best at 2
and 3 bits.
"""

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress.methods import Context, Optimisation
from compress.model.loading import Bundle
from compress.quantize._grid import PACKED, Grid, GridSettings, fit

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compress.training.material import Batch

ABOUT = replace(PACKED, trains=True, experts=False)


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

    from compress.architectures.gpt2 import as_linear
    from compress.calibration.walk import check_dtype, layers_in_blocks
    from compress.quantize._bits import plan, sized
    from compress.quantize._calibrated import files_of
    from compress.structure import block_stacks

    settings = sized(bundle, settings, context, apart=False)
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
        if isinstance(part, nn.Linear) and name not in kinds:  # left out, so not trained either
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

    sign = grid.scale.sign()

    class Rounded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(grid.scale.abs())

        def solution(self, weight: "Tensor") -> Quantised:
            learned = replace(grid, scale=self.scale.detach().clamp(min=1e-10) * sign)
            return Quantised(learned, learned.integers(weight * kept))

        def forward(self, weight: "Tensor") -> "Tensor":
            # the step sizes' gradient is large beside the weights': LSQ divides it by the root of weights a step times levels
            share = (grid.scale.numel() / (weight.numel() * grid.top)) ** 0.5
            scale = (self.scale * share + (self.scale * (1 - share)).detach()).clamp(min=1e-10) * sign
            scale, zero = replace(grid, scale=scale).columns(weight.shape[1])
            levels = weight * kept / scale + zero
            inside = levels.clamp(0, grid.top)
            return (inside + (inside.round() - inside).detach() - zero) * scale

    return Rounded()


def _train(
    model: "PreTrainedModel", original: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", settings: Settings, context: Context
) -> None:
    """Train every parameter that requires a gradient, in place."""
    from compress.calibration.stream import without_cache
    from compress.quantize._tune import divergence_from
    from compress.training.loop import train
    from compress.training.material import read, targets_loss

    def from_targets(model: Any, batch: "Batch") -> "Tensor":
        model.eval()  # without dropout: rounding is noise enough
        return targets_loss(model, batch)

    loss = from_targets if settings.loss == "targets" else divergence_from(original)

    how = Optimisation(steps=settings.steps, batch_size=settings.batch_size, learning_rate=settings.learning_rate)
    with without_cache(original):
        train(model, read(model, tokenizer, context), how, settings.seed, context, loss, settings.loss == "targets")


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
