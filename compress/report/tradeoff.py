"""What is gained against what is given up: the models that no other beats, and the picture of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.errors import ReportError, printable
from compress.metrics import Better
from compress.mistakes import suggest

if TYPE_CHECKING:
    import altair
    import pandas


def pareto(rows: Sequence[Sequence[float | None]], better: Sequence[Better]) -> list[bool]:
    """Which rows no other beats, by a figure a column.

    better   of each column; columns where neither is better don't count

    A row beats another when it is nowhere worse and somewhere better. A missing figure (None) is worse than any. Of equal rows none beats
    the other. Intervals don't count.
    """
    signs = [{"lower": 1, "higher": -1, "neither": 0}[direction] for direction in better]
    costs = [
        tuple((value is None, sign * (value or 0.0)) for value, sign in zip(row, signs, strict=True) if sign) for row in rows
    ]  # less is better, in every place
    front: list[tuple[tuple[bool, float], ...]] = []
    for cost in sorted(set(costs)):  # what beats a row stands before it, and what beats that, beats the row too
        if not any(all(a <= b for a, b in zip(other, cost, strict=True)) for other in front):
            front.append(cost)
    unbeaten = set(front)
    return [cost in unbeaten for cost in costs]


def plot_tradeoff(frame: "pandas.DataFrame", x: str = "weight_bytes", y: str | None = None) -> "altair.LayerChart":
    """A point a model, and the Pareto front as a line; below it other figures can be chosen.

    frame   what load_reports gives, or some of its rows
    x, y    figures as compress.pivot calls them; y is the quality that was measured where left out

    Whether the models were measured alike is not looked at, as `compress compare` does. Those that lack one of the two figures are left
    out. Raises ReportError for a figure that no model has, or of which neither more nor less is better.
    """
    from compress.report import plots
    from compress.report.frame import labels

    rows = frame.assign(figure=labels(frame)).dropna(subset="value")
    points = [
        {
            "name": printable(f"{recipe}: {stages}" if stages else f"{recipe}: {role}"),
            "role": role,
            "figures": dict(zip(own["figure"], own["value"].astype(float).tolist(), strict=True)),
            "missing": dict(zip(own["figure"], own["missing"].fillna(0).astype(int).tolist(), strict=True)),
        }
        for (_, recipe, stages, role), own in rows.groupby(["report", "recipe", "stages", "role"], sort=False)
    ]
    drawn = plots.axes(points)
    for name in (x, y):
        if name not in {None, *drawn}:
            if name in set(rows["figure"]):
                raise ReportError(f"neither more nor less of {name} is better, so there is no trade-off")
            raise ReportError(f"no report has a figure {name!r}{suggest(str(name), drawn)}")
    if len(drawn) < 2:
        raise ReportError(f"a trade-off needs two figures; there are {', '.join(drawn) or 'none'}")
    return plots.tradeoff(points, x, y).properties(width=480)
