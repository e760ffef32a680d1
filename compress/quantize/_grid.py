"""The integer grid that weights are rounded to: ranges per row or per group of columns, rounding, and its way back.

A weight W of shape (rows, columns) has a scale and a zero point of shape (rows, groups). An element w is stored as the integer
q = clamp(round(w / scale) + zero, 0, 2^bits - 1) and read as scale (q - zero). Symmetric grids have their zero in the middle, from which
one level more lies below than above. Where the largest weight is positive, the scale is negative, so that this weight has that level, as
in llama.cpp's Q4_0 and AutoRound. On SmolLM2 that takes 13 % off the mean square of what rounding to 4 bits changes, 14 % at 3 and 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from compress import gptq, methods

if TYPE_CHECKING:
    from torch import Tensor

PER_ROW = -1
SIZES = (128, 64, 32)  # columns; what fused kernels (vLLM's Marlin, gptqmodel's) know
WIDTHS = (2, 3, 4, 8)
CACHED = 2**16  # weights that stay in a CPU's cache
FULL, COARSE, FINE = (100,), range(100, 20, -4), (-2, -1, 1, 2)  # percent of a full range that are tried; the fine ones around the best
Width = Literal[2, 3, 4, 8]
IN_INT8 = (
    "products are in int8, which torchao computes more slowly than float32 on a CPU, even with int8 instructions (VNNI, AMX);"
    " benchmark.runtime.cpu_int8 takes faster kernels, and bnb_nf4 takes less memory"
)
PACKED = methods.About(
    at_run_time="transformers unpacks the weights at loading, so it gains on disk only; servers with fused kernels (vLLM) keep them packed,"
    " and so do format: gptq and, in transformers, bnb_nf4",
    packages=("compressed-tensors",),
    extra="quant",
    calibrated=True,
    packs=True,
    experts=True,
)


class GridSettings(methods.LayerSettings):
    """The settings of every method that stores weights on an integer grid."""

    bits: Width | Annotated[dict[str, Width], Field(min_length=1)] | Literal["auto"] = Field(
        4,
        description="for all layers; or by patterns of layers, of which the first that matches counts and others are left out; or auto, as"
        " each layer needs",
    )
    average_bits: float | None = Field(None, ge=2, le=8, description="the mean over all weights with bits: auto; null is 4")
    group_size: Literal[32, 64, 128, -1] | None = Field(
        None, description="columns that share a scale; -1 is a scale a row; null takes the largest that divides every layer worked on"
    )
    symmetric: bool | None = Field(
        None,
        description="zero in the middle of every range; false gives each range its own zero point; null is false, but true for mixtures,"
        " whose experts' zero points plain transformers can't read",
    )
    format: Literal["compressed-tensors", "gptq"] = Field(
        "compressed-tensors",
        description="the format of the files; gptq is for decoders and encoders; it runs packed in vLLM, and in transformers with"
        " gptqmodel's kernels",
    )

    keep_zeros: bool = Field(True, description="weights that pruning made zero stay zero")

    @model_validator(mode="after")
    def _go_together(self) -> "GridSettings":
        if self.average_bits is not None and self.bits != "auto":
            raise ValueError("average_bits only counts with bits: auto")
        if self.format == "gptq" and self.bits == "auto":
            raise ValueError("format: gptq holds one width, so bits: auto has no place in it")
        return self

    def sized(self, weights: Mapping[int, int]) -> Self:
        """These settings with a group size for layers of these shapes.

        There is one size for the model, since many readers know no more: plain transformers for encoder-decoders, GPTQ's files, fused
        kernels. Where none divides every layer, it is the one that divides most weights. GPTQ's files, which hold one kind of grid, then
        get a scale a row.

        weights   how many weights there are, by the columns of their layer
        """
        if self.group_size is not None:
            return self
        size = max(SIZES, key=lambda size: (_divided(weights, size), size))
        whole = _divided(weights, size) == sum(weights.values())
        fits = whole or (_divided(weights, size) and self.format != "gptq")
        return self.model_copy(update={"group_size": size if fits else PER_ROW})

    def about_shapes(self, weights: Mapping[int, int]) -> list[str]:
        size, total = self.sized(weights).group_size or PER_ROW, sum(weights.values())
        odd = [columns for columns in sorted(weights) if columns % size]
        row = f"{100 * (1 - _divided(weights, size) / total):.0f} % of the weights, in layers of {_listed(odd)} columns, have a scale a row"
        if self.group_size is not None:
            fitting = [other for other in SIZES if _divided(weights, other) == total]
            way_out = f"{fitting[0]} divides them all" if fitting else "leave group_size out for the one that divides most"
            return [f"group_size {size} does not divide every layer's columns: {row}, which is less exact; {way_out}"] if odd else []
        if size == PER_ROW:
            return [f"group_size is -1, a scale a row: 128, 64 and 32 do not divide the layers' {_listed(sorted(weights))} columns"]
        if odd:
            return [f"group_size is {size}, which divides most: none of 128, 64 and 32 divides every layer's columns, and {row}"]
        return [f"group_size is {size}, the largest of 128, 64 and 32 that divides every layer's columns"]

    def needs_examples(self) -> bool:
        return self.bits == "auto"

    def readers(self) -> dict[str, str]:
        return dict.fromkeys(gptq.READERS, gptq.EXTRA) if self.format == "gptq" else {}


class TunedSettings(GridSettings):
    """The settings of every method that solves layers one by one."""

    tune: int = Field(
        0,
        ge=0,
        description=f"steps, each of {methods.TUNE_BATCH} calibration examples, in which scales, norms and biases then learn end to end the"
        " distributions that the model gave before; integers stay. The whole model is in memory meanwhile",
    )

    def needs_examples(self) -> bool:
        return super().needs_examples() or self.tune > 0


def _divided(weights: Mapping[int, int], size: int) -> int:
    """How many weights are in layers whose columns a group size divides."""
    return sum(count for columns, count in weights.items() if columns % size == 0)


def _listed(columns: list[int]) -> str:
    return ", ".join(f"{number:,}" for number in columns)


@dataclass(frozen=True, order=True)
class Kind:
    """The properties of a grid. `size` is the number of columns that share a scale, 0 for a whole row."""

    bits: int
    symmetric: bool
    size: int


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
        size = count // self.scale.shape[-1]
        return self.scale.repeat_interleave(size, dim=-1), self.zero.repeat_interleave(size, dim=-1)

    def integers(self, weight: "Tensor") -> "Tensor":
        """The nearest integers, uint8, in 0 to 2^bits - 1."""
        import torch

        scale, zero = self.columns(weight.shape[-1])
        return (weight.float() / scale + zero).round().clamp(0, self.top).to(torch.uint8)

    def values(self, integers: "Tensor") -> "Tensor":
        """The values of integers, float32."""
        scale, zero = self.columns(integers.shape[-1])
        return (integers - zero) * scale

    def rounded(self, weight: "Tensor") -> "Tensor":
        """The weight rounded to nearest."""
        return self.values(self.integers(weight))


class PerToken:
    """A symmetric grid of 8 bits for each token, over its own range, made as it comes."""

    def rounded(self, states: "Tensor") -> "Tensor":
        """States (..., columns) rounded to nearest, float32."""
        scale = (states.float().abs().amax(dim=-1, keepdim=True) / 127.5).clamp(min=1e-10)
        return (states.float() / scale).round().clamp(-128, 127) * scale


def group_columns(columns: int, group_size: int | None) -> int:
    """The group size in columns that a layer gets: the one asked for where it divides the layer's columns, else the whole row."""
    return group_size if group_size not in (None, PER_ROW) and columns % group_size == 0 else columns


