"""SparseGPT: weights are set to zero column by column, each column's error made up for in those still to come.

Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot". GPTQ's solver with zero in place of
rounding. Which weights go is decided for 128 columns at a time, by what each would cost under the inputs' second moments.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.methods import Context
from compress.model.loading import Bundle
from compress.prune._sparse import DENSE, SparseSettings, check_pattern, lowest

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128  # columns whose losses are carried on one by one; to all behind them they are carried together
ABOUT = replace(DENSE, calibrated=True)


class Settings(SparseSettings):
    damping: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a share of its mean")
    columns: Literal[32, 64, 128] = Field(128, description="columns whose weights compete for the zeros, where there is no pattern")


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with zeros in its blocks' linear layers, what is left adjusted.

    Raises InputError where a layer would be emptied or a pattern does not divide its rows, BrokenPromise when a layer's Hessian can't be
    factored at any damping.
    """
    from compress.calibration.block import Block
    from compress.calibration.inputs import second_moments, turns
    from compress.calibration.walk import walk
    from compress.prune._dense import Dense, Pruned

    def solve(block: Block) -> None:
        for turn in turns(block):
            moments = second_moments(block, [group[0] for group in turn])
            for group in turn:
                if block.sound(group, own := moments.pop(group[0])):
                    for name in group:
                        block.set(name, Pruned(solve_layer(block.weights[name].float(), own, settings, name)))

    return walk(bundle, settings, context, Dense, solve)


def solve_layer(weight: "Tensor", moments: "Tensor", settings: Settings, name: str = "") -> "Tensor":
    """A weight (rows, columns) with zeros that keeps its outputs, given its inputs' second moments (columns, columns).

    What is zero stays zero; so does all that only zeros are multiplied by, which costs nothing.
    """
    import torch

    from compress.calibration.hessian import inverse_factor

    columns, width = weight.shape[1], settings.n_of_m[1] if settings.n_of_m else settings.columns
    check_pattern(settings.n_of_m, columns, name)
    factor = inverse_factor(moments.clone(), settings.damping, name)
    cost = factor.diagonal().square()
    left = weight.t().masked_fill(moments.diagonal()[:, None] == 0, 0)  # transposed, so that a column lies in one piece
    left = left.contiguous()
    was = left == 0
    size = max(BLOCK // width, 1) * width  # a pattern lies within a block
    for start in range(0, columns, size):
        end = min(start + size, columns)
        block, inner = left[start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            if j % width == 0:
                part = slice(start + j, start + j + width)
                gone = _gone(left[part].t(), cost[part], was[part].t(), settings, name).t()
            kept = block[j].masked_fill(gone[j % width] | was[start + j], 0)
            errors[j] = (block[j] - kept) / inner[j, j]
            block[j] = kept
            block[j + 1 :].addr_(inner[j, j + 1 :], errors[j], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return left.t().contiguous()


def _gone(weight: "Tensor", cost: "Tensor", was: "Tensor", settings: Settings, name: str) -> "Tensor":
    """Which of these columns' weights (rows, columns) go: those whose loss can be made up for at the least cost, zeros before all."""
    lost = (weight.square() / cost).masked_fill(was, -1)
    if settings.n_of_m is not None:
        return lowest(lost, settings.share, settings.n_of_m, name)
    return lowest(lost.reshape(1, -1), settings.share, None, name).reshape(weight.shape)
