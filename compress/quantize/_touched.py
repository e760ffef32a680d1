"""No method may leave a model as it is without a word."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.errors import BrokenPromise
from compress.methods import Context
from compress.structure import trial_inputs

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def require_touched(model: Any, is_touched: Callable[[Any], bool], method: str) -> None:
    """Raise BrokenPromise unless at least one layer was quantised."""
    if not any(is_touched(module) for module in model.modules()):
        raise BrokenPromise(f"{method}: touched no layer of {type(model).__name__}; nothing would be smaller")


def note_layers(context: Context, touched: list[str], left_out: list[str], bits: int, why: str) -> None:
    """Note for the report the bits of the layers that a library quantised all alike, and why the others were left out."""
    for name in touched:
        context.note(name, bits)
    for name in left_out:
        context.leave_out(name, why)


def called(model: "PreTrainedModel", layers: "Mapping[str, nn.Module]") -> set[str]:
    """Which of a model's layers a forward pass calls. Experts count as called, since a few tokens don't reach all of them."""
    import torch

    reached = {name for name in layers if ".experts." in name}
    handles = [layer.register_forward_hook(partial(_note, reached, name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(**trial_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    return reached


def _note(reached: set[str], name: str, *_: Any) -> None:
    reached.add(name)