def fit(
    weight: "Tensor", settings: GridSettings, bits: int, moments: "Tensor | None" = None, search: bool = True, signed: bool = True
) -> Grid:
    """The grid of each group, its range searched: of shrinkings of the full range the one with the least error.

    moments   (columns, columns), the inputs' second moments: the error is that of the group's share of the output. Without them it is the
              weights'.
    search    False takes the full range.
    signed    False keeps the scales of symmetric grids positive, for kernels that compute with the integers.

    Shrinking the range costs the largest weights some clipping and gives all others a finer step (Frantar et al. 2022 search so). 20
    coarse steps and 4 fine ones come within 0.1 % of the error of 80.
    """
    import torch

    rows, columns = weight.shape
    size = group_columns(columns, settings.group_size)
    blocks = None if moments is None else torch.stack([moments[i : i + size, i : i + size] for i in range(0, columns, size)])
    # on a CPU as many rows at a time as stay in its cache
    parts = weight.split(max(CACHED // columns, 1) if weight.device.type == "cpu" else rows)  # type: ignore[no-untyped-call]
    groups = (part.float().reshape(len(part), columns // size, size) for part in parts)
    symmetric = bool(settings.symmetric)
    grids = [_searched(part, blocks, bits, symmetric, search, signed) for part in groups]
    return Grid(bits, symmetric, torch.cat([scale for scale, _ in grids]), torch.cat([zero for _, zero in grids]))


def _searched(groups: "Tensor", blocks: "Tensor | None", bits: int, symmetric: bool, search: bool, signed: bool) -> "tuple[Tensor, Tensor]":
    """Scale and zero, (rows, groups), for weights as (rows, groups, size)."""
    import torch

    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    sign = torch.where(high > -low, -1.0, 1.0) if symmetric and signed else 1.0
    best, reach, around = torch.full_like(low, float("inf")), torch.ones_like(low), torch.zeros_like(low)
    scale, zero, change = torch.ones_like(low), torch.zeros_like(low), torch.empty_like(groups)
    for percents in (COARSE, FINE) if search else (FULL,):
        for percent in percents:
            share = (around + percent / 100).clamp(max=1)
            tried_scale, tried_zero = grid_of(low * share, high * share, bits, symmetric)
            tried_scale = tried_scale * sign
            s, z = tried_scale[..., None], tried_zero[..., None]
            torch.div(groups, s, out=change).add_(z).round_().clamp_(0, 2**bits - 1).sub_(z).mul_(s).sub_(groups)
            error = (change.square_() if blocks is None else torch.einsum("rgi,gij->rgj", change, blocks).mul_(change)).sum(dim=2)
            better = error < best
            best, reach = torch.where(better, error, best), torch.where(better, share, reach)
            scale, zero = torch.where(better, tried_scale, scale), torch.where(better, tried_zero, zero)
        around = reach
    return scale, zero


def grid_of(low: "Tensor", high: "Tensor", bits: int, symmetric: bool) -> "tuple[Tensor, Tensor]":
    """Scale and zero of ranges that include 0."""
    import torch

    if symmetric:
        high = torch.maximum(high, -low)
        scale = (2 * high / (2**bits - 1)).clamp(min=1e-10)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-10)
    return scale, (-low / scale).round()
