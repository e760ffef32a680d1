"""What lies beside weights in an engine's format: the other files of an ordinary Hugging Face folder."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_beside(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Save config, tokenizer and, of a model that writes, generation config."""
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if (own := getattr(model, "generation_config", None)) is not None:
        own.save_pretrained(folder)
