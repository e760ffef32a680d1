"""A model as numbers alone: packed weights unpacked to what they stand for, all in float32."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress import ao
from compress.model import Source, load_model
from compress.structure import trial_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dense(source: Source) -> "PreTrainedModel":
    """The model in main memory."""
    import torch

    model = load_model(replace(source, dtype="float32"), "cpu")
    packing: Any = getattr(model.config, "quantization_config", None)
    if packing is not None:
        method = str(getattr(packing, "quant_method", "")).lower()
        if method.endswith("torchao"):
            ao.unpack(model)
        elif "compressed" in method:  # which unpacks at loading, or at the first step
            with torch.no_grad():
                model(**trial_inputs(model))
        else:
            model = model.dequantize()
        model.config.__dict__.pop("quantization_config", None)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model
