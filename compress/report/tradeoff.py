"""What is gained against what is given up: the models that no other beats, and the picture of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.errors import MissingPackage, ReportError, printable
from compress.metrics import Better
from compress.mistakes import suggest

if TYPE_CHECKING:
    import altair
    import pandas

QUALITY = ("rougeL", "perplexity", "accuracy", "bleu")


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
    """A point a model, and the Pareto front as a line: what is the best to be had in one figure at each value of the other.

    frame   what load_reports gives, or some of its rows
    x, y    figures as compress.pivot calls them; y is the quality that was measured where left out

    Whether the models were measured alike is not looked at, as `compress compare` does. Those that lack one of the two figures are left
    out. Needs compress[plot]. Raises ReportError for a figure that no model has, or of which neither more nor less is better.
    """
    from compress.report.frame import labels, pivot

    try:
        import altair
    except ImportError:
        raise MissingPackage("plot_tradeoff needs altair, not installed here. Install with: pip install 'compress[plot]'") from None

    figures = frame.assign(figure=labels(frame)).drop_duplicates("figure").set_index("figure")
    y = y or next((name for name in QUALITY if name in figures.index), QUALITY[0])
    for name in (x, y):
        if name not in figures.index:
            raise ReportError(f"no report has a figure {name!r}{suggest(name, list(figures.index))}")
        if figures["better"][name] == "neither":
            raise ReportError(f"neither more nor less of {name} is better, so there is no trade-off")
    points = pivot(frame)[[x, y]].dropna().reset_index()
    front = pareto(points[[x, y]].to_numpy().tolist(), figures["better"][[x, y]].tolist())
    values = [
        {
            "model": printable(point["stages"] or point["role"]), "role": point["role"], "recipe": printable(point["recipe"]),
            "report": printable(point["report"]), "verdict": point["verdict"] if point["role"] == "candidate" else "", "x": float(point[x]),
            "y": float(point[y]), "front": unbeaten,
        }
        for point, unbeaten in zip(points.to_dict("records"), front, strict=True)
    ]  # fmt: skip

    def axis(name: str) -> dict[str, Any]:
        unit = figures["unit"][name]
        title = name if unit == "1" else f"{name} ({unit})"
        return {"title": title, "scale": altair.Scale(zero=False), "axis": altair.Axis(format="~s") if unit == "bytes" else altair.Axis()}

    chart = altair.Chart(altair.InlineData(values=values)).encode(x=altair.X("x:Q", **axis(x)), y=altair.Y("y:Q", **axis(y)))
    line = chart.transform_filter("datum.front").mark_line(
        interpolate="step-after" if figures["better"][x] == "lower" else "step-before", strokeDash=[4, 3], color="gray"
    )
    tooltip = [altair.Tooltip(f"{name}:N") for name in ("model", "recipe", "report", "verdict")]
    tooltip += [altair.Tooltip(f"{channel}:Q", title=name, format=".5~g") for channel, name in (("x", x), ("y", y))]
    dots = chart.mark_point(filled=True, size=90).encode(
        color=altair.Color("model:N", legend=altair.Legend(labelLimit=400)), shape="role:N", tooltip=tooltip,
        opacity=altair.condition("datum.front", altair.value(1), altair.value(0.45)),
    )  # fmt: skip
    layers: altair.LayerChart = (line + dots).properties(width=480, height=320).interactive()
    return layers
