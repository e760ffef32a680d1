"""Weights and inputs in 8-bit floating point (e4m3), weights scaled by row, inputs by token at run time (torchao). No calibration.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning". Products run in fp8 on GPUs that have it (NVIDIA from compute capability 8.9 on:
Ada, Hopper, Blackwell), which is where it is made too; elsewhere it is refused. GPT-2's Conv1D layers become linear ones first.
"""

from compress.architectures.gpt2 import as_linear
from compress.errors import DeviceError
from compress.methods import About, Context, LayerSettings
from compress.model.loading import Bundle

CAPABILITY = (8, 9)
ABOUT = About(
    at_run_time="products are in fp8, which only GPUs of compute capability 8.9 and more do",
    packages=("torchao",),
    devices=("cuda",),
    packs=True,
    holds=8,
)


class Settings(LayerSettings):
    pass


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with torchao `Float8Tensor` weights.

    Raises DeviceError on a GPU without fp8.
    """
    import torch

    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        name = torch.cuda.get_device_name()
        raise DeviceError(
            f"quantize: fp8 needs compute capability 8.9 or more; {name} has {capability[0]}.{capability[1]}. int8_dynamic runs there"
        )
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8Tensor, PerRow

    from compress.quantize._torchao import convert

    model = as_linear(bundle.model)
    if model.dtype == torch.float32:
        model = model.to(torch.bfloat16)  # what scales by row are for
    convert(model, settings, context, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), Float8Tensor, "quantize: fp8")
    return bundle.holding(model)
