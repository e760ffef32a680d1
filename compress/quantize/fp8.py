"""Weights and inputs in 8-bit floating point (e4m3), weights scaled by row, inputs by token as they come (torchao). No calibration.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning". Products run in fp8 on GPUs that have it (NVIDIA from compute capability 8.9 on:
Ada, Hopper, Blackwell), which is where it is made too; elsewhere it is refused. GPT-2's Conv1D layers become linear ones first.
"""

from compress.architecture import as_linear, linear_layers
from compress.errors import DeviceError
from compress.methods import About, Context
from compress.model import Bundle
from compress.quantize._grid import LayerSettings
from compress.quantize._touched import note_layers, require_touched

CAPABILITY = (8, 9)
ABOUT = About(
    at_run_time="products are in fp8, which only GPUs of compute capability 8.9 and more do",
    packages=("torchao",),
    devices=("cuda",),
    packs=True,
)


class Settings(LayerSettings):
    pass


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with torchao `Float8Tensor` weights.

    Raises DeviceError on a GPU without fp8.
    """
    import torch

    found = torch.cuda.get_device_capability()
    if found < CAPABILITY:
        name = torch.cuda.get_device_name()
        raise DeviceError(f"quantize: fp8 needs compute capability 8.9 or more; {name} has {found[0]}.{found[1]}. int8_dynamic runs there")
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8Tensor, PerRow, quantize_

    from compress.quantize._torchao import make_serializable

    model = as_linear(bundle.model)
    if model.dtype == torch.float32:
        model = model.to(torch.bfloat16)  # what scales by row are for
    layers, left_out = linear_layers(model, settings.ignore)
    scheme = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    for done, layer in enumerate(layers.values(), 1):
        quantize_(layer, scheme)
        context.progress("quantising", done, len(layers))
    require_touched(model, lambda layer: isinstance(getattr(layer, "weight", None), Float8Tensor), "quantize: fp8")
    note_layers(context, list(layers), list(left_out), 8, settings.ignore)
    make_serializable(model, scheme, list(left_out))
    return bundle.holding(model)
