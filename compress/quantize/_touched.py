"""No method may pass over a model in silence."""

from collections.abc import Callable
from typing import Any

from compress.errors import BrokenPromise
from compress.methods import Context


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
