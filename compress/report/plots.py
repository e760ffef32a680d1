"""The plots of a report, made with Altair: from rows of plain values, without colours, which the page or notebook brings.

`tradeoff` is an Altair chart, for notebooks too. The others are Vega-Lite: their rows are many, and Altair would look at each value.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress.metrics import METRICS, Metric, named
from compress.report.numbers import scaled

if TYPE_CHECKING:
    import altair

Row = Mapping[str, Any]
Spec = dict[str, Any]
ACROSS, UP = (
    ("peak_run_bytes", "weight_bytes", "file_bytes", "latency_p50"),
    ("rougeL", "bleu", "chrf", "accuracy", "exact_match", "cer", "divergence", "perplexity"),
)  # shown first
DATA = "rows"
NAMED = 12  # models; among more, only those on the front have their names beside them


def axes(points: Sequence[Row]) -> list[str]:
    """The labels of the figures that any of the models has and that have a better side, quality first."""
    labels = dict.fromkeys(label for point in points for label, value in point["figures"].items() if value is not None)
    return sorted((label for label in labels if _metric(label).better != "neither"), key=lambda label: _metric(label).kind != "quality")


def tradeoff(points: Sequence[Row], across: str | None = None, up: str | None = None) -> "altair.LayerChart":
    """One figure of each model against another, both to be chosen, with the Pareto front: the models that no other beats in both.

    points   a mapping each: `name`, `role` (baseline or candidate) and `figures` (a Measurement's label -> value in the metric's unit, or
             None where it is missing). `ranges` (label -> lowest and highest it may be) and `missing` (label -> examples without it) may
             be left out.

    across, up   the labels that are chosen first

    A model without one of the two figures is not drawn. Raises ValueError where `axes` finds fewer than two.
    """
    import altair as alt

    labels = axes(points)
    if len(labels) < 2:
        raise ValueError(f"a trade-off needs two figures with a better side; there are {', '.join(labels) or 'none'}")
    titles = {label: f"{label} ({', '.join(filter(None, (_unit(label)[0], f'{_metric(label).better} is better')))})" for label in labels}
    up = up or _first([label for label in labels if label != across], UP)
    across = across or _first([label for label in labels if label != up], ACROSS)
    chosen = [
        alt.param(name=name, value=titles[label], bind=alt.binding_select(options=list(titles.values()), name=name))
        for name, label in (("up", up), ("across", across))
    ]
    picked = {
        f"{axis}_{part}": f"datum['{part} of ' + {chosen}]"
        for axis, chosen in (("x", "across"), ("y", "up")) for part in ("value", "cost", "text", "low", "high")
    }  # fmt: skip
    cheapest: list[alt.SortField | dict[str, str]] = [alt.SortField("x_cost"), alt.SortField("y_cost")]
    base = (
        alt.Chart()
        .transform_calculate(**picked)
        .transform_filter("isValid(datum.x_value) && isValid(datum.y_value)")
        # the cheapest come first, and each is held against the best of those before it
        .transform_window(least="min(y_cost)", frame=[None, 0], sort=cheapest)
        .transform_window(before="lag(least)", sort=cheapest)
        .transform_calculate(
            front="!isValid(datum.before) || datum.y_cost < datum.before", label="datum.name + ': ' + datum.y_text + ', ' + datum.x_text"
        )
        .encode(
            alt.X("x_value:Q", title=None, scale=alt.Scale(zero=False, padding=36), axis=alt.Axis(tickCount=6)),
            alt.Y("y_value:Q", title=None, scale=alt.Scale(zero=False, padding=28), axis=alt.Axis(tickCount=6)),
            description="label:N",
            tooltip=[alt.Tooltip("name:N", title="model"), alt.Tooltip("y_text:N", title="up"), alt.Tooltip("x_text:N", title="across")],
        )
    )
    roles, right = ["baseline", "candidate"], "scale('x', datum.x_value) > 0.6 * width"  # on the right a name would run out of the plot
    front = base.transform_filter("datum.front")
    dots = base.mark_point(size=130, filled=True, opacity=1).encode(
        alt.Color("role:N", legend=None, scale=alt.Scale(domain=roles)),
        alt.Shape("role:N", legend=None, scale=alt.Scale(domain=roles, range=["diamond", "circle"])),
    )
    layers = [
        front.mark_line(interpolate="step-after", strokeDash=[5, 4], color="#888", tooltip=None, aria=False).encode(order="x_cost:Q"),
        base.mark_rule(opacity=0.6, tooltip=None, aria=False).encode(x="x_low:Q", x2="x_high:Q"),
        base.mark_rule(opacity=0.6, tooltip=None, aria=False).encode(y="y_low:Q", y2="y_high:Q"),
        dots,
        (base if len(points) <= NAMED else front)
        .mark_text(dy=-12, dx=alt.expr(f"{right} ? -9 : 9"), align=alt.expr(f"{right} ? 'right' : 'left'"), limit=200)
        .encode(text="name:N"),
        alt.Chart(alt.InlineData(values=[{}]))
        .mark_text(align="right", baseline="top", style="guide-title", text=alt.expr("across"))
        .encode(x=alt.value("width"), y=alt.value(alt.expr("height + 28"))),
    ]
    return alt.LayerChart(
        layer=layers, data=alt.InlineData(values=[_point(point, titles) for point in points]), width="container", height=340,
        padding={"left": 5, "right": 5, "top": 5, "bottom": 30},
        title=alt.TitleParams(text=alt.expr("up"), anchor="start", frame="group", style="guide-title"),
        description="Each model by two of its figures; a dashed line joins those that no other model beats in both.",
    ).add_params(*chosen)  # fmt: skip


def latencies(rows: Sequence[Row], names: Sequence[str]) -> Spec:
    """Every timing of every side, a tick each, with the figure that stands for them.

    rows    `what` (label of the figure), `name` (of the side), `figure` and `ms`, in milliseconds
    names   of the sides, in order
    """
    import altair as alt

    base = _chosen(rows, "what", "timed").encode(
        alt.X("ms:Q", title="milliseconds", scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=8)),
        alt.Y("name:N", title=None, sort=list(names)),
        alt.Color("name:N", legend=None, scale=alt.Scale(domain=list(names))),
    )  # fmt: skip
    ticks = base.mark_tick(thickness=2, size=22, opacity=0.55, aria=False).encode(
        tooltip=[alt.Tooltip("name:N"), alt.Tooltip("ms:Q", format=".4~g")]
    )
    figure = base.mark_tick(thickness=4, size=40, opacity=1).encode(
        alt.X("mean(figure):Q"), tooltip=[alt.Tooltip("name:N"), alt.Tooltip("mean(figure):Q", title="the figure, ms", format=".4~g")]
    )
    chart = alt.LayerChart(layer=[ticks, figure]).properties(width="container", height=52 * len(names))
    return _drawn(chart, rows, "Timings of each side; a long tick is the figure that stands for them.")


def memory(rows: Sequence[Row], names: Sequence[str], parts: Sequence[str]) -> Spec:
    """What holds each side's memory at its peak, stacked.

    rows    `name` (of the side), `part`, `bytes`
    names, parts   in order
    """
    import altair as alt

    kept = [part for part in parts if any(row["part"] == part for row in rows)]
    values = [{**row, "order": kept.index(row["part"]), "size": row["bytes"] / 1e6, "text": scaled(row["bytes"], "bytes")} for row in rows]
    chart = (
        alt.Chart(alt.NamedData(DATA))
        .mark_bar(size=26)
        .encode(
            alt.X("size:Q", title="MB", axis=alt.Axis(tickCount=6)), alt.Y("name:N", title=None, sort=list(names)),
            alt.Color("part:N", title=None, scale=alt.Scale(domain=kept), legend=alt.Legend(orient="bottom", columns=2)),
            order="order:Q", tooltip=[alt.Tooltip("name:N"), alt.Tooltip("part:N"), alt.Tooltip("text:N", title="bytes")],
        )
        .properties(width="container", height=42 * len(names))
    )  # fmt: skip
    return _drawn(chart, values, "Bytes of each side's memory by what holds them.")


def sensitivity(rows: Sequence[Row]) -> Spec:
    """What each layer lost: a cell a layer, its block across, its kind up.

    rows   `stage`, `layer`, `kind` (its name without the block), `block` (or None), `error` (a share), `text` (what was done to it)
    """
    import altair as alt

    narrow, kinds = len({row["block"] for row in rows}) <= 6, Counter(stage for stage, _ in {(row["stage"], row["kind"]) for row in rows})
    values = [{**row, "block": "-" if row["block"] is None else row["block"]} for row in rows]
    ending = "truncate(datum.label, containerSize()[0] < 600 ? 16 : 44, 'left')"  # by which kinds differ
    chart = (
        _chosen(rows, "stage", "stage")
        .mark_rect()
        .encode(
            alt.X("block:O", title="block", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            alt.Y("kind:N", title=None, sort=None, axis=alt.Axis(labelExpr=ending)),
            alt.Color("error:Q", title="error", scale=alt.Scale(range="ramp", zero=True),
                      legend=alt.Legend(format=".2~%", orient="bottom", gradientLength=180)),
            tooltip=[alt.Tooltip("layer:N"), alt.Tooltip("error:Q", format=".3~%"), alt.Tooltip("text:N", title="now")],
        )
        .properties(width={"step": 30} if narrow else "container", height=22 * max(kinds.values()))
    )  # fmt: skip
    return _drawn(chart, values, "The share of each layer's output that its stage changed.")


def curves(rows: Sequence[Row], names: Sequence[str]) -> Spec:
    """How each training went.

    rows    `what` (loss, validation ...), `name` (of the training), `step`, `value`
    names   of the trainings, in order
    """
    import altair as alt

    few = alt.Axis(tickCount=6)
    named = alt.Legend(orient="bottom", columns=1, values=list(names), symbolType="stroke")
    base = _chosen(rows, "what", "up").encode(
        alt.X("step:Q", title="step", axis=few), alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=few),
        alt.Color("name:N", title=None, scale=alt.Scale(domain=["", *names]), legend=named),  # the first colour is the baseline's
        tooltip=[alt.Tooltip("name:N"), alt.Tooltip("step:Q"), alt.Tooltip("value:Q", format=".4~g")],
    )  # fmt: skip
    dots = base.mark_point(size=60, opacity=0, aria=False)  # to point at
    chart = alt.LayerChart(layer=[base.mark_line(strokeWidth=2), dots]).properties(width="container", height=260)
    return _drawn(chart, rows, "Training, step by step.")


def _chosen(rows: Iterable[Row], field: str, words: str) -> "altair.Chart":
    """The rows with one value of a field, which people choose; where there is but one, no choice is offered."""
    import altair as alt

    options = list(dict.fromkeys(row[field] for row in rows))
    chart = alt.Chart(alt.NamedData(DATA))
    if len(options) < 2:
        return chart
    param = alt.param(name="chosen", value=options[0], bind=alt.binding_select(options=options, name=words))
    return chart.transform_filter(f"datum.{field} === chosen").add_params(param)


def _drawn(chart: "altair.Chart | altair.LayerChart", rows: Iterable[Row], description: str) -> Spec:
    """The chart with its rows."""
    return {**chart.to_dict(validate=False), "datasets": {DATA: list(rows)}, "description": description}


def _point(point: Row, titles: Mapping[str, str]) -> dict[str, Any]:
    """A model as one flat row: under each figure's title its value, the same as a cost (less is better), as text, and its range."""
    row: dict[str, Any] = {"name": point["name"], "role": point["role"]}
    for label, title in titles.items():
        value, scale = point["figures"].get(label), _unit(label)[1]
        if value is not None:
            row[f"value of {title}"] = value / scale
            row[f"cost of {title}"] = -value if _metric(label).better == "higher" else value
            missing = point.get("missing", {}).get(label)
            row[f"text of {title}"] = f"{label} {scaled(value, _metric(label).unit)}" + (f", {missing:,} missing" if missing else "")
            low, high = point.get("ranges", {}).get(label, (value, value))
            row[f"low of {title}"], row[f"high of {title}"] = low / scale, high / scale
    return row


def _metric(label: str) -> Metric:
    return METRICS[named(label)]


def _unit(label: str) -> tuple[str, float]:
    """The unit to draw in, and how much of the metric's own it is."""
    unit = _metric(label).unit
    return {"bytes": ("MB", 1e6), "s": ("ms", 1e-3), "1": ("", 1.0)}.get(unit, (unit, 1.0))


def _first(labels: Sequence[str], metrics: Sequence[str]) -> str:
    """The label of the first of these metrics that has one, or else the first label."""
    return next((label for metric in metrics for label in labels if named(label) == metric), labels[0])
