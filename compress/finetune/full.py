"""All weights are trained on the targets of the train split, or on its plain texts: recovery after pruning, or learning the task.

AdamW in float32, on GPUs with products in bfloat16; stored in the dtypes it came in. Takes four times the float32 model in memory:
weights, gradients and two states of the optimiser; `shard: true` splits all four over the processes. Weights that pruning set to zero
stay zero.
"""

from compress.finetune._settings import TUNED
from compress.methods import Context, ShardSettings
from compress.model.loading import Bundle

ABOUT = TUNED


class Settings(ShardSettings):
    pass


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The same model with other weights.

    Raises DataError where there is too little to learn from, RunError where the loss is no longer a number.
    """
    from compress.training.loop import train_all
    from compress.training.material import read

    train_all(bundle.model, read(bundle.model, bundle.tokenizer, context), settings, context)
    return bundle
