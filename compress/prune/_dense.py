"""Pruned layers as the calibration pass leaves them: ordinary ones, with zeros."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from compress.calibration.block import Solution

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Pruned(Solution):
    """A weight (rows, columns) some of which is zero."""

    values: Tensor

    @property
    def sparsity(self) -> float:  # type: ignore[override]
        return zeros(self.values)

    def weight(self) -> Tensor:
        return self.values


class Dense:
    """Layers stored as they are, in the model's dtype."""

    def __init__(self, model: "PreTrainedModel", layers: dict[str, nn.Linear]):
        self.bits = {name: bits(layer.weight) for name, layer in layers.items()}

    def packed(self, name: str, layer: nn.Linear, solution: Pruned) -> nn.Module:
        module = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        module.weight, module.bias = nn.Parameter(layer.weight.data.cpu(), requires_grad=False), layer.bias
        return module.cpu() if module.bias is not None else module

    def describe(self, model: "PreTrainedModel") -> None:
        """Nothing: its config says all."""


def bits(weight: Tensor) -> int:
    """The bits that an element of this weight takes."""
    return 8 * weight.element_size()


def zeros(weight: Tensor) -> float:
    """The share of a weight's elements that are zero."""
    return float((weight == 0).double().mean())
