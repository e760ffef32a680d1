"""From timings and readings to the figures of a side."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict

from compress.benchmark.messages import GridPoint
from compress.benchmark.statistics import corpus_value, geometric_mean
from compress.benchmark.subject import Round, Subject
from compress.metrics import METRICS, Missing
from compress.results.sides import Measurement, Side, Step
from compress.scores import Row

Speed = tuple[str, Callable[[list[float]], float], float]  # a figure, its value from the marks of one timing, the quantile over timings


def side(subject: Subject, common: list[GridPoint], ceilings: dict[str, float]) -> Side:
    measurements: list[Measurement] = []
    if subject.loads:
        measurements += _sizes(subject)
        measurements += _memory(subject, common)
    if subject.compiling:  # inductor keeps on disk what it compiled, so that later rounds take less
        measurements.append(_figure("compile_seconds", max(subject.compiling), samples=[[max(subject.compiling)]]))
    outcomes = subject.outputs.samples if subject.outputs else {}
    measurements += [quality(metric, samples) for metric, samples in outcomes.items()]
    if rows := [row for row in outcomes.get("divergence", []) if isinstance(row, list)]:
        measurements.append(_figure("divergence_worst", max(corpus_value("divergence", [row]) for row in rows)))
    dtype = subject.loads[0].traits.dtype if subject.loads else None
    steps = {
        point: Step(batch_size=point[0], prompt_tokens=point[1], **asdict(step))
        for point, step in zip(subject.looked_at, subject.explanation.steps if subject.explanation else [], strict=True)
    }
    for point, rounds in subject.rounds.items():
        reason = subject.reasons.get(point, "not reached on both sides")
        if not rounds:
            measurements += _unmeasured(reason, *point)
            continue
        measurements += _speeds(rounds, _rates(rounds, point[0]), *point)
        measurements += _energy(rounds, subject.joules[point], *point)
        if point in steps:
            measurements += _speeds(rounds, _utilisations(steps[point], ceilings, str(dtype)), *point)
    return Side(
        role=subject.role, model=subject.source.id, dtype=dtype, measurements=measurements, steps=list(steps.values()),
        failures=subject.failures, said=[*(subject.outputs.remarks if subject.outputs else []), *subject.remarks],
    )  # fmt: skip


def quality(metric: str, samples: Sequence[Row]) -> Measurement:
    """A figure of a side's outputs, from statistics with an example a row. Examples without any are left out, and counted."""
    present = [row for row in samples if isinstance(row, list)]
    reasons = Counter(Missing(row) for row in samples if not isinstance(row, list))
    counts = {"samples": list(samples), "missing": reasons.total()}
    if not present:
        summary = ", ".join(f"{reason} in {number:,} of {len(samples):,} examples" for reason, number in reasons.items())
        return Measurement(metric=metric, value=None, reason=f"none: {summary}", **counts)
    value = corpus_value(metric, present)
    if not math.isfinite(value):
        return Measurement(metric=metric, value=None, reason=f"its value is {value}", **counts)
    return Measurement(metric=metric, value=value, **counts)


def _sizes(subject: Subject) -> list[Measurement]:
    loaded, weights = subject.loads[0], subject.loads[0].weights
    sizes = {**asdict(weights), "file_bytes": loaded.file_bytes}
    measurements = [_figure(metric, sizes[metric]) for metric in ("weight_bytes", "buffer_bytes", "file_bytes", "parameters")]
    return [*measurements, _figure("bits_per_weight", 8 * weights.weight_bytes / weights.parameters)]


def _memory(subject: Subject, common: list[GridPoint]) -> list[Measurement]:
    """Peaks by round: while loading, and while running the most demanding point that both sides can run; with their parts."""
    loads = [load.peaks for load in subject.loads]
    held, rest = subject.loads[0].weights.weight_bytes, subject.loads[0].rest
    runs = []
    for peaks in subject.peaks:
        if common and all(point in peaks for point in common):
            run = dict(max((peaks[point] for point in common), key=lambda figures: figures["peak"]))
            for name in run.keys() & {"reserved", "process"}:  # these may be highest elsewhere
                run[name] = max(peaks[point][name] for point in common if name in peaks[point])
            if "cache" in run:
                run["other"] = max(0, min(rest, run["peak"] - held - run["cache"]))
                run["activations"] = max(0, run["peak"] - held - run["cache"] - run["other"])
            runs.append(run)
    series = {
        "peak_load_bytes": ("peak", loads),
        "sampled_load_bytes": ("sampled", loads),
        "peak_run_bytes": ("peak", runs),
        "sampled_run_bytes": ("sampled", runs),
        "kv_cache_bytes": ("cache", runs),
        "activation_bytes": ("activations", runs),
        "other_bytes": ("other", runs),
        "allocator_slack_bytes": ("slack", runs),
        "peak_reserved_bytes": ("reserved", runs),
        "process_gpu_bytes": ("process", runs),
        "cuda_context_bytes": ("context", runs),
    }
    rows = {metric: [[float(figures[name])] for figures in rounds if name in figures] for metric, (name, rounds) in series.items()}
    return [_figure(metric, central(samples), samples=samples) for metric, samples in rows.items() if samples]


