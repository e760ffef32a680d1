"""The integer grid that weights are rounded to: ranges per row or per group of columns, rounding, and its way back.

A weight W of shape (rows, columns) has a scale and a zero point of shape (rows, groups); w is stored as the integer
q = clamp(round(w / scale) + zero, 0, 2^bits - 1) and read as scale (q - zero). Symmetric grids have their zero in the middle.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress import methods
from compress.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Linear

PER_ROW = -1
PACKED = methods.About(
    at_run_time="transformers unpacks the weights at loading, so it gains on disk only; servers with fused kernels (vLLM) keep them packed",
    packages=("compressed-tensors",),
    extra="quant",
    calibrated=True,
    packs=True,
)


class GridSettings(methods.Settings):
    """What every method that stores weights on an integer grid can be told."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[32, 64, 128, -1] = Field(128, description="columns that share a scale; -1 is a scale a row")
    symmetric: bool = False
    ignore: list[str] | None = Field(None, description="layers left alone; null leaves the heads alone")


@dataclass(frozen=True)
class Grid:
    """Scale and zero point for a weight, both float32 of shape (rows, groups)."""

    bits: int
    symmetric: bool
    scale: "Tensor"
    zero: "Tensor"

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def columns(self, count: int) -> "tuple[Tensor, Tensor]":
        """Scale and zero for each of `count` columns, (rows, count)."""
        size = count // self.scale.shape[1]
        return self.scale.repeat_interleave(size, dim=1), self.zero.repeat_interleave(size, dim=1)

    def integers(self, weight: "Tensor") -> "Tensor":
        """The nearest integers, float dtype, in 0 to 2^bits - 1."""
        scale, zero = self.columns(weight.shape[1])
        return (weight.float() / scale + zero).round().clamp(0, self.top)

    def values(self, integers: "Tensor") -> "Tensor":
        """What integers stand for, float32."""
        scale, zero = self.columns(integers.shape[1])
        return (integers - zero) * scale

    def rounded(self, weight: "Tensor") -> "Tensor":
        """The weight rounded to nearest."""
        return self.values(self.integers(weight))


def group_columns(columns: int, group_size: int) -> int:
    """The group size in columns that a layer gets: the wanted one where it divides the layer's width, else the whole row."""
    return group_size if group_size != PER_ROW and columns % group_size == 0 else columns


def require_whole_groups(layers: "dict[str, Linear]", settings: GridSettings) -> None:
    """Refuse a group size that doesn't divide a layer where the layer can't have a scale a row instead.

    Plain transformers reads asymmetric grids only where all layers have one kind of them. Raises InputError with the way out.
    """
    odd = [
        f"{name} ({layer.in_features})"
        for name, layer in layers.items()
        if group_columns(layer.in_features, settings.group_size) != settings.group_size
    ]
    if settings.group_size != PER_ROW and odd and not settings.symmetric:
        raise InputError(
            f"group_size: {settings.group_size} does not divide the width of {len(odd)} layers: {', '.join(odd[:3])}; use symmetric: true"
            " (those layers then get a scale a row), group_size: -1, or list them under ignore"
        )


def fit(weight: "Tensor", settings: GridSettings, bits: int, importance: "Tensor | None" = None) -> Grid:
    """The grid of each group, its range searched: of 80 shrinkings of the full range the one with the least error.

    importance   a weight for each column's squared error, (columns,), such as its input's mean square; None weighs all alike

    Shrinking the range costs the largest weights some clipping and gives all others a finer step (Frantar et al. 2022 search so).
    """
    import torch

    rows, columns = weight.shape
    size = group_columns(columns, settings.group_size)
    groups = weight.float().reshape(rows, columns // size, size)
    weights = torch.ones(1, columns // size, size) if importance is None else importance.float().reshape(1, columns // size, size)
    weights = weights.to(weight.device)
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    best = torch.full(low.shape, float("inf"), device=weight.device)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for step in range(80):
        shrink = 1 - step / 100
        tried_scale, tried_zero = _grid_of(low * shrink, high * shrink, bits, settings.symmetric)
        integers = (groups / tried_scale[..., None] + tried_zero[..., None]).round().clamp(0, 2**bits - 1)
        error = (((integers - tried_zero[..., None]) * tried_scale[..., None] - groups).square() * weights).sum(dim=2)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, tried_scale, scale), torch.where(better, tried_zero, zero)
    return Grid(bits, settings.symmetric, scale, zero)


def _grid_of(low: "Tensor", high: "Tensor", bits: int, symmetric: bool) -> "tuple[Tensor, Tensor]":
    """Scale and zero of ranges that include 0."""
    import torch

    if symmetric:
        high = torch.maximum(high, -low)
        scale = (2 * high / (2**bits - 1)).clamp(min=1e-10)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-10)
    return scale, (-low / scale).round()
