"""Scales moved from an input to what makes it, exactly: y = W x = (W s) (x / s), where x / s comes of scaled weights before.

What can be scaled is found by trying, whatever the architecture is. It may be a norm whose output is the layers' input, or a linear layer
whose output reaches them unmixed. Such are up before down in a gated feed-forward, value before output in attention, and fc1 before fc2
around a ReLU. A candidate is right if the block's output stays the same to the last bits under random powers of two, which scale without
rounding. So a norm that feeds a residual too (BART) or computes with 1 + weight (Gemma) is left as it is, and so is GELU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.calibration.block import Block


@dataclass(frozen=True)
class Fold:
    """A place before `layers`, which share an input, that can divide it by a scale a column."""

    block: Block
    before: str
    layers: tuple[str, ...]

    def apply(self, scale: Tensor) -> None:
        """Divide the input by `scale` (columns,) and multiply the layers' weights by it."""
        source = self.block.module.get_submodule(self.before)
        assert isinstance(source.weight, Tensor)
        for part in (source.weight, getattr(source, "bias", None)):
            if isinstance(part, Tensor):
                part.data = (part.data.float() / (scale[:, None] if part.ndim == 2 else scale)).to(part.dtype)
        for name in self.layers:
            weight = self.block.layers[name].weight
            weight.data = (weight.data.float() * scale).to(weight.dtype)
        self.block.weights = {name: layer.weight.data for name, layer in self.block.layers.items()}


def fold_before(block: Block, layers: list[str]) -> Fold | None:
    """Where the scale of these layers' common input can be folded to; None where it can't. No layer of the block may be solved yet."""
    columns = block.layers[layers[0]].in_features
    signs = torch.randint(-1, 2, (columns,), generator=torch.Generator().manual_seed(0))
    scale = torch.exp2(signs.float()).to(block.device)
    expected = block.output(0)
    own = layers[0].rpartition(".")[0]
    for before in _candidates(block, layers[0], columns):
        if block.mixture_of(full := f"{block.name}.{before}") and not full.startswith(f"{own}."):
            continue  # another expert
        fold = Fold(block, before, tuple(layers))
        kept = {name: p.data for name, p in block.module.named_parameters()}
        fold.apply(scale)
        same = float((block.output(0) - expected).float().norm()) <= 1e-6 * float(expected.float().norm())
        for name, parameter in block.module.named_parameters():
            parameter.data = kept[name]
        block.weights = {name: layer.weight.data for name, layer in block.layers.items()}
        if same:
            return fold
    return None


def _candidates(block: Block, layer: str, columns: int) -> list[str]:
    """Modules of the block that run before a layer and have as many outputs as it has inputs, the nearest first."""
    names: list[str] = []
    target = block.layers[layer]

    def hook_of(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, *_: object) -> None:
            weight = getattr(module, "weight", None)
            if module is target:
                raise _Reached
            if isinstance(weight, Tensor) and len(weight) == columns and name not in names:
                names.insert(0, name)

        return hook

    handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in block.module.named_modules() if name]
    try:
        block.output(0)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return names


class _Reached(Exception):
    """The layer's turn has come; what comes behind it can't be before it."""
