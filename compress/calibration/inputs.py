"""The inputs of a block's layers: which layers share one, in which order they run, and the inputs' statistics."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.block import Block

STRIP = 256  # columns of a matrix product that are taken at a time


def in_order(block: Block) -> list[list[str]]:
    """The block's layers in the order they run, those with the very same input together (query, key and value)."""
    return [group for turn in turns(block) for group in turn]


def turns(block: Block) -> Iterator[list[list[str]]]:
    """The groups of layers that share an input, in the order they run.

    Groups that don't wait for each other, those of a mixture's experts, come together. The second moments of those that do take no more
    memory than the block's weights in float32.
    """
    room, size = sum(weight.numel() for weight in block.weights.values()), 0
    for turn in _unbounded(block):
        part: list[list[str]] = []
        for group in turn:
            needed = block.layers[group[0]].in_features ** 2
            if part and size + needed > room:
                yield part
                part, size = [], 0
            part.append(group)
            size += needed
        yield part
        size = 0


def _unbounded(block: Block) -> list[list[list[str]]]:
    groups: dict[tuple[int, int], list[str]] = {}
    alive = []  # inputs stay alive, so that no two have one address

    def note(name: str, states: Tensor) -> None:
        alive.append(states)
        groups.setdefault((states.data_ptr(), states._version), []).append(name)

    with listening(block, list(block.layers), note):
        block.output(0)
    all_turns: list[list[list[str]]] = []
    for group in groups.values():
        mixture = block.mixture_of(group[0])
        if mixture is None:
            all_turns.append([group])
        elif mixture[0] not in all_turns:
            all_turns += mixture
    return all_turns


def reach(block: Block) -> dict[str, Tensor]:
    """The largest magnitude of each input column over all batches, (columns,) float32, of every layer that is run, and every expert."""
    magnitudes: dict[str, Tensor] = {}
    batch = 0

    def note(name: str, states: Tensor) -> None:
        rows = block.given.rows(states, batch)
        most = rows.abs().amax(dim=0).float()  # NaN stays NaN
        magnitudes[name] = torch.maximum(magnitudes[name], most) if name in magnitudes else most

    with listening(block, list(block.layers), note):
        for batch in range(len(block.given.hidden)):
            block.output(batch)
    for name in block.layers.keys() - magnitudes.keys():  # an expert that no token reached counts as the others beside it
        if others := [magnitudes[other] for other in block.beside(name) if other in magnitudes]:
            magnitudes |= dict.fromkeys(block.sharing(name), torch.stack(others).amax(dim=0))
    return magnitudes


def second_moments(block: Block, names: list[str]) -> dict[str, Tensor]:
    """X^T X over the tokens of all calibration inputs of each layer, divided by their number: (columns, columns), float32."""

    def add(total: Tensor, rows: Tensor) -> None:
        for start in range(0, len(total), STRIP):  # of the two halves, which are alike, the one above the diagonal
            total[start : start + STRIP, start:].addmm_(rows[:, start : start + STRIP].t(), rows[:, start:])

    moments = _mean(block, names, lambda columns: torch.zeros(columns, columns, device=block.device), add)
    for total in moments.values():
        total.triu_()
        total.add_(total.triu(1).t())
    return moments


def mean_squares(block: Block, names: list[str]) -> dict[str, Tensor]:
    """The mean square over the tokens of all calibration inputs of each column of each layer's input: (columns,), float32."""
    return _mean(
        block, names, lambda columns: torch.zeros(columns, device=block.device), lambda total, rows: total.add_(rows.square().sum(dim=0))
    )


def _mean(block: Block, names: list[str], blank: Callable[[int], Tensor], add: Callable[[Tensor, Tensor], object]) -> dict[str, Tensor]:
    """The mean over tokens of what `add` sums up of a layer's inputs, all layers in one pass.

    Where fewer tokens reached an expert than it has columns, its statistics rest on too little. The mean of all experts beside it then
    stands in for as many tokens as it lacks, and a remark says so.
    """
    totals = {name: blank(block.layers[name].in_features) for name in names}
    counts = _summed(block, totals, add)
    few = [name for name in names if block.mixture_of(name) and counts[name] < block.layers[name].in_features]
    if few:
        beside = block.beside(few[0])
        pool = blank(block.layers[few[0]].in_features)
        tokens = sum(_summed(block, dict.fromkeys(beside, pool), add).values())
        for name in few:
            columns = block.layers[name].in_features
            totals[name].add_(pool, alpha=(columns - counts[name]) / max(tokens, 1))
            remark = f"{counts[name]} calibration tokens reached it, fewer than its {columns} columns; the rest is its layer's mean"
            block.remarks |= dict.fromkeys(block.sharing(name), remark)
            counts[name] = columns
    return {name: total.div_(max(counts[name], 1)) for name, total in totals.items()}


def _summed(block: Block, totals: dict[str, Tensor], add: Callable[[Tensor, Tensor], object]) -> dict[str, int]:
    """Add every batch's inputs of each of these layers to its total. Returns how many tokens that were, by layer."""
    counts = dict.fromkeys(totals, 0)
    for batch in range(len(block.given.hidden)):
        missing = set(totals)

        def hear(name: str, states: Tensor, batch: int = batch, missing: set[str] = missing) -> None:
            rows = block.given.rows(states, batch).float()
            add(totals[name], rows)
            counts[name] += len(rows)
            missing.discard(name)
            if not missing:
                raise _Enough

        with listening(block, list(totals), hear), suppress(_Enough):
            block.output(batch)
    return counts


def inputs(block: Block, name: str) -> Iterator[Tensor]:
    """A layer's inputs batch by batch, real tokens alone: (tokens, columns), float32."""
    for batch in range(len(block.given.hidden)):
        caught: list[Tensor] = []

        def catch(_: str, states: Tensor, caught: list[Tensor] = caught) -> None:
            caught.append(states)
            raise _Enough

        with listening(block, [name], catch), suppress(_Enough):
            block.output(batch)
        if caught:
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
