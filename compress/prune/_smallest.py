"""The smallest weights, layer by layer or of all layers together, and how they become zero."""

from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from compress.errors import BrokenPromise, InputError
from compress.methods import Context, Settings
from compress.prune._sparse import SparsitySettings, lowest

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class ScopeSettings(Settings):
    """Which weights compete for the zeros."""

    scope: Literal["layer", "global"] = Field(
        "layer",
        description="whether the share holds in each layer, or over all together; global sorts all weights at 17 bytes of memory each",
    )


def layers_to_prune(model: "PreTrainedModel", settings: SparsitySettings, context: Context) -> "dict[str, nn.Module]":
    """The linear layers by name; those left out are noted. Raises BrokenPromise where there are none."""
    from compress.structure import linear_layers

    layers, left_out = linear_layers(model, settings.ignore)
    if not layers:
        raise BrokenPromise(f"{type(model).__name__} has no linear layers to prune")
    for name in left_out:
        context.leave_out(name, settings.why_ignored)
    return layers


def smallest(layers: "dict[str, nn.Module]", share: float, scope: str, n_of_m: tuple[int, int] | None = None) -> "dict[str, Tensor]":
    """Where the share of weights nearest to zero is, bool of each weight's shape.

    Raises InputError where a layer would be emptied or a pattern does not divide its rows.
    """
    from transformers.pytorch_utils import Conv1D

    weights = {name: cast("Tensor", layer.weight).data for name, layer in layers.items()}
    if scope == "global":
        return _everywhere(weights, share)
    masks = {}
    for name, weight in weights.items():
        turned = isinstance(layers[name], Conv1D)  # rows are a layer's outputs; GPT-2's Conv1D has them as columns
        size = (weight.t() if turned else weight).abs()
        parts = size if n_of_m else size.reshape(1, -1)  # without a pattern the whole layer competes
        gone = lowest(parts, share, n_of_m, name).reshape(size.shape)
        masks[name] = gone.t() if turned else gone
    return masks


def to_zero(layers: "dict[str, nn.Module]", gone: "dict[str, Tensor]") -> None:
    """Weights become zero where `gone` says so, in place."""
    for name, layer in layers.items():
        cast("Tensor", layer.weight).data.masked_fill_(gone[name], 0)


def note(layers: "dict[str, nn.Module]", context: Context) -> None:
    """How much of each layer is zero, for the report."""
    from compress.prune._dense import bits, zeros

    for name, layer in layers.items():
        weight = cast("Tensor", layer.weight).data
        context.note(name, bits(weight), sparsity=zeros(weight))


def _everywhere(weights: "dict[str, Tensor]", share: float) -> "dict[str, Tensor]":
    import torch

    sizes = torch.cat([weight.abs().flatten().float() for weight in weights.values()])
    flat = torch.zeros_like(sizes, dtype=torch.bool)
    flat[sizes.argsort(stable=True)[: round(share * len(sizes))]] = True
    parts = flat.split([weight.numel() for weight in weights.values()])  # type: ignore[no-untyped-call]
    gone = {name: part.reshape(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)}
    if empty := [name for name, part in gone.items() if part.all()]:
        raise InputError(f"sparsity: {share:g} over all layers would empty {empty[0]}; use scope: layer, or name it under ignore")
    return gone
