"""GPTQ: round column by column, each column's error made up for in those still to come, by the inputs' second moments.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers". On every linear layer of any
model's blocks, encoder-decoders included. Columns go in the order of their inputs' size (activation order) on grids fixed before, so that
the packed weights need no index. The layers of a block are solved in the order they run, each on the inputs that the solved ones make.
Beyond the paper, the scales are refitted to the solved integers.
"""

from pydantic import Field

from compress.methods import Context
from compress.model.loading import Bundle
from compress.quantize._grid import PACKED, TunedSettings

ABOUT = PACKED


class Settings(TunedSettings):
    damping: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a share of its mean")


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with packed integer weights.

    Raises BrokenPromise when a layer's Hessian can't be factored at any damping.
    """
    from compress.calibration.block import Block
    from compress.quantize._bits import sized
    from compress.quantize._gptq import solve_block
    from compress.quantize._tune import quantise_and_tune

    settings = sized(bundle, settings, context)

    def solve(block: Block) -> None:
        solve_block(block, settings, settings.damping)

    return quantise_and_tune(bundle, settings, context, solve)
