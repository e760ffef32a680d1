"""An inspection as a picture: where parameters, bytes and time are, beside how near zero the weights are at every depth."""

import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import InputError, MissingPackage, printable
from compress.extras import install_line
from compress.inspection.findings import NORMAL, Inspection, Part, grouped, pooled
from compress.report.numbers import count, scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
BARS = {"parameter_share": ("parameters", "#33638d"), "byte_share": ("bytes", "#8fb8d8"), "time_share": ("time", "#e07b39")}
ROW, CELL = 0.42, 0.42  # inches
ROOM_FOR_NUMBERS = 16  # cells beside each other


def refuse(file: Path) -> None:
    """See before any work that a picture can be drawn into the file.

    Raises InputError, and MissingPackage where matplotlib isn't installed.
    """
    if file.suffix.lower() not in FORMATS:
        raise InputError(
            f"--picture {file}: there is no format {file.suffix or 'without an ending'!r} here; allowed are {' and '.join(FORMATS)}"
        )
    if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        why = (
            "is a folder"
            if file.is_dir()
            else f"the folder {file.parent} " + ("can't be written to" if file.parent.is_dir() else "isn't there")
        )
        raise InputError(f"--picture {file}: {why}")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackage(f"--picture {file} needs matplotlib, not installed here. Install with: {install_line('plot')}")


def draw(inspection: Inspection, file: Path) -> None:
    """Draw into a .png or .svg, which is there whole or not at all.

    Raises as `refuse` does.
    """
    refuse(file)
    drawing = figure(inspection)
    handle, partial = tempfile.mkstemp(prefix=f".{file.name}.", suffix=file.suffix.lower(), dir=file.parent)
    os.close(handle)
    try:
        drawing.savefig(partial, dpi=160, facecolor="white")
        Path(partial).chmod(0o644)
        Path(partial).replace(file)
    finally:
        Path(partial).unlink(missing_ok=True)


def figure(inspection: Inspection) -> "Figure":
    """The picture, with the rows of the table: bars, and beside them a map by depth."""
    from matplotlib.figure import Figure

    rows = grouped(inspection.parts)
    inside = [by_depth(layers) if row.kind == "linear" else {} for row, layers in rows]
    deepest = max((depth for layers in inside for depth in layers), default=0)
    map_width = min(7.0, max(1.6, CELL * (deepest + 1)))
    drawing = Figure(figsize=(7.6 + map_width, 1.9 + ROW * len(rows)), layout="constrained")
    bars, heat = drawing.subplots(1, 2, sharey=True, width_ratios=(4.2, map_width))
    _bars(bars, [row for row, _ in rows])
    _map(drawing, heat, inside, deepest)
    names = [re.sub(r" \(\d+ layers?\)$", "", row.name) if row.kind == "linear" else row.name for row, _ in rows]
    bars.set_yticks(range(len(rows)), [printable(name) for name in names], fontsize=8, parse_math=False)
    bars.set_title("where they are", fontsize=9, loc="left")
    heat.set_title("near zero, block by block", fontsize=9, loc="left")
    bars.set_ylim(len(rows) - 0.4, -0.6)
    drawing.suptitle(
        f"{printable(inspection.model)}: {count(inspection.parameters)} parameters, {scaled(inspection.bytes, 'bytes')}; a forward pass "
        f"over {inspection.batch_size} x {inspection.tokens} tokens in {scaled(inspection.seconds, 's')} on {inspection.device}",
        fontsize=10, parse_math=False,
    )  # fmt: skip
    return drawing


def by_depth(layers: Sequence[Part]) -> dict[int, Part]:
    """The layers of a row by the number of their block, which is the first in a name; those of one block (experts) taken together."""
    blocks: dict[int, list[Part]] = {}
    for layer in layers:
        if number := re.search(r"(?<![^.])\d+(?![^.])", layer.name):
            blocks.setdefault(int(number[0]), []).append(layer)
    return {depth: pooled(parts[0].name, parts) for depth, parts in blocks.items()}


def _bars(axes: "Axes", rows: Sequence[Part]) -> None:
    """Three bars a row: its share of parameters, bytes and time, in per cent."""
    height = 0.8 / len(BARS)
    for number, (share, (label, colour)) in enumerate(BARS.items()):
        places = [place + (number - 1) * height for place in range(len(rows))]
        axes.barh(places, [100 * getattr(row, share) for row in rows], height, color=colour, label=label)
    axes.set_xlabel("share of the model (%)", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.995), ncols=len(BARS))
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", which="both", length=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _map(drawing: "Figure", axes: "Axes", rows: Sequence[dict[int, Part]], deepest: int) -> None:
    """A cell a layer: the share of its weights below a tenth of its rms, in per cent; white is what a normal distribution has."""
    import numpy
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm

    shares = numpy.full((len(rows), deepest + 1), numpy.nan)
    for place, layers in enumerate(rows):
        for depth, layer in layers.items():
            shares[place, depth] = numpy.nan if layer.below_tenth is None else 100 * layer.below_tenth
    chance = 100 * NORMAL["below_tenth"]
    highest = float(numpy.nanmax(shares, initial=2 * chance))
    drawn = axes.imshow(
        numpy.ma.masked_invalid(shares), aspect="auto", cmap=colormaps["RdBu_r"].with_extremes(bad="#f1f1f1"),
        norm=TwoSlopeNorm(vcenter=chance, vmin=0, vmax=highest), interpolation="nearest",
    )  # fmt: skip
    if deepest < ROOM_FOR_NUMBERS:
        for (place, depth), value in numpy.ndenumerate(shares):
            if not numpy.isnan(value):
                dark = value < 0.25 * chance or value > chance + 0.75 * (highest - chance)
                axes.text(depth, place, f"{value:.1f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(0, deepest + 1, 1 + deepest // 16))
    axes.tick_params(labelsize=8, length=0)
    axes.tick_params(axis="y", labelleft=False)
    axes.set_xlabel("block", fontsize=9)
    axes.set_xticks([edge - 0.5 for edge in range(deepest + 2)], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(len(rows) + 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    legend = drawing.colorbar(drawn, ax=axes, fraction=0.12, pad=0.04, aspect=35, shrink=0.6, ticks=[0, chance, highest], format="%.1f")
    legend.set_label(f"weights below a tenth of the layer's rms (%)\nwhite: a normal distribution's {chance:.1f} %", fontsize=8)
    legend.ax.tick_params(labelsize=8)
    legend.outline.set_visible(False)
