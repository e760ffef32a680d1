"""What a block's layers are given: which layers share an input, in which order they run, and the inputs' statistics."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.block import Block

STRIP = 256  # columns of a matrix product that are taken at a time


def in_order(block: Block) -> list[list[str]]:
    """The block's layers in the order they run, those with the very same input together (query, key and value)."""
    groups: dict[tuple[int, int], list[str]] = {}
    alive = []  # inputs stay alive, so that no two have one address

    def note(name: str, states: Tensor) -> None:
        alive.append(states)
        groups.setdefault((states.data_ptr(), states._version), []).append(name)

    with listening(block, list(block.layers), note):
        block.output(0)
    return list(groups.values())


def reach(block: Block) -> dict[str, Tensor]:
    """The largest magnitude of each input column over all batches, (columns,) float32, of every layer that is run."""
    found: dict[str, Tensor] = {}
    batch = 0

    def note(name: str, states: Tensor) -> None:
        rows = block.given.rows(states, batch)
        most = rows.abs().amax(dim=0).float()  # NaN stays NaN
        found[name] = torch.maximum(found[name], most) if name in found else most

    with listening(block, list(block.layers), note):
        for batch in range(len(block.given.hidden)):
            block.output(batch)
    return found


def second_moments(block: Block, name: str) -> Tensor:
    """X^T X over the tokens of all calibration inputs of a layer, divided by their number: (columns, columns), float32."""
    columns = block.layers[name].in_features
    total, count = torch.zeros(columns, columns, device=block.device), 0
    for rows in inputs(block, name):
        for start in range(0, columns, STRIP):  # of the two halves, which are alike, the one above the diagonal
            total[start : start + STRIP, start:].addmm_(rows[:, start : start + STRIP].t(), rows[:, start:])
        count += len(rows)
    total.triu_()
    return total.add_(total.triu(1).t()).div_(max(count, 1))


def inputs(block: Block, name: str) -> Iterator[Tensor]:
    """A layer's inputs batch by batch, real tokens alone: (tokens, columns), float32."""
    for batch in range(len(block.given.hidden)):
        caught: list[Tensor] = []

        def catch(_: str, states: Tensor, caught: list[Tensor] = caught) -> None:
            caught.append(states)
            raise _Enough

        with listening(block, [name], catch):
            try:
                block.output(batch)
            except _Enough:
                yield block.given.rows(caught[0], batch).float()


@contextmanager
def listening(block: Block, names: list[str], hear: Callable[[str, Tensor], None]) -> Iterator[None]:
    """hear(name, input) is called before each of these layers runs, while the context lasts."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            hear(name, args[0])

        return hook

    handles = [block.layers[name].register_forward_pre_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Enough(Exception):
    """The layer was reached; what comes behind it needn't run."""
