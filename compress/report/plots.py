"""The plots of a report, as Vega-Lite charts by Altair: they take rows of plain values and no colours, which the page or notebook brings."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress.metrics import METRICS
from compress.report.numbers import scaled

if TYPE_CHECKING:
    import altair

Row = Mapping[str, Any]
ACROSS, UP = ("peak_run_bytes", "weight_bytes", "file_bytes", "latency_p50"), ("rougeL", "bleu", "accuracy", "perplexity")  # shown first
NAMED = 12  # models; among more, only those on the front have their names beside them


def tradeoff(points: Sequence[Row]) -> "altair.LayerChart":
    """One figure of each model against another, both to be chosen, with the Pareto front: the models that no other beats in both.

    points   a mapping each: `name`, `role` (baseline or candidate), `figures` (label, as a Measurement has it -> value in the metric's
             unit, or None where it is missing)

    A model without one of the two figures is not drawn. Raises ValueError where fewer than two figures have a value and a better side.
    """
    import altair as alt

    labels = list(dict.fromkeys(label for p in points for label, v in p["figures"].items() if v is not None and _metric(label).better != "neither"))
    if len(labels) < 2:
        raise ValueError("a trade-off needs two figures with a better side")
    labels.sort(key=lambda label: _metric(label).kind != "quality")
    titles = {label: f"{label} ({_unit(label)[0]}, {_metric(label).better} is better)" for label in labels}
    up = _first(labels, UP, labels[0])
    across = _first([label for label in labels if label != up], ACROSS, labels[-1] if labels[-1] != up else labels[0])
    chosen = [
        alt.param(name=name, value=titles[label], bind=alt.binding_select(options=list(titles.values()), name=words))
        for name, label, words in (("up", up, "up"), ("across", across, "across"))
    ]
    cheapest = [alt.SortField("x_cost"), alt.SortField("y_cost")]
    base = (
        alt.Chart()
        .transform_filter("isValid(datum[up]) && isValid(datum[across])")
        .transform_calculate(
            x="datum[across]", y="datum[up]", x_cost="datum['cost of ' + across]", y_cost="datum['cost of ' + up]",
            x_text="datum['text of ' + across]", y_text="datum['text of ' + up]",
        )
        # the cheapest come first, and each is held against the best of those before it
        .transform_window(least="min(y_cost)", frame=[None, 0], sort=cheapest)
        .transform_window(before="lag(least)", sort=cheapest)
        .transform_calculate(front="!isValid(datum.before) || datum.y_cost < datum.before")
        .encode(
            alt.X("x:Q", title=None, scale=alt.Scale(zero=False, padding=48)), alt.Y("y:Q", title=None, scale=alt.Scale(zero=False, padding=28)),
            tooltip=[alt.Tooltip("name:N", title="model"), alt.Tooltip("y_text:N", title="up"), alt.Tooltip("x_text:N", title="across")],
        )
    )  # fmt: skip
    front = base.transform_filter("datum.front")
    line = front.mark_line(interpolate="step-after", strokeDash=[5, 4], color="#888", tooltip=None).encode(order="x_cost:Q")
    dots = base.mark_point(size=130, filled=True, opacity=1).encode(
        alt.Color("role:N", legend=None, scale=alt.Scale(domain=["baseline", "candidate"])),
        alt.Shape("role:N", legend=None, scale=alt.Scale(domain=["baseline", "candidate"], range=["diamond", "circle"])),
    )
    names = (base if len(points) <= NAMED else front).mark_text(dy=-14, limit=170).encode(text="name:N")
    below = alt.Chart(alt.Data(values=[{}])).mark_text(align="right", baseline="top", style="guide-title", text=alt.expr("across"))
    below = below.encode(x=alt.value("width"), y=alt.value(alt.expr("height + 28")))
    return alt.layer(line, dots, names, below, data=alt.Data(values=[_point(point, titles) for point in points])).add_params(*chosen).properties(
        width="container", height=340, padding={"left": 5, "right": 5, "top": 5, "bottom": 30},
        title=alt.TitleParams(text=alt.expr("up"), anchor="start", frame="group", style="guide-title"),
        description="Each model by two of its figures; a dashed line joins those that no other model beats in both.",
    )  # fmt: skip


def latencies(rows: Sequence[Row], names: Sequence[str]) -> "altair.LayerChart":
    """Every timing of every side, a tick each, with the median.

    rows    `what` (label of the figure), `name` (of the side), `ms`
    names   of the sides, in order
    """
    import altair as alt

    base = _chosen(rows, "what", "timed").encode(
        alt.X("ms:Q", title="milliseconds", scale=alt.Scale(zero=False, nice=True)), alt.Y("name:N", title=None, sort=list(names)),
        alt.Color("name:N", legend=None, scale=alt.Scale(domain=list(names))),
    )  # fmt: skip
    ticks = base.mark_tick(thickness=1.5, size=22, opacity=0.45).encode(tooltip=[alt.Tooltip("name:N"), alt.Tooltip("ms:Q", format=".4~g")])
    median = base.mark_tick(thickness=4, size=40, opacity=1).encode(
        alt.X("median(ms):Q"), tooltip=[alt.Tooltip("name:N"), alt.Tooltip("median(ms):Q", title="median, ms", format=".4~g")]
    )
    return alt.layer(ticks, median).properties(
        width="container", height={"step": 52}, autosize="fit-x", description="Timings of each side; a long tick is the median."
    )


def memory(rows: Sequence[Row], names: Sequence[str], parts: Sequence[str]) -> "altair.Chart":
    """What holds each side's memory at its peak, stacked.

    rows    `name` (of the side), `part`, `bytes`
    names, parts   in order
    """
    import altair as alt

    kept = [part for part in parts if any(row["part"] == part for row in rows)]
    values = [{**row, "order": kept.index(row["part"]), "text": scaled(row["bytes"], "bytes")} for row in rows]
    return (
        alt.Chart(alt.Data(values=values))
        .mark_bar(size=26)
        .encode(
            alt.X("bytes:Q", title="bytes", axis=alt.Axis(format="~s", tickCount=6)), alt.Y("name:N", title=None, sort=list(names)),
            alt.Color("part:N", title=None, sort=kept, scale=alt.Scale(domain=kept), legend=alt.Legend(orient="bottom", columns=3)),
            order="order:Q",
            tooltip=[alt.Tooltip("name:N"), alt.Tooltip("part:N"), alt.Tooltip("text:N", title="bytes")],
        )
        .properties(width="container", height={"step": 42}, autosize="fit-x", description="Bytes of each side's memory by what holds them.")
    )  # fmt: skip


def sensitivity(rows: Sequence[Row]) -> "altair.Chart":
    """What each layer lost: a cell a layer, its block across, its kind up.

    rows   `stage`, `layer`, `kind` (its name without the block), `block` (or None), `error` (a share), `text` (what was done to it)
    """
    import altair as alt

    narrow = len({row["block"] for row in rows}) <= 12
    values = [{**row, "block": "-" if row["block"] is None else row["block"]} for row in rows]
    return (
        _chosen(values, "stage", "stage")
        .mark_rect()
        .encode(
            alt.X("block:O", title="block", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            alt.Y("kind:N", title=None, sort=None, axis=alt.Axis(labelLimit=260)),
            alt.Color("error:Q", title="error", scale=alt.Scale(range="ramp", zero=True), legend=alt.Legend(format=".2~%", orient="bottom", gradientLength=180)),
            tooltip=[alt.Tooltip("layer:N"), alt.Tooltip("error:Q", format=".3~%"), alt.Tooltip("text:N", title="now")],
        )
        .properties(
            width={"step": 30} if narrow else "container", height={"step": 22}, autosize="pad" if narrow else "fit-x",
            description="The share of each layer's output that its stage changed.",
        )
    )  # fmt: skip


def curves(rows: Sequence[Row], names: Sequence[str]) -> "altair.LayerChart":
    """How each training went.

    rows    `what` (loss, validation ...), `name` (of the training), `step`, `value`
    names   of the trainings, in order
    """
    import altair as alt

    base = _chosen(rows, "what", "up").encode(
        alt.X("step:Q", title="step"), alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
        alt.Color("name:N", title=None, sort=list(names), scale=alt.Scale(domain=list(names)), legend=alt.Legend(orient="bottom", columns=1, labelLimit=0)),
        tooltip=[alt.Tooltip("name:N"), alt.Tooltip("step:Q"), alt.Tooltip("value:Q", format=".4~g")],
    )  # fmt: skip
    dots = base.mark_point(size=60, opacity=0)  # to point at
    return alt.layer(base.mark_line(strokeWidth=2), dots).properties(width="container", height=260, description="Training, step by step.")


def _chosen(rows: Iterable[Row], field: str, words: str) -> "altair.Chart":
    """The rows with one value of a field, which people choose; where there is but one, no choice is offered."""
    import altair as alt

    values = list(rows)
    options = list(dict.fromkeys(row[field] for row in values))
    chart = alt.Chart(alt.Data(values=values))
    if len(options) < 2:
        return chart
    param = alt.param(name="chosen", value=options[0], bind=alt.binding_select(options=options, name=words))
    return chart.transform_filter(f"datum.{field} === chosen").add_params(param)


def _point(point: Row, titles: Mapping[str, str]) -> dict[str, Any]:
    """A model as one flat row: its figures by title, the same as costs (less is better), and as text."""
    row: dict[str, Any] = {"name": point["name"], "role": point["role"]}
    for label, title in titles.items():
        if (value := point["figures"].get(label)) is not None:
            row[title] = value / _unit(label)[1]
            row[f"cost of {title}"] = -value if _metric(label).better == "higher" else value
            row[f"text of {title}"] = f"{label} {scaled(value, _metric(label).unit)}"
    return row


def _metric(label: str) -> Any:
    return METRICS[label.partition(" [")[0]]


def _unit(label: str) -> tuple[str, float]:
    """The unit to draw in, and how much of the metric's own it is."""
    unit = _metric(label).unit
    return {"bytes": ("MB", 1e6), "s": ("ms", 1e-3), "1": ("", 1.0)}.get(unit, (unit, 1.0))


def _first(labels: Sequence[str], wanted: Sequence[str], otherwise: str) -> str:
    """The label of the metric that is wanted most."""
    return next((label for metric in wanted for label in labels if label.partition(" [")[0] == metric), otherwise)
