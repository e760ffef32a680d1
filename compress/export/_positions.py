"""Positional settings of a model, and whether another engine's format holds them."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from compress.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_positions(config: "PreTrainedConfig", form: str, ropes: Collection[str]) -> None:
    """Check that positions mean the same in a format.

    form   the `export` that asks
    ropes  the kinds of rotation (rope_type) that it holds

    Raises ModelError for another rotation, for one of only some of each head's columns, and for a window narrower than the context.
    """
    window, rope = getattr(config, "sliding_window", None), config.rope_parameters
    if window is not None and window < config.max_position_embeddings:
        raise ModelError(
            f"export: {form}: sliding_window: {window:,} of {config.max_position_embeddings:,} positions, and the format attends to all."
            f" Set max_position_embeddings to {window} in config.json: up to there it is the same"
        )
    if (kind := rope["rope_type"]) not in ropes:
        raise ModelError(f"export: {form}: rope_type: {kind}; supported: {', '.join(sorted(ropes))}")
    if (part := rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError(f"export: {form}: partial_rotary_factor: {part:g}, and the format rotates all columns of a head")
