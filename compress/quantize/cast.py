"""Store every weight in 16 bits: bfloat16, or float16.

Halves a float32 model. T5's `wo` layers overflow in float16 (huggingface/transformers issue 20287). So transformers keeps
them in float32 in such an artifact, here and wherever it is loaded. bfloat16 has float32's range and needs no such care.
"""

from dataclasses import replace
from typing import Literal

from compress import methods
from compress.errors import BrokenPromise
from compress.methods import About, Context
from compress.model.loading import Bundle, skeleton

ABOUT = About(
    at_run_time="arithmetic is in 16 bits, which CPUs without instructions for it (AVX-512 BF16, AMX) do more slowly than in 32",
    slows=True,
)


class Settings(methods.Settings):
    dtype: Literal["bfloat16", "float16"] = "bfloat16"


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model in another dtype.

    Raises BrokenPromise when all its weights have that dtype already.
    """
    if str(skeleton(bundle.source).dtype) == f"torch.{settings.dtype}":
        raise BrokenPromise(f"quantize: cast: the model is in {settings.dtype} already; nothing to cast")
    return Bundle(replace(bundle.source, dtype=settings.dtype), bundle.device)
