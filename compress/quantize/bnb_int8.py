"""LLM.int8: weights in 8 bits by row, activations in 8 bits at run time with outlier columns apart (bitsandbytes).

Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale". No calibration. Works on every
linear layer, GPT-2's Conv1D included; what transformers keeps in float32 for an architecture (T5's `wo`) stays so.
"""

from compress import methods
from compress.methods import About, Context
from compress.model.loading import Bundle, load_model, skeleton
from compress.quantize._touched import note_layers, require_touched
from compress.structure import linear_layers

ABOUT = About(
    at_run_time="activations are scaled, rounded and split at every layer and step; on a CPU the weights are unpacked too",
    slows=True,
    packages=("bitsandbytes",),
    extra="bnb",
    packs=True,
    holds=8,
)


class Settings(methods.LayerSettings):
    threshold: float = 6.0


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with `Linear8bitLt` layers. `threshold` is the magnitude from which an activation column is an outlier."""
    from bitsandbytes.nn import Linear8bitLt
    from transformers import BitsAndBytesConfig

    kept, left_out = linear_layers(skeleton(bundle.source), settings.ignore)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=settings.threshold, llm_int8_skip_modules=list(left_out))
    model = load_model(bundle.source, bundle.device, config)
    require_touched(model, lambda layer: isinstance(layer, Linear8bitLt), "quantize: bnb_int8")
    touched = [name for name, layer in model.named_modules() if isinstance(layer, Linear8bitLt)]
    for name in sorted(kept.keys() - set(touched)):
        context.leave_out(name, "bitsandbytes keeps it as it is")
    note_layers(context, touched, list(left_out), 8, settings.why_ignored)
    return bundle.holding(model)