def _rates(rounds: list[Round], batch_size: int) -> list[Speed]:
    """The speed figures of a point: their names, how they come from the marks of one timing, and the quantile over timings."""
    generated = len(rounds[0][0][0])

    def rate(marks: list[float]) -> float:
        return batch_size * generated / marks[-1]

    whole: list[Speed] = [(f"latency_p{share}", lambda marks: marks[-1], share / 100) for share in (50, 90, 99)]
    if generated == 1:
        return [*whole, ("examples_per_second", rate, 0.5)]
    return [*whole, ("ttft", lambda marks: marks[0], 0.5), ("tpot", _tpot, 0.5), ("tokens_per_second", rate, 0.5)]


def _utilisations(step: Step, ceilings: dict[str, float], dtype: str) -> list[Speed]:
    """What a model must read and compute over the time it took, as shares of what the machine can do; see `compress.metrics`."""
    read, bandwidth = step.weight_bytes + step.cache_bytes, ceilings["copy_bytes_per_second"]
    flops, rate = step.flops if step.prefill_flops is None else step.prefill_flops, ceilings[f"{dtype}_flops_per_second"]
    prefill: Speed = ("mfu", lambda marks: flops / marks[0] / rate, 0.5)
    return [prefill] if step.prefill_flops is None else [("mbu", lambda marks: read / _tpot(marks) / bandwidth, 0.5), prefill]


def _tpot(marks: list[float]) -> float:
    return (marks[-1] - marks[0]) / (len(marks) - 1)


def _speeds(rounds: list[Round], figures: list[Speed], batch_size: int, prompt_tokens: int) -> list[Measurement]:
    """Speed figures of a point. Samples are a row a round: medians a turn, high percentiles over the round's timings."""
    measurements = []
    for metric, of_marks, share in figures:
        raw = [[[of_marks(marks) for marks in turn] for turn in turns] for turns in rounds]
        flat = [[value for turn in turns for value in turn] for turns in raw]
        if share == 0.5:
            samples = [[quantile(turn, share) for turn in turns] for turns in raw]
        else:
            samples = [[quantile(values, share)] for values in flat]
        keep = flat if metric in ("latency_p50", "ttft", "tpot") else []
        measurements.append(
            Measurement(
                metric=metric, value=central(samples), batch_size=batch_size, prompt_tokens=prompt_tokens, samples=samples, raw=keep
            )
        )
    return measurements


def _energy(rounds: list[Round], joules: list[list[float]], batch_size: int, prompt_tokens: int) -> list[Measurement]:
    """Joules for each token written, a row a round with a number a turn. Empty where a turn lacks them, or for a classifier."""
    generated = len(rounds[0][0][0])
    if generated == 1 or any(len(drawn) != len(turns) for drawn, turns in zip(joules, rounds, strict=True)):
        return []
    tokens = batch_size * generated * len(rounds[0][0])
    samples = [[drawn / tokens for drawn in turns] for turns in joules]
    value = central(samples)
    return [Measurement(metric="energy_per_token", value=value, batch_size=batch_size, prompt_tokens=prompt_tokens, samples=samples)]


def central(samples: list[list[float]]) -> float:
    """The central value of samples, a row a round: their geometric mean; where one is zero the median.

    The ratio of two sides' geometric means is the one that gates judge (`statistics.paired_ratio`).
    """
    flat = [sample for row in samples for sample in row]
    if min(flat) <= 0 or min(flat) == max(flat):  # without a logarithm, or exact without one
        return statistics.median(flat)
    return geometric_mean(samples).estimate


def _unmeasured(reason: str, batch_size: int, prompt_tokens: int) -> list[Measurement]:
    """The figures of a point that was not measured: empty, with the reason."""
    names = [name for name, metric in METRICS.items() if metric.kind == "speed"]
    return [Measurement(metric=n, value=None, batch_size=batch_size, prompt_tokens=prompt_tokens, reason=reason) for n in names]


def quantile(values: list[float], share: float) -> float:
    """The quantile by linear interpolation between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _figure(metric: str, value: float, samples: list[list[float]] | None = None) -> Measurement:
    if not math.isfinite(value):
        return Measurement(metric=metric, value=None, reason=f"its value is {value}")
    return Measurement(metric=metric, value=value, samples=samples or [])
