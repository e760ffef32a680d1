"""A report as Markdown, and the figures worth a line in any form."""

from typing import Any

import yaml

from compress.errors import printable
from compress.metrics import METRICS, TASK
from compress.report import memory, original, steps, times, turns
from compress.report.layers import lost_most, remarkable, summary
from compress.report.numbers import change, figure, percent, share, verdict_words
from compress.report.table import cell, table
from compress.report.why import at_run_time
from compress.results.report import Prediction, Report
from compress.results.sides import Comparison, Measurement
from compress.results.stages import StageRecord

Row = tuple[Measurement | None, Measurement | None, Comparison | None]  # a figure: baseline's, candidate's, how they compare
FIGURES = "Of speed and memory a figure is the geometric mean of the rounds, and its change the ratio of two of them."
WORST = 10
POINTS = 10  # of a training's curve
SHOWN = (
    "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "exact_match", "cer", "perplexity",
    "divergence", "divergence_first", "divergence_rest", "divergence_worst", "equal_top", "accuracy", "f1", "generated_tokens",
    "weight_bytes", "file_bytes", "parameters", "bits_per_weight", "peak_load_bytes", "peak_run_bytes", "process_gpu_bytes",
    "compile_seconds",
    "latency_p50", "latency_p90", "latency_p99", "ttft", "tpot", "tokens_per_second", "examples_per_second",
    "mbu", "mfu", "energy_per_token",
)  # fmt: skip


def whole(report: Report) -> str:
    """The report for people who read text."""
    parts = [
        brief(report),
        _original(report),
        *(f"{brief(part)}\n\n{_original(part)}" for part in report.parts[1:]),
        _memory(report),
        steps.section(report),
        _stages(report),
        *(_layers(record) for record in report.stages),
        *(_curve(record) for record in report.stages),
        _worst(report),
        times.section(report),
        turns.section(report),
        _environment(report),
        f"## Recipe\n\nAs it was run, defaults filled in; digest {report.digest}, examples {report.examples_digest}.",
        indented(report.settings),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def brief(report: Report) -> str:
    """The beginning of the report for people who read text: the verdict, the gates, the figures, and notes on them."""
    heading = f"# {cell(report.recipe)}{report.inside}: {verdict_words(report.verdict)}"
    cautions = [f"**{cell(sentence)}.**" for sentence in report.cautions]
    parts = [heading, f"{cell(report.decided_by)}.", *cautions, gates(report), figures(report), _notes(report)]
    return "\n\n".join(part for part in parts if part)


def shown(report: Report) -> list[Row]:
    """The figures worth a line, in order: baseline's, candidate's, and how they compare."""
    baseline, candidate = report.side("baseline"), report.side("candidate")
    compared = {c.point: c for c in report.comparisons}
    every = {m.point: m for side in (baseline, candidate) if side for m in side.measurements}
    order = {name: place for place, name in enumerate([*sorted(p[0] for p in every if p[0].startswith(TASK)), *SHOWN])}
    points = sorted((p for p in every if p[0] in order), key=lambda p: (p[2] or 0, p[1] or 0, order[p[0]]))
    return [(baseline.figure(p) if baseline else None, candidate.figure(p) if candidate else None, compared.get(p)) for p in points]


def either(row: Row) -> Measurement:
    """The figure of the side that has one, for what both have: metric and point."""
    measurement = row[0] or row[1]
    assert measurement is not None
    return measurement


def indented(settings: dict[str, Any]) -> str:
    """A recipe as an indented block, which nothing in it can end."""
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110)
    return "\n".join(f"    {line}" for line in printable(text).splitlines())


def gates(report: Report) -> str:
    if not report.gates:
        return ""
    rows = [[verdict_words(gate.verdict), gate.sentence] for gate in report.gates]
    return "## Gates\n\n" + table(["verdict", "what was found"], rows)


def figures(report: Report) -> str:
    header, rows = sides(report)
    by_rounds = any(c.kind == "ratio" and c.low is not None and c.low != c.high for c in report.comparisons)
    return "\n\n".join(["## Figures", table(header, rows), *([FIGURES] if by_rounds else [])])


