"""Wanda: a weight matters as much as its size times its input's norm; in every row the share that matters least becomes zero.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models". Calibrated block by block, each layer on what the
pruned ones before it make; on every linear layer of any model's blocks. What is left keeps its value.
"""

from dataclasses import replace

from compress.methods import Context
from compress.model.loading import Bundle
from compress.prune._sparse import DENSE, SparseSettings, lowest

ABOUT = replace(DENSE, calibrated=True)


class Settings(SparseSettings):
    pass


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with zeros in its blocks' linear layers.

    Raises InputError where a layer would be emptied or a pattern does not divide its rows.
    """
    from compress.calibration.block import Block
    from compress.calibration.inputs import mean_squares, turns
    from compress.calibration.walk import walk
    from compress.prune._dense import Dense, Pruned

    def solve(block: Block) -> None:
        for turn in turns(block):
            energies = mean_squares(block, [group[0] for group in turn])
            for group in turn:
                if block.sound(group, energy := energies[group[0]]):
                    for name in group:
                        weight = block.weights[name]
                        gone = lowest(weight.float().abs() * energy.sqrt(), settings.share, settings.n_of_m, name)
                        block.set(name, Pruned(weight.masked_fill(gone, 0)))

    return walk(bundle, settings, context, Dense, solve)
