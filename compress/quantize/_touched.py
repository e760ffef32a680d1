"""No method may pass over a model in silence."""

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
    """Tell the report what became of each layer where a library did all of them alike, and why some were left out."""
    for name in touched:
        context.note(name, bits)
    for name in left_out:
        context.leave_out(name, why)


def called(model: "PreTrainedModel", layers: "Mapping[str, nn.Module]") -> set[str]:
    """Which of a model's layers a forward pass calls; of experts a few tokens don't reach all, so they count as called."""
    import torch

    found = {name for name in layers if ".experts." in name}
    handles = [layer.register_forward_hook(partial(_note, found, name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(**trial_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _note(found: set[str], name: str, *_: Any) -> None:
    found.add(name)
