"""NF4: weights in the 4-bit NormalFloat grid in blocks of 64, unpacked at every step (bitsandbytes).

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs". No calibration; with double quantisation the blocks' scales
are quantised again (about 4.13 instead of 4.5 bits a weight). Works on linear layers, GPT-2's Conv1D included, whose rows are a
multiple of 32 and columns of 64. CPUs with AVX-512 BF16 compute with the packed weights, in bfloat16 whatever `compute_dtype` says.
"""

from typing import Literal

from compress import bnb, methods
from compress.errors import BrokenPromise
from compress.methods import About, Context
from compress.model.loading import Bundle, load_model, skeleton
from compress.quantize._touched import note_layers, require_touched
from compress.structure import linear_layers

ABOUT = About(
    at_run_time="the weights are unpacked at every step, which pays only where reading them was the bottleneck (not on AVX-512 BF16)",
    slows=True,
    packages=("bitsandbytes",),
    extra="bnb",
    packs=True,
    holds=4,
)


class Settings(methods.LayerSettings):
    double_quant: bool = True
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with `Linear4bit` layers. Products are computed in `compute_dtype`; auto is the model's own.

    Raises BrokenPromise where no layer has a shape that every CPU computes with.
    """
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    bare = skeleton(bundle.source)
    kept, left_out = linear_layers(bare, settings.ignore)
    odd = [name for name, layer in kept.items() if not bnb.takes_4bit(layer)]
    asked = [name for name in kept if bnb.is_asked_for_its_dtype(bare, name)]
    if kept and len(odd) == len(kept):
        raise BrokenPromise(f"quantize: bnb_nf4: would touch no layer: {bnb.ODD}, and this model has none such; use rtn or bnb_int8")
    stored = bare.config.dtype if bundle.source.dtype == "auto" else bundle.source.dtype
    compute_dtype = stored if settings.compute_dtype == "auto" else settings.compute_dtype
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, str(compute_dtype or "float32").removeprefix("torch.")),
        llm_int8_skip_modules=[*left_out, *odd, *asked],
    )
    model = load_model(bundle.source, bundle.device, config)
    require_touched(model, lambda layer: isinstance(layer, Linear4bit), "quantize: bnb_nf4")
    touched = [name for name, layer in model.named_modules() if isinstance(layer, Linear4bit)]
    for name in sorted(kept.keys() - set(touched)):
        context.leave_out(name, bnb.ODD if name in odd else bnb.ASKED if name in asked else "bitsandbytes keeps it as it is")
    note_layers(context, touched, list(left_out), 4, settings.why_ignored)
    return bundle.holding(model)
