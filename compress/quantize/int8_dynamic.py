"""Weights in 8 bits by row, activations in 8 bits by token as they come (torchao). No calibration.

The plain absolute-maximum scheme of torchao's Int8DynamicActivationInt8WeightConfig; symmetric on both sides. Matrix products run in
int8 where the machine has instructions for them (GPU tensor cores, CPUs with VNNI); elsewhere they are slower than float32.
GPT-2's Conv1D layers become linear ones first, so its artifact is a GPTBigCode model.
"""

from typing import TYPE_CHECKING, Any

from compress import methods
from compress.architecture import as_linear, linear_layers
from compress.methods import About, Context
from compress.model import Bundle
from compress.quantize._touched import require_touched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ABOUT = About(
    at_run_time="products are in int8, which a CPU without int8 instructions (VNNI, AMX) does more slowly than in float32",
    packages=("torchao",),
    packs=True,
)


class Settings(methods.Settings):
    ignore: list[str] | None = None


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with torchao `Int8Tensor` weights, saved as safetensors by transformers' own torchao support."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from torchao.quantization.quantize_.workflows import Int8Tensor
    from transformers import TorchAoConfig

    model = as_linear(bundle.model)
    layers, left_out = linear_layers(model, settings.ignore)
    scheme = Int8DynamicActivationInt8WeightConfig()
    for done, layer in enumerate(layers.values(), 1):
        quantize_(layer, scheme)
        context.progress("quantising", done, len(layers))
    require_touched(model, lambda layer: isinstance(getattr(layer, "weight", None), Int8Tensor), "quantize: int8_dynamic")
    _make_serializable(model, TorchAoConfig(scheme, modules_to_not_convert=list(left_out)))
    return bundle.holding(model)


def _make_serializable(model: "PreTrainedModel", config: Any) -> None:
    """Tell transformers that the model is torchao's, so that it is saved and found again as such.

    torchao's reader takes every name in the file's list of tensors apart at its last dot and stumbles over BART's
    `final_logits_bias`, which has none. Such a tensor is stored all the same and read as any plain one, so it is left off the list.
    """
    import json

    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(config)
    flatten = quantizer.get_state_dict_and_metadata

    def without_dotless(saved: "PreTrainedModel") -> tuple[dict[str, Any], dict[str, str]]:
        state, metadata = flatten(saved)
        names = [name for name in json.loads(metadata["tensor_names"]) if "." in name]
        return state, {**metadata, "tensor_names": json.dumps(names)}

    quantizer.get_state_dict_and_metadata = without_dotless
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
