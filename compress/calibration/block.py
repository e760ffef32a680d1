"""One block of a model while it is solved."""

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._pytree import tree_leaves, tree_map_only

from compress import experts
from compress.calibration.stream import Stream


class Solution:
    """What a layer becomes.

    sparsity  the share of its weights that are zero, where that was the aim
    """

    sparsity: float | None = None

    def weight(self) -> Tensor:
        """What it computes with, (rows, columns)."""
        raise NotImplementedError

    def given(self, states: Tensor) -> Tensor:
        """Its inputs as it computes with them."""
        return states


@dataclass
class _Part:
    """A part of a block: its layers, and what came of it, batch by batch, since all of them are solved; in main memory."""

    layers: "Set[str]"
    outputs: dict[int, Any] = field(default_factory=dict)


@dataclass
class Block:
    """One block with its weights and its linear layers to solve.

    bits      how many a weight of each layer will be stored in
    given     its inputs as the solved blocks before it make them
    targets   the uncompressed model's hidden states behind this block, batch by batch; empty unless asked for
    stored    the dtype that each tensor of the model is stored in, by name; computation may use a faster one
    weights   each layer's uncompressed weights
    left_out  why a layer keeps its full precision
    remarks   what is odd about a layer
    """

    name: str
    module: nn.Module
    layers: dict[str, nn.Linear]
    bits: dict[str, int]
    given: Stream
    targets: list[Tensor]
    device: str
    stored: dict[str, torch.dtype]
    weights: dict[str, Tensor] = field(init=False)
    solved: dict[str, Solution] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = {name: layer.weight.data for name, layer in self.layers.items()}
        self._batch: int | None = None  # while one is led through and outputs are kept
        self._parts: dict[str, _Part] = {}
        self._keep_parts()
        self._mixtures: dict[str, list[list[list[str]]]] = {}
        for path, mixture in experts.parted(self.module):
            groups = [[[f"{self.name}.{path}.{name}" for name in names] for names in turn] for turn in mixture.turns()]
            turns = [[kept for group in turn if (kept := [name for name in group if name in self.layers])] for turn in groups]
            turns = [turn for turn in turns if turn]
            self._mixtures |= {name: turns for turn in turns for group in turn for name in group}

    def mixture_of(self, name: str) -> list[list[list[str]]] | None:
        """The layers of all experts beside that of this layer: first the projections up, a group for each expert, then those back down."""
        return self._mixtures.get(name)

    def sharing(self, name: str) -> list[str]:
        """The layers in an expert that have this one's input."""
        return next((group for turn in self._mixtures.get(name, []) for group in turn if name in group), [])

    def beside(self, name: str) -> list[str]:
        """A layer in an expert, and one in each of the other experts that has its place."""
        turns = self._mixtures.get(name, [])
        return [group[0] for turn in turns if any(name in group for group in turn) for group in turn]

    def output(self, batch: int, anew: bool = False) -> Tensor:
        """The hidden states behind the block for one batch. What comes of a part whose layers are all solved is kept, not worked out again.

        anew    every layer is run
        """
        self._batch = None if anew else batch
        try:
            return self.given.through(self.module, batch, self.device)
        finally:
            self._batch = None

    def release(self) -> None:
        """Forget what came of the parts; the module is as it was."""
        for path in self._parts:
            del self.module.get_submodule(path).forward
        self._parts.clear()

    def _keep_parts(self) -> None:
        """Have the outermost modules with some of the layers, attention or a feed-forward, keep what comes of them."""
        for path, part in self.module.named_modules():
            inside = {name for name in self.layers if name.startswith(f"{self.name}.{path}.")}
            outermost = path and not any(path.startswith(f"{outer}.") for outer in self._parts)
            if outermost and inside and len(inside) < len(self.layers) and not isinstance(part, nn.ModuleList | nn.ModuleDict):
                self._parts[path] = _Part(inside)
                part.forward = partial(self._through, self._parts[path], part.forward)

    def _through(self, part: "_Part", forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        done = self.solved.keys() | self.left_out.keys()
        if self._batch is None or not part.layers <= done:
            return forward(*args, **kwargs)
        if self._batch in part.outputs:
            return tree_map_only(Tensor, lambda tensor: tensor.to(self.device), part.outputs[self._batch])
        output = forward(*args, **kwargs)
        size = sum(leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        small = size <= 2 * self.given.hidden[self._batch].numel()  # attention's matrices are not
        if small and not self.layers.keys() <= done:  # else this pass is the last
            part.outputs[self._batch] = tree_map_only(Tensor, lambda tensor: tensor.cpu(), output)
        return output

    def set(self, name: str, solution: Solution) -> None:
        """Give a layer its solution; it computes with it from here on."""
        for part in self._parts.values():
            if name in part.layers:
                part.outputs.clear()
        layer = self.layers[name]
        layer.weight.data = solution.weight().to(self.stored[f"{name}.weight"]).to(layer.weight.dtype)
        layer.forward = lambda x: linear(solution.given(x), layer.weight, layer.bias)  # type: ignore
        self.solved[name] = solution

    def sound(self, layers: list[str], statistic: Tensor) -> bool:
        """Whether a statistic of these layers' common input can be worked with; else they keep their full precision."""
        if not torch.isfinite(statistic).all():
            why = "its inputs hold inf or NaN on the calibration data"
        elif not statistic.any():
            why = "its inputs are all zero on the calibration data"
        else:
            return True
        self.left_out |= dict.fromkeys(layers, why)
        return False
