"""Models that are split over the processes: FSDP, by torch's `fully_shard`.

Each process holds its part of every weight, and of its gradient and the optimiser's states. A block's weights are gathered when it is run,
in the forward pass and in the backward one, and freed behind it. Those outside of all blocks, embeddings and heads, stay for the whole
pass.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from compress.errors import ModelError, RunError
from compress.methods import Context
from compress.structure import block_stacks
from compress.training.learner import Learner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPTIMIZER = "optimizer.pt"


def split(model: "PreTrainedModel", context: Context, dtype: torch.dtype | None = None) -> None:
    """Leave each process its part of a model's weights, on its device. In place, and it can't be undone.

    model   best in main memory, since a device then holds a single whole block of it at a time
    dtype   what the weights become; None leaves them

    Raises ModelError where the weights are packed, RunError where a process has more than its part.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"shard: {type(model).__name__} has packed weights, which can't be split; take one with full weights")
    mesh = init_device_mesh(context.device, (context.processes,))
    beside = [part for child in model.children() if isinstance(child, nn.ModuleDict) for part in child.values()]  # run by themselves
    for unit in [*(block for stack in block_stacks(model).values() for block in stack), *beside, model]:
        for parameter in unit.parameters():
            if dtype is not None and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(dtype)
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    _check(list(model.parameters()), context)


def _check(parameters: list[nn.Parameter], context: Context) -> None:
    """Raises RunError where this process has more than its part of the weights, each of which is split between rows."""
    whole, here = sum(p.numel() for p in parameters), sum(_part(p).numel() for p in parameters)
    if here > whole / context.processes + sum(p.numel() / len(p) for p in parameters):
        raise RunError(
            f"shard: process {context.rank} of {context.processes} has {here:,} of {whole:,} weights, which is more than its part"
        )


@contextmanager
def split_in_float32(model: "PreTrainedModel", context: Context) -> Iterator["PreTrainedModel"]:
    """A copy of the model, in float32 and split. Its trained weights are put into the model at the end, each in the dtype it has there.

    Raises what `split` raises.
    """
    copy = deepcopy(model)
    split(copy, context, torch.float32)
    yield copy
    with torch.no_grad():
        for (name, parameter), (same, trained) in zip(model.named_parameters(), copy.named_parameters(), strict=True):
            assert name == same and isinstance(trained, DTensor)
            parameter.copy_(trained.full_tensor())


@contextmanager
def zeros_kept_in_parts(weights: Iterable[Tensor]) -> Iterator[None]:
    """As `weights.zeros_kept`, after the gradient is accumulated: hooks on a gradient don't see that of a split weight."""
    hooks = [weight.register_post_accumulate_grad_hook(_without_zeros) for weight in weights]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _without_zeros(weight: Tensor) -> None:
    assert weight.grad is not None
    _part(weight.grad).masked_fill_(_part(weight) == 0, 0)


class ShardedLearner(Learner):
    """The learner of a split model. All processes look at the validation split together, and each writes and reads its own part."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        # gradients are averaged by the model itself; this makes no copies for that
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    @property
    def takes_part(self) -> bool:
        return True

    def own(self, file: Path) -> Path:
        return file.with_name(f"{self.args.process_index}-{file.name}")

    def trained(self) -> dict[str, Tensor]:
        return {name: _part(parameter) for name, parameter in super().trained().items()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._save(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        states = self.optimizer.state_dict()
        parts = {n: {key: _part(value) for key, value in state.items()} for n, state in states["state"].items()}
        written = {"optimizer": {**states, "state": parts}, "schedule": self.lr_scheduler.state_dict()}
        torch.save(written, self.own(Path(output_dir) / OPTIMIZER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        written = torch.load(self.own(Path(checkpoint) / OPTIMIZER), map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(written["optimizer"])
        self.lr_scheduler.load_state_dict(written["schedule"])
        for weight, state in self.optimizer.state.items():
            state.update({key: _as(weight, value) for key, value in state.items() if value.ndim})  # steps are a number


def is_split(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def _part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, all of it where it isn't split."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def _as(weight: DTensor, part: Tensor) -> DTensor:
    """This process's part of a tensor that is split as a weight is."""
    return DTensor.from_local(part, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride())
