"""Observers: the range [low, high] that a grid should cover, from the histogram of the observed values.

    minmax      all of them.
    percentile  all but the outermost 0.01 %.
    mse         the range with the least mean squared error of rounding and clipping.
    entropy     the range whose rounded distribution has the least Kullback-Leibler divergence from the observed one (Migacz 2017,
                "8-bit Inference with TensorRT").

Values come in rows, one a range: a single row for a range a tensor, a row a channel, a row a group.
"""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Observer = Literal["minmax", "percentile", "mse", "entropy"]
BINS = 2048
OUTSIDE = 1e-4  # the share of values that `percentile` leaves outside
SHRINKINGS = [1 - step / 100 for step in range(90)]


class Histogram:
    """Counts of values in equal bins over all that was seen, (rows, BINS); it widens as larger values come.

    Bins are a power of two wide and begin at multiples of it, so that wider ones are made of whole narrower ones. So it makes no difference
    in which pieces the values come.
    """

    def __init__(self, values: "Tensor"):
        """values   (rows, count), finite"""
        self.low, self.high = values.amin(dim=1).double(), values.amax(dim=1).double()
        self.counts = self._binned(values, None)

    def add(self, values: "Tensor") -> None:
        """More values of the same rows, (rows, count)."""
        import torch

        centres, low, high = self.centres(), self.low, self.high
        self.low, self.high = torch.minimum(low, values.amin(dim=1).double()), torch.maximum(high, values.amax(dim=1).double())
        if not (torch.equal(low, self.low) and torch.equal(high, self.high)):
            self.counts = self._binned(centres, self.counts)
        self.counts += self._binned(values, None)

    def centres(self) -> "Tensor":
        """The middle of each bin, (rows, BINS)."""
        import torch

        start, width = self._bins()
        return start[:, None] + width[:, None] * (torch.arange(BINS, device=start.device) + 0.5)

    def range(self, observer: Observer, bits: int, symmetric: bool) -> "tuple[Tensor, Tensor]":
        """Low and high of the grid's range, (rows,) each; the range includes 0, and is -high to high where symmetric."""
        import torch

        if observer == "percentile":
            share = self.counts.cumsum(dim=1) / self.counts.sum(dim=1, keepdim=True)
            inside = (share > OUTSIDE / 2) & (share - self.counts / self.counts.sum(dim=1, keepdim=True) < 1 - OUTSIDE / 2)
            start, width = self._bins()
            first, last = inside.int().argmax(dim=1), BINS - inside.flip(1).int().argmax(dim=1)
            return _with_zero((start + first * width).maximum(self.low), (start + last * width).minimum(self.high), symmetric)
        low, high = _with_zero(self.low, self.high, symmetric)
        if observer == "minmax":
            return low, high
        lost = self._error if observer == "mse" else self._divergence
        least = torch.full_like(low, float("inf"))
        factor = torch.ones_like(low)
        for shrink in SHRINKINGS:
            error = lost(low * shrink, high * shrink, bits)
            factor = torch.where(error < least, shrink, factor)
            least = torch.minimum(error, least)
        return low * factor, high * factor

    def _bins(self) -> "tuple[Tensor, Tensor]":
        """Where the first bin begins, and the bins' width, (rows,) each."""
        import torch

        least = 1e-6 * torch.maximum(self.low.abs(), self.high.abs()).clamp(min=1e-30)
        width = torch.exp2(torch.frexp(torch.maximum(self.high - self.low, least) / (BINS - 1)).exponent.double())
        return (self.low / width).floor() * width, width

    def _binned(self, values: "Tensor", weights: "Tensor | None") -> "Tensor":
        import torch

        start, width = self._bins()
        bins = ((values / width[:, None]).floor() - (start / width)[:, None]).long().clamp(0, BINS - 1)
        counts = torch.zeros(len(values), BINS, dtype=torch.float64, device=values.device)
        return counts.scatter_add_(1, bins, torch.ones_like(values, dtype=torch.float64) if weights is None else weights)

    def _levels(self, low: "Tensor", high: "Tensor", bits: int) -> "tuple[Tensor, Tensor]":
        """The level that each bin is rounded to, not yet clipped, and the width of a level, (rows, 1)."""
        step = ((high - low) / (2**bits - 1)).clamp(min=1e-30)[:, None]
        return ((self.centres() - low[:, None]) / step).round(), step

    def _error(self, low: "Tensor", high: "Tensor", bits: int) -> "Tensor":
        level, step = self._levels(low, high, bits)
        change = level.clamp(0, 2**bits - 1) * step + low[:, None] - self.centres()
        return (change.square() * self.counts).sum(dim=1)

    def _divergence(self, low: "Tensor", high: "Tensor", bits: int) -> "Tensor":
        import torch

        level, _ = self._levels(low, high, bits)
        clipped = level.clamp(0, 2**bits - 1).long()
        inside = (level >= 0) & (level <= 2**bits - 1)
        total = self.counts.sum(dim=1, keepdim=True)
        seen = torch.where(inside, self.counts, 0)
        # what lies outside is seen at the edges, and rounded as if it weren't there: clipping costs
        edge = torch.zeros_like(seen).scatter_add_(
            1, torch.where(level < 0, _first(inside), _last(inside)), torch.where(inside, 0, self.counts)
        )
        expected = (seen + edge) / total
        levels = torch.zeros(len(seen), 2**bits, dtype=torch.float64, device=seen.device)
        mass = levels.scatter_add(1, clipped, seen)
        filled = levels.scatter_add(1, clipped, ((seen + edge) > 0).double())
        spread = torch.where(seen + edge > 0, mass.gather(1, clipped) / filled.gather(1, clipped).clamp(min=1), 0)
        spread = spread / spread.sum(dim=1, keepdim=True).clamp(min=1e-30)
        there = expected > 0
        ratio = torch.where(there, expected / spread.clamp(min=1e-12), 1)
        return (torch.where(there, expected, 0) * ratio.log()).sum(dim=1)


def _first(inside: "Tensor") -> "Tensor":
    return inside.int().argmax(dim=1, keepdim=True).expand_as(inside)


def _last(inside: "Tensor") -> "Tensor":
    return (inside.shape[1] - 1 - inside.flip(1).int().argmax(dim=1, keepdim=True)).expand_as(inside)


def _with_zero(low: "Tensor", high: "Tensor", symmetric: bool) -> "tuple[Tensor, Tensor]":
    import torch

    if symmetric:
        high = torch.maximum(high.abs(), low.abs())
        return -high, high
    return low.clamp(max=0), high.clamp(min=0)
