"""The candidate in an engine beside the original model in plain transformers.

It shows what staying there would cost, and whether the engine answers alike with the same weights.
"""

from compress.metrics import METRICS
from compress.report.numbers import change, figure, percent
from compress.results.report import Report
from compress.results.sides import Comparison

FIGURES = ("latency_p50", "tokens_per_second", "weight_bytes", "peak_run_bytes")  # besides quality


def head(report: Report) -> list[str]:
    return ["figure", "original in transformers", f"candidate in {report.engine}", f"change ({percent(report)} interval)"]


def rows(report: Report) -> list[list[str]]:
    """Quality and the figures that a deployment turns on: the original's in transformers, the candidate's, and how they compare."""
    lines = []
    for compared in _shown(report):
        sides = (report.original, report.candidate)
        theirs, ours = (figure(side.figure(compared.point)) if side else "-" for side in sides)
        measurement = report.candidate.figure(compared.point)
        lines.append([measurement.label if measurement else compared.metric, theirs, ours, change(compared)])
    return lines


def sentences(report: Report) -> list[str]:
    """The latency and sizes against the original, and how far the engine agrees with it, in short."""
    timed = [c for c in report.against_original if c.metric == "latency_p50" and c.estimate is not None]
    if report.original is None or not timed:
        return []
    places = ", ".join(f"batch {c.batch_size} x prompt {c.prompt_tokens} {change(c)}" for c in timed)
    sizes = [f"{words} {change(c)}" for c in report.against_original for name, words in _SIZES if c.metric == name]
    lines = [f"Against the original in plain transformers, latency is {'; '.join([places, *sizes])}."]
    if (agreed := report.agreement) is not None:
        lines.append(f"{agreed.sentence}.")
    return lines


_SIZES = (("weight_bytes", "weights"), ("peak_run_bytes", "peak memory while running"))


def _shown(report: Report) -> list[Comparison]:
    quality = [c for c in report.against_original if METRICS[c.metric].kind == "quality"]
    others = [c for name in FIGURES for c in report.against_original if c.metric == name]
    return [*quality, *others]
