"""Gradual: magnitude pruning while all weights are trained on the targets, a little more every few steps, so that they make up for it.

Zhu and Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression". At step t of the n that the rise
takes, sparsity x (1 - (1 - t / n)^3) of the weights are zero: those nearest to zero just then. Many go while many can be spared, few near
the end, and none comes back. AdamW in float32, so four times the float32 model in memory: weights, gradients, two states of the optimiser.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from pydantic import Field

from compress.methods import Context, Optimisation, TrainSettings
from compress.model.loading import Bundle
from compress.prune._smallest import ScopeSettings, layers_to_prune, note, smallest, to_zero
from compress.prune._sparse import DENSE, SparsitySettings

if TYPE_CHECKING:
    from torch import Tensor

ABOUT = replace(DENSE, calibrated=True, trains=True, experts=False)
TIMES = 50  # how often weights are pruned where the recipe doesn't say it


class Settings(ScopeSettings, SparsitySettings, TrainSettings, Optimisation):
    until: float = Field(0.7, gt=0, le=1, description="the share of the steps by which the sparsity is reached; the others recover")
    every: int | None = Field(None, ge=1, description=f"steps from one pruning to the next; null prunes about {TIMES} times")


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model trained, the smallest weights of its linear layers zero.

    Raises InputError where a layer would be emptied, and BrokenPromise where there are no linear layers. Raises DataError where there is
    too little to learn from, and RunError where the loss is no longer a number.
    """
    from compress.training.loop import train
    from compress.training.material import read
    from compress.training.weights import in_float32, pruned, zeros_kept

    model = bundle.model.requires_grad_(True)
    layers = layers_to_prune(model, settings, context)
    smallest(layers, settings.sparsity, settings.scope)  # a sparsity that empties a layer is refused before hours of training
    weights = {name: cast("Tensor", layer.weight) for name, layer in layers.items()}
    zero: dict[str, Tensor] = {}

    def prune(done: int, steps: int) -> None:
        if zero:
            to_zero(layers, zero)  # AdamW's momentum moves weights that have no gradient any more
        due = is_due(done, steps, settings)
        if due:
            to_zero(layers, smallest(layers, sparsity_at(done, steps, settings), settings.scope))
        if due or not zero:  # after a kill only the weights tell which
            zero.update({name: weight.data == 0 for name, weight in weights.items()})

    material = read(model, bundle.tokenizer, context)
    with in_float32(model), zeros_kept({**pruned(model), **weights}.values()):
        train(model, material, settings, settings.seed, context, each_step=prune)
    note(layers, context)
    return bundle


def is_due(done: int, steps: int, settings: Settings) -> bool:
    """Whether weights are pruned after this many steps."""
    last = _last(steps, settings)
    return 0 < done <= last and (done == last or done % (settings.every or max(1, last // TIMES)) == 0)


def sparsity_at(done: int, steps: int, settings: Settings) -> float:
    """The share of the weights that is zero after this many steps, by the cubic schedule."""
    last = _last(steps, settings)
    return settings.sparsity * (1 - (1 - min(done, last) / last) ** 3)


def _last(steps: int, settings: Settings) -> int:
    """The steps after which the sparsity is reached."""
    return max(1, round(settings.until * steps))
