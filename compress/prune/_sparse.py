"""What the methods that set single weights to zero share: how many, in which pattern, and what zeros buy."""

import re
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from compress.errors import InputError
from compress.methods import About, LayerSettings

if TYPE_CHECKING:
    from torch import Tensor

DENSE = About(
    at_run_time="zeros are stored densely, so files, memory and latency stay as they were; structured or depth pruning would change that,"
    " and on a GPU pattern 2:4 with benchmark.runtime.sparse_24 (compress.use_sparse_24)",
    smaller=False,
    experts=True,
)


class SparsitySettings(LayerSettings):
    """The settings of every method that sets single weights to zero."""

    sparsity: float = Field(0.5, gt=0, lt=1, description="the share of zeros in the pruned layers' weights")


class SparseSettings(SparsitySettings):
    """The settings of those that do it at once."""

    pattern: str | None = Field(None, description="n:m, such as 2:4: n of every m weights of a row are kept; sparsity is then 1 - n/m")

    @field_validator("pattern")
    @classmethod
    def _readable(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        match = re.fullmatch(r"(\d+):(\d+)", pattern)
        if not match or not 0 < int(match[1]) < int(match[2]):
            raise ValueError(f"{pattern!r} is not a pattern; 2:4 keeps 2 of every 4 weights, 4:8 keeps 4 of every 8")
        return pattern

    @model_validator(mode="after")
    def _once(self) -> "SparseSettings":
        if self.pattern is not None and "sparsity" in self.model_fields_set and self.sparsity != self.share:
            raise ValueError(f"pattern {self.pattern} is a sparsity of {self.share:g}; leave sparsity out or make them agree")
        return self

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """How many of how many weights are kept."""
        if self.pattern is None:
            return None
        kept, width = self.pattern.split(":")
        return int(kept), int(width)

    @property
    def share(self) -> float:
        """The share of the weights that become zero."""
        return self.sparsity if self.n_of_m is None else 1 - self.n_of_m[0] / self.n_of_m[1]


def lowest(scores: "Tensor", share: float, n_of_m: tuple[int, int] | None, name: str) -> "Tensor":
    """Which weights go, bool of the scores' shape (rows, columns): in every row the share, or all but n of every m, with the lowest scores.

    Raises InputError where a pattern does not divide the row, or nothing of it would be left.
    """
    import torch

    rows, columns = scores.shape
    if n_of_m is None:
        width, count = columns, round(share * columns)
    else:
        width, count = n_of_m[1], n_of_m[1] - n_of_m[0]
    check_pattern(n_of_m, columns, name)
    if count == width:
        raise InputError(f"sparsity: {share:g} would empty {name}, which has {columns} columns; lower it or name the layer under ignore")
    parts = scores.reshape(-1, width)
    where = parts.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(parts, dtype=torch.bool).scatter_(1, where, True).reshape(rows, columns)


def check_pattern(n_of_m: tuple[int, int] | None, columns: int, name: str) -> None:
    """Raises InputError where a pattern does not divide a row of so many columns."""
    if n_of_m is not None and columns % n_of_m[1]:
        raise InputError(f"pattern: {n_of_m[0]}:{n_of_m[1]} does not divide the {columns} columns of {name}; name it under ignore")
