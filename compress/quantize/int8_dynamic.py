"""Weights in 8 bits by row, activations in 8 bits by token at run time (torchao). No calibration.

The plain absolute-maximum scheme of torchao's Int8DynamicActivationInt8WeightConfig; symmetric on both sides. Matrix products run in
int8: fast on GPU tensor cores, slow on a CPU unless FBGEMM's kernels are taken (compress.use_cpu_int8, compress/runtime.py).
GPT-2's Conv1D layers become linear ones first, so its artifact is a GPTBigCode model. A mixture's experts are rounded as they are
held, together, and run one by one.
"""

from compress import methods
from compress.architectures.gpt2 import as_linear
from compress.methods import About, Context
from compress.model.loading import Bundle
from compress.quantize._grid import IN_INT8

ABOUT = About(
    at_run_time=IN_INT8,
    slows=True,
    packages=("torchao",),
    packs=True,
    holds=8,
    experts=True,
)


class Settings(methods.LayerSettings):
    pass


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with torchao `Int8Tensor` weights, saved as safetensors by transformers' own torchao support."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from torchao.quantization.quantize_.workflows import Int8Tensor

    from compress.quantize._torchao import convert, convert_experts

    model, scheme = as_linear(bundle.model), Int8DynamicActivationInt8WeightConfig()
    touched = convert_experts(model, settings, context, scheme, "quantize: int8_dynamic")
    convert(model, settings, context, scheme, Int8Tensor, "quantize: int8_dynamic", touched)
    return bundle.holding(model)
