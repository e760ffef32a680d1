"""What the stages did to each layer, as people read it."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from compress.report.numbers import share
from compress.results.stages import Layer


def counted(number: int) -> str:
    return f"{number} layer" if number == 1 else f"{number} layers"


def summary(layers: Sequence[Layer]) -> str:
    """84 layers: 80 in 4 bits, 2 in 8 bits (4.1 a layer on average); 2 left out, or 84 layers: 80 with 50 % zeros; 4 left out"""
    widths = Counter(layer.bits for layer in layers if layer.bits is not None and layer.sparsity is None)
    packed = ", ".join(f"{number} in {bits} bits" for bits, number in sorted(widths.items()))
    if len(widths) > 1:
        packed += f" ({sum(bits * number for bits, number in widths.items()) / widths.total():.1f} a layer on average)"
    sparse = sorted(layer.sparsity for layer in layers if layer.sparsity is not None)
    zeros = " to ".join(dict.fromkeys(share(sparsity) for sparsity in sparse[:1] + sparse[-1:]))
    kept = len(layers) - widths.total() - len(sparse)
    parts = (packed, f"{len(sparse)} with {zeros} zeros" if sparse else "", f"{kept} left out" if kept else "")
    return f"{counted(len(layers))}: " + "; ".join(filter(None, parts))


def lost_most(layers: Iterable[Layer], number: int) -> list[Layer]:
    """The layers with the largest errors, largest first; those without one are not among them."""
    return sorted((layer for layer in layers if layer.error is not None), key=lambda layer: layer.error or 0, reverse=True)[:number]


def line(layers: Sequence[Layer]) -> str:
    """The summary with the layer that lost most."""
    worst = "".join(f"; {layer.name} lost most, {share(layer.error)} of its output" for layer in lost_most(layers, 1))
    return summary(layers) + worst


def remarkable(layers: Iterable[Layer]) -> list[tuple[str, int | None, str]]:
    """Layers left out and then layers with a remark: name, bits, remark. Names that differ only in numbers stand together."""
    groups: dict[tuple[int | None, str, str], list[str]] = {}
    for layer in sorted(layers, key=lambda layer: layer.bits is not None):
        if layer.bits is None or layer.remark:
            groups.setdefault((layer.bits, layer.remark or "left out", alike(layer.name)), []).append(layer.name)
    return [(together(names), bits, remark) for (bits, remark, _), names in groups.items()]


def alike(name: str) -> str:
    """A layer's name with a star for each number, so that the same layer of every block has one name."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def together(names: list[str]) -> str:
    """layers.*.fc1 (6 layers), with a star where the names differ; one name as it is."""
    if len(names) == 1:
        return names[0]
    places = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(place[0] if len(set(place)) == 1 else "*" for place in places) + f" ({counted(len(names))})"
