"""What a block's layers are given: which layers share an input, in which order they run, and the inputs' second moments."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.quantize._walk import Block


def in_order(block: Block) -> list[list[str]]:
    """The block's layers in the order they run, those with the very same input together (query, key and value)."""
    seen: dict[tuple[int, int], list[str]] = {}
    kept = []  # inputs stay alive, so that no two have one address

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            kept.append(args[0])
            seen.setdefault((args[0].data_ptr(), args[0]._version), []).append(name)

        return hook

    with _hooked(block, note):
        block.output(0)
    rest = [[name] for name in block.layers if not any(name in group for group in seen.values())]
    return [*seen.values(), *rest]


def second_moments(block: Block, name: str) -> Tensor:
    """X^T X over the tokens of all calibration inputs of a layer, divided by their number: (columns, columns), float32."""
    layer = block.layers[name]
    total, count = torch.zeros(layer.in_features, layer.in_features, device=block.device), 0

    def add(_: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal count
            tokens = args[0].reshape(-1, layer.in_features).float()
            total.addmm_(tokens.t(), tokens)
            count += len(tokens)
            raise _Enough

        return hook

    with _hooked(block, add, only=name):
        for index in range(len(block.given.hidden)):
            try:
                block.output(index)
            except _Enough:
                continue
    return total / max(count, 1)


class _Enough(Exception):
    """The layer was reached; what comes behind it needn't run."""


@contextmanager
def _hooked(block: Block, hook_of: Callable[[str], Callable[..., None]], only: str | None = None) -> Iterator[None]:
    names = [only] if only else list(block.layers)
    handles = [block.layers[name].register_forward_pre_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
