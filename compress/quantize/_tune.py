"""Quantisation with a last phase end to end, in which integers stay and the real numbers beside them learn: scales, norms and biases.

The second phase of Chen et al. 2024, "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", on the
uncompressed model's distributions in place of targets. A layer's error is made up for by layers that a solver of single blocks doesn't
see, without a bit more in the files. The whole model is in memory twice, as it was and with a byte a weight. Optimiser states take next to
nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, linear, log_softmax

from compress.calibration.block import Block
from compress.calibration.stream import without_cache
from compress.calibration.walk import Storage
from compress.methods import TUNE_BATCH, Context, Optimisation
from compress.model.loading import Bundle
from compress.quantize._calibrated import files_of, quantise
from compress.quantize._grid import Grid, Kind, TunedSettings
from compress.quantize._solution import Quantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.training.material import Batch, Loss

LEARNING_RATE = 3e-3  # of scales as shares of what they were, and of norms and biases


def quantise_and_tune(
    bundle: Bundle, settings: TunedSettings, context: Context, solve: Callable[[Block], None], targets: bool = False, blind: bool = False
) -> Bundle:
    """The model with every layer as `solve` sets it, then tuned as long as the settings say, packed in the format that they say.

    Raises what `quantise` and `train` raise.
    """
    files = files_of(settings)
    if not settings.tune:
        return quantise(bundle, settings, context, files, solve, targets, blind)
    stores: list[_Unpacked] = []

    def unpacked(model: "PreTrainedModel", kinds: dict[str, Kind]) -> Storage:
        stores.append(_Unpacked(files(model, kinds)))
        return stores[-1]

    model = quantise(bundle, settings, context, unpacked, solve, targets, blind).model
    _tune(bundle, model, settings, context)
    for name, module in list(model.named_modules()):
        if isinstance(module, _Scaled):
            model.set_submodule(name, stores[-1].files.packed(name, module.layer(), module.solution()))
    stores[-1].files.describe(model)
    return bundle.holding(model)


def divergence_from(original: "PreTrainedModel") -> "Loss":
    """The loss that is the divergence from a model's distributions, in nats, summed over positions; without dropout."""

    def loss(model: Any, batch: "Batch") -> Tensor:
        model.eval()  # rounding is noise enough
        with torch.no_grad():
            reference = batch.logits_of(original)
        return kl_div(log_softmax(batch.logits_of(model), -1), log_softmax(reference, -1), log_target=True, reduction="sum")

    return loss


class _Unpacked:
    """Solved layers in a form that learns, until they are tuned and go to their files."""

    def __init__(self, files: Storage):
        self.files, self.bits = files, files.bits

    def packed(self, name: str, layer: nn.Linear, solution: Quantised) -> nn.Module:
        return _Scaled(layer, solution)

    def describe(self, model: "PreTrainedModel") -> None:
        """Not yet."""


class _Scaled(nn.Module):
    """A linear layer of integers (rows, columns), uint8, whose scales are multiplied by a learned factor, (rows, groups)."""

    integers: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, layer: nn.Linear, solution: Quantised):
        super().__init__()
        self._grid, self._dtype = solution.grid, layer.weight.dtype
        self.in_features, self.out_features = layer.in_features, layer.out_features
        for name, tensor in {"integers": solution.integers, "scale": solution.grid.scale, "zero": solution.grid.zero}.items():
            self.register_buffer(name, tensor.cpu(), persistent=False)
        self.factor = nn.Parameter(torch.ones_like(self.scale))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.data)

    def grid(self) -> Grid:
        return replace(self._grid, scale=self.scale * self.factor.detach(), zero=self.zero)

    def solution(self) -> Quantised:
        return Quantised(self.grid(), self.integers)

    def layer(self) -> nn.Linear:
        """The layer that it stands for, without weights."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self._dtype)
        layer.bias = self.bias
        return layer

    @property
    def weight(self) -> Tensor:
        """Some models look at its dtype."""
        return self.grid().values(self.integers)

    def forward(self, states: Tensor) -> Tensor:
        product: Tensor = _Product.apply(states, self.factor, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """States times a weight that is unpacked for the moment, in both directions; what lasts is a byte a weight."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, factor: Tensor, layer: _Scaled) -> Tensor:
        kind = states.device.type
        states = states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states
        ctx.save_for_backward(states)
        ctx.layer = layer
        return linear(states, layer.weight.to(states.dtype))

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        (states,), layer = ctx.saved_tensors, ctx.layer
        slope = slope.to(states.dtype)
        of_weight = (slope.flatten(end_dim=-2).t() @ states.flatten(end_dim=-2)).float()
        steps = replace(layer.grid(), scale=layer.scale).values(layer.integers)
        of_factor = (of_weight * steps).view(*layer.scale.shape, -1).sum(dim=2)
        return slope @ layer.weight.to(states.dtype), of_factor, None


def _tune(bundle: Bundle, model: "PreTrainedModel", settings: TunedSettings, context: Context) -> None:
    """Train what isn't an integer, in place: of the solved layers the scales, elsewhere what has one dimension."""
    from compress.training.loop import train  # the Trainer, which takes seconds to import
    from compress.training.material import read

    original, stored = bundle.model.requires_grad_(False), {name: part.dtype for name, part in model.named_parameters()}
    model.to(device=bundle.device, dtype=torch.float32).requires_grad_(False)
    for name, part in model.named_parameters():
        part.requires_grad_(part.ndim == 1 or name.endswith(".factor"))
    how = Optimisation(steps=settings.tune, batch_size=min(TUNE_BATCH, len(context.examples)), learning_rate=LEARNING_RATE)
    with without_cache(original):
        train(model, read(model, bundle.tokenizer, context), how, 0, context, divergence_from(original), needs_targets=False)
    for name, part in model.to("cpu").named_parameters():
        if not name.endswith(".factor"):
            part.data = part.data.to(stored[name])
