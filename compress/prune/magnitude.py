"""Magnitude: the weights nearest to zero become zero. No data; the baseline that wanda and sparsegpt must beat.

Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks". By layer every layer loses the same share; globally
the smallest weights of all layers go, which can empty one layer of an encoder-decoder and leave another whole.
"""

from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field, model_validator

from compress.methods import Context
from compress.model import Bundle
from compress.prune._sparse import DENSE, SparseSettings, lowest

if TYPE_CHECKING:
    from torch import Tensor

ABOUT = DENSE


class Settings(SparseSettings):
    scope: Literal["layer", "global"] = Field("layer", description="whether the share holds for each layer, or for all together")

    @model_validator(mode="after")
    def _rows(self) -> "Settings":
        if self.pattern is not None and self.scope == "global":
            raise ValueError("a pattern holds in every row, so scope: global has no place beside it")
        return self


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with the smallest weights of its linear layers set to zero.

    Raises InputError where a layer would be emptied or a pattern does not divide its rows, BrokenPromise where there are no linear layers.
    """
    from transformers.pytorch_utils import Conv1D

    from compress.architecture import linear_layers
    from compress.errors import BrokenPromise
    from compress.prune._dense import bits, zeros

    model = bundle.model
    layers, left_out = linear_layers(model, settings.ignore)
    if not layers:
        raise BrokenPromise(f"{type(model).__name__} has no linear layers to prune")
    weights: dict[str, Tensor] = {}
    for name, layer in layers.items():  # rows are a layer's outputs; GPT-2's Conv1D has them as columns
        weight = cast("Tensor", layer.weight).data
        weights[name] = weight.t() if isinstance(layer, Conv1D) else weight
    if settings.scope == "global":
        gone = _everywhere(weights, settings.share)
    else:
        gone = {name: _within(weight, settings, name) for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.masked_fill_(gone[name], 0)
        context.note(name, bits(weight), sparsity=zeros(weight))
    for name in left_out:
        context.leave_out(name, "a head" if settings.ignore is None else "named under ignore")
    return bundle


def _within(weight: "Tensor", settings: Settings, name: str) -> "Tensor":
    """Which weights of one layer go."""
    size = weight.abs()
    if settings.n_of_m is None:  # the whole layer competes
        return lowest(size.reshape(1, -1), settings.share, None, name).reshape(weight.shape)
    return lowest(size, settings.share, settings.n_of_m, name)


def _everywhere(weights: "dict[str, Tensor]", share: float) -> "dict[str, Tensor]":
    """Which weights of all layers go."""
    import torch

    from compress.errors import InputError

    sizes = torch.cat([weight.abs().flatten().float() for weight in weights.values()])
    flat = torch.zeros_like(sizes, dtype=torch.bool)
    flat[sizes.argsort(stable=True)[: round(share * len(sizes))]] = True
    parts = flat.split([weight.numel() for weight in weights.values()])  # type: ignore[no-untyped-call]
    gone = {name: part.reshape(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)}
    if empty := [name for name, part in gone.items() if part.all()]:
        raise InputError(f"sparsity: {share:g} over all layers would empty {empty[0]}; use scope: layer, or name it under ignore")
    return gone