def sides(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the figures of both sides."""
    rows = []
    for row in shown(report):
        (theirs, ours, compared), named = row, either(row)
        rows.append([named.label, figure(theirs), figure(ours), change(compared), METRICS[named.metric].better])
    header = ["figure", "baseline", "candidate", f"change ({percent(report)} interval)", "better"]
    return header, rows


def _original(report: Report) -> str:
    if not (rows := original.rows(report)):
        return ""
    return "## Beside the original in plain transformers\n\n" + table(original.head(report), rows)


def _memory(report: Report) -> str:
    sides = [report.side(role) for role in ("baseline", "candidate")]
    held, checked = memory.held(sides), memory.checked(sides)
    if not held:
        return ""
    parts = ["## Memory: what holds it", table(["at the most demanding point", "baseline", "candidate"], held)]
    return "\n\n".join([*parts, table(["what checks it", "baseline", "candidate"], checked)])


def _notes(report: Report) -> str:
    sentences = [f"{record.name}: {sentence}" for record in report.stages for sentence in record.said]
    lines = [f"- {cell(note)}" for note in [*sentences, *report.notes, *(f for side in report.sides for f in side.failures)]]
    return "## Notes\n\n" + "\n".join(lines) if lines else ""


def _stages(report: Report) -> str:
    if not report.stages:
        return ""
    rows = [
        [
            ", ".join(f"{key}: {value}" for key, value in record.stage.items()),
            f"{record.seconds:.1f} s" + (" (reused)" if record.reused else ""),
            at_run_time(record) or "-",
        ]
        for record in report.stages
    ]
    return "## Stages\n\n" + table(["stage", "took", "in use"], rows) + f"\n\nThe artifact: {cell(report.stages[-1].artifact)}"


def _layers(record: StageRecord) -> str:
    """What one stage did to its layers: in a sentence, those left out or remarked upon, those that lost most."""
    if not record.layers:
        return ""
    parts = [f"## Layers: {cell(record.name)}", f"{cell(summary(record.layers))}. Each is listed in report.json and layers.parquet."]
    if record.account:
        parts.append(f"{record.account.sentence}.")
    if groups := remarkable(record.layers):
        rows = [[name, "full" if bits is None else str(bits), remark] for name, bits, remark in groups]
        parts.append(table(["layer", "bits", "remark"], rows))
    if worst := lost_most(record.layers, WORST):
        sparse = any(layer.sparsity is not None for layer in worst)
        rows = [[layer.name, share(layer.sparsity) if sparse else str(layer.bits), share(layer.error)] for layer in worst]
        parts.append("Those that lost most; the error is the share of a layer's output on the calibration data that has changed:")
        parts.append(table(["layer", "zeros" if sparse else "bits", "error"], rows))
    elif any(layer.bits is not None for layer in record.layers):
        parts.append("What each layer lost was not measured.")
    return "\n\n".join(parts)


def _curve(record: StageRecord) -> str:
    """How one stage's training went, at a few points: of the looks at the validation split where there were any."""
    looks = [point for point in record.curve if point.validation is not None]
    points = looks or record.curve
    if not points:
        return ""
    few = [*points[:-1][:: -(-len(points) // POINTS)], points[-1]]
    rows = [[f"{point.step:,}", "-" if (loss := _loss_at(record, point.step)) is None else f"{loss:.4g}"] for point in few]
    if looks:
        rows = [[*row, f"{point.validation:.4g}"] for row, point in zip(rows, few, strict=True)]
    shown = table(["step", "loss", *(["validation"] if looks else [])], rows)
    return f"## Training: {cell(record.name)}\n\n{shown}\n\nEvery point is in report.json and curves.parquet."


def _loss_at(record: StageRecord, step: int) -> float | None:
    """The loss that was noted last by a step."""
    return next((point.loss for point in reversed(record.curve) if point.loss is not None and point.step <= step), None)


def _worst(report: Report) -> str:
    """The examples that lost most. Scores where lower is better are losses when they rise."""
    if report.score is None:
        return ""
    sign = -1 if METRICS[report.score].better == "lower" else 1

    def loss(example: Prediction) -> float:
        return sign * ((example.baseline_score or 0) - (example.candidate_score or 0))

    scored = [e for e in report.predictions if e.baseline_score is not None and e.candidate_score is not None]
    if not scored:
        return ""
    worst = [example for example in sorted(scored, key=loss, reverse=True)[:WORST] if loss(example) > 0]
    if not worst:
        return f"## Examples that lost most\n\nNone of {len(scored)} lost in {cell(report.score)}."
    blocks = []
    for example in worst:
        lines = [["prompt", example.prompt], *(["reference", text] for text in example.references)]
        lines += [[role, text] for role, text in (("baseline", example.baseline), ("candidate", example.candidate)) if text is not None]
        heading = f"### {cell(example.id)}: {cell(report.score)} {example.baseline_score:.1f} to {example.candidate_score:.1f}"
        blocks.append(heading + "\n\n" + table(["", "text"], [[name, _shortened(text)] for name, text in lines]))
    return "## Examples that lost most\n\n" + "\n\n".join(blocks)


def _shortened(text: str, limit: int = 1200) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text) - limit:,} more characters)"


def _environment(report: Report) -> str:
    return "## Environment\n\n" + table(["what", "value"], [[k, str(v)] for k, v in report.environment.items() if v is not None])
