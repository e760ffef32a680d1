"""A model with its packed weights unpacked, all in float32."""

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress import ao
from compress.model.loading import load_model
from compress.model.source import Source
from compress.structure import bare, trial_inputs

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
            model = _rebuilt(model)
        else:
            model = model.dequantize()
        model.config.__dict__.pop("quantization_config", None)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model


def _rebuilt(model: "PreTrainedModel") -> "PreTrainedModel":
    """The same weights in plain modules of transformers: unpacking at the first step leaves calls of its own in the old ones."""
    config, state = copy.deepcopy(model.config), model.state_dict()
    del config.quantization_config
    plain = bare(model, config)
    plain.load_state_dict({name: state[name] for name in plain.state_dict()}, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.eval()
