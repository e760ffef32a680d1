"""No method may pass over a model in silence."""

from collections.abc import Callable
from typing import Any

from compress.errors import BrokenPromise


def require_touched(model: Any, is_touched: Callable[[Any], bool], method: str) -> None:
    """Raise BrokenPromise unless at least one layer was quantised."""
    if not any(is_touched(module) for module in model.modules()):
        raise BrokenPromise(f"{method}: touched no layer of {type(model).__name__}; nothing would be smaller")
