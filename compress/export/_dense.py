"""A model as numbers alone: packed weights unpacked to what they stand for, all in float32."""

from dataclasses import replace
from typing import TYPE_CHECKING

from compress.model import Source, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dense(source: Source) -> "PreTrainedModel":
    """The model in main memory."""
    model = load_model(replace(source, dtype="float32"), "cpu")
    if getattr(model.config, "quantization_config", None) is not None and getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize()
        del model.config.quantization_config
    return model.float()
