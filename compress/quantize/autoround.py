"""AutoRound: learn for every weight whether it is rounded up or down, and every range, block by block by signed gradients.

Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs". Each block learns the outputs of the
uncompressed model at its place, from the inputs that the solved blocks before it make. It starts from GPTQ's solution, and moves less far
from it the finer the grid is: further away it would overfit the examples. The best at 2 to 4 bits; takes a few hundred forward and backward
passes a block.
"""

from typing import TYPE_CHECKING, cast

from pydantic import Field

from compress.methods import Context
from compress.model.loading import Bundle
from compress.quantize._grid import PACKED, TunedSettings

if TYPE_CHECKING:
    from compress.calibration.block import Block

ABOUT = PACKED
FEW = 50  # steps; where there are fewer, each is no longer than with so many


class Settings(TunedSettings):
    steps: int = Field(200, ge=1)
    seed: int = 0


def apply(bundle: Bundle, settings: Settings, context: Context) -> Bundle:
    """The model with packed integer weights."""
    from compress.quantize._bits import sized
    from compress.quantize._gptq import solve_block
    from compress.quantize._tune import quantise_and_tune

    settings = sized(bundle, settings, context)

    def solve(block: "Block") -> None:
        solve_block(block, settings, damping=0.01)
        _learn(block, settings)

    return quantise_and_tune(bundle, settings, context, solve, targets=True)


def _learn(block: "Block", settings: Settings) -> None:
    """Signed gradient descent on the distance to the block's targets, from the solution that the block has."""
    import torch
    from torch.func import functional_call

    from compress import experts
    from compress.quantize._rounding import LearnedRounding
    from compress.quantize._solution import Quantised

    start = cast("dict[str, Quantised]", block.solved)
    learners = {name: LearnedRounding(block.weights[name].float(), solution, settings.keep_zeros) for name, solution in start.items()}
    parameters = [parameter for learner in learners.values() for parameter in (learner.offset, learner.reach)]
    travels = [learner.travel for learner in learners.values() for _ in range(2)]
    generator = torch.Generator().manual_seed(settings.seed)
    count = len(block.targets)
    for step in range(settings.steps):
        if step % count == 0:
            order = torch.randperm(count, generator=generator).tolist()
        batch = order[step % count]
        with torch.enable_grad():
            weights = {
                f"{name[len(block.name) + 1 :]}.weight": learner.value().to(block.weights[name].dtype) for name, learner in learners.items()
            }
            experts.leave_padding_out(block.module, block.given.real[batch])
            out = block.given.through(
                lambda *args, weights=weights, **kwargs: functional_call(block.module, weights, args, kwargs), batch, block.device
            )
            target = block.targets[batch].to(block.device)
            loss = (block.given.rows(out, batch).float() - block.given.rows(target, batch).float()).square().mean()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        rate = (1 - step / settings.steps) / max(settings.steps, FEW)
        for parameter, travel, gradient in zip(parameters, travels, gradients, strict=True):
            if gradient is not None:  # an expert that no token of the batch reached
                parameter.data.sub_(rate * travel * gradient.sign())
    for name, learner in learners.items():
        block.set(name, learner.solution())
