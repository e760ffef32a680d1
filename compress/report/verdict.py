"""May the candidate replace the baseline? Every figure against its counterpart, every gate against its limit.

A gate passes when its whole interval lies within the limit, fails when it lies outside, and can't tell when the limit is inside it, or when
there is too little for an interval. Sizes are exact and have none. The worst gate decides; what was not measured can't pass.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compress.benchmark import statistics
from compress.benchmark.statistics import Effect
from compress.errors import ReportError
from compress.metrics import METRICS
from compress.recipe import Gate
from compress.results import Comparison, GateResult, Measurement, Report, Side, Verdict

RATIOS = ("max_ratio", "min_ratio")
WORDS = {"max_drop": " drop", "max_rise": " rise", "max_ratio": " ratio", "min_ratio": " ratio", "max": "", "min": ""}


@dataclass(frozen=True)
class Pair:
    """A figure on both sides. `same_run` says that the sides took turns; examples are always the same ones."""

    theirs: Measurement
    ours: Measurement
    same_run: bool

    def effect(self, ratio: bool) -> Effect:
        """candidate / baseline or candidate - baseline, with bounds where there are any."""
        a, b = self.theirs, self.ours
        assert a.value is not None and b.value is not None
        base = a.value
        kind = METRICS[b.metric].kind
        if kind == "quality":
            if len(a.samples) != len(b.samples):
                raise ReportError(f"{b.metric} was measured on {len(a.samples)} examples on one side and {len(b.samples)} on the other")
            return _finite(statistics.paired(b.metric, a.samples, b.samples, ratio))
        found: Effect
        if a.value <= 0 or any(x <= 0 for x in [b.value, *(x for row in [*a.samples, *b.samples] for x in row)]):
            found = math.nan, None, None
        elif kind == "size":
            found = (b.value / a.value,) * 3
        elif self.same_run:
            together = min(len(a.samples), len(b.samples))
            found = statistics.paired_ratio(a.samples[:together], b.samples[:together])
        else:
            found = statistics.unpaired_ratio(a.samples, b.samples)
        return _finite(found if ratio else _each(found, lambda x: (x - 1) * base))


def pairs(baseline: Side, candidate: Side, same_run: bool) -> list[Pair]:
    """Every figure that both sides have."""
    found = []
    for ours in candidate.measurements:
        theirs = baseline.figure(ours.point)
        if theirs is not None and theirs.value is not None and ours.value is not None:
            found.append(Pair(theirs, ours, same_run))
    return found


def compare(pair: Pair) -> Comparison:
    """How the two figures compare: by difference for quality, by ratio for all else."""
    ratio = METRICS[pair.ours.metric].kind != "quality"
    estimate, low, high = pair.effect(ratio)
    assert pair.theirs.value is not None and pair.ours.value is not None
    return Comparison(
        metric=pair.ours.metric, batch_size=pair.ours.batch_size, prompt_tokens=pair.ours.prompt_tokens, baseline=pair.theirs.value,
        candidate=pair.ours.value, kind="ratio" if ratio else "difference", estimate=None if math.isnan(estimate) else estimate,
        low=low, high=high,
    )  # fmt: skip


def gates(check: dict[str, Gate], compared: Sequence[Pair], baseline: Side | None, candidate: Side) -> list[GateResult]:
    """Every limit of every gate, at every grid point that either side was to be measured at."""
    by_point = {pair.ours.point: pair for pair in compared}
    results = []
    for metric, gate in check.items():
        sides = [side for side in (candidate, baseline) if side is not None]
        figures = {m.point: m for side in reversed(sides) for m in side.measurements if m.metric == metric}
        for kind in Gate.model_fields:
            limit = getattr(gate, kind)
            if limit is None:
                continue
            if not figures:
                results.append(_unmeasured(Measurement(metric=metric, value=None), kind, limit, "not measured"))
            for point, figure in figures.items():
                results.append(_gate(figure, by_point.get(point), candidate.figure(point), kind, limit))
    return results


def decide(results: Sequence[GateResult], failures: Sequence[str]) -> tuple[Verdict, str]:
    """The verdict and what decided it."""
    for result in results:
        if result.verdict == "fail":
            return "fail", result.sentence
    if failures:
        return "cannot_tell", f"not everything could be measured: {failures[0]}"
    for result in results:
        if result.verdict == "cannot_tell":
            return "cannot_tell", result.sentence
    if not results:
        return "cannot_tell", "the recipe sets no limits under check to judge by"
    return "pass", "every gate holds"


def require_comparable(ours: Report, theirs: Report) -> None:
    """Raise ReportError unless both were measured alike: same examples, same generation, same benchmark, same machine."""
    mine, other = (_measured_how(report) for report in (ours, theirs))
    for what in mine:
        if mine[what] != other[what]:
            raise ReportError(
                f"{ours.folder} and {theirs.folder} were not measured alike: {what} is {mine[what]!r} in one, {other[what]!r} in the "
                "other; measure one again as the other was"
            )


def _measured_how(report: Report) -> dict[str, object]:
    data, environment = report.settings["data"], report.environment
    return {
        "the digest of the examples": report.examples_digest,
        "data.chat": data.get("chat"),
        "data.max_tokens": data.get("max_tokens"),
        "generation": report.settings["generation"],
        "benchmark": report.settings["benchmark"],
        **{what: environment.get(what) for what in ("device", "gpu", "cpu", "threads", "cores")},
    }


def _gate(figure: Measurement, pair: Pair | None, ours: Measurement | None, kind: str, limit: float) -> GateResult:
    if ours is not None and ours.value is None and ours.reason is not None and METRICS[ours.metric].kind == "quality":
        return _result(figure, kind, limit, (math.nan, None, None), "fail", f"{figure.label} of the candidate is broken: {ours.reason}")
    if kind in ("min", "max"):
        if ours is None or ours.value is None:
            return _unmeasured(figure, kind, limit, (ours and ours.reason) or "not measured")
        return _held(figure, kind, limit, _absolute(ours))
    if pair is None:
        reason = (ours and ours.reason) or figure.reason or "not measured on both sides"
        return _unmeasured(figure, kind, limit, reason)
    effect = pair.effect(ratio=kind in RATIOS)
    return _held(figure, kind, limit, _turned(effect) if kind == "max_drop" else effect)


def _held(figure: Measurement, kind: str, limit: float, effect: Effect) -> GateResult:
    """An effect held against its limit."""
    estimate, low, high = effect
    unit = "" if kind in RATIOS else f" {figure.unit}"
    at_most = kind.startswith("max")
    bound = f"{'at most' if at_most else 'at least'} {limit:g}{unit} is allowed"
    what = f"{figure.label}{WORDS[kind]}"
    verdict: Verdict
    if low is None or high is None:
        verdict, sentence = "cannot_tell", f"{what} is {estimate:.4g}{unit}, from too little data for an interval; {bound}"
    else:
        inside = high <= limit if at_most else low >= limit
        outside = low > limit if at_most else high < limit
        verdict = "pass" if inside else "fail" if outside else "cannot_tell"
        spread = "" if low == high else f" (95 % {low + 0.0:.4g} to {high + 0.0:.4g})"
        sentence = f"{what} is {estimate + 0.0:.4g}{unit}{spread}; {bound}"
    return _result(figure, kind, limit, effect, verdict, sentence)


def _absolute(figure: Measurement) -> Effect:
    """The candidate's own value with its interval."""
    assert figure.value is not None
    kind = METRICS[figure.metric].kind
    if kind == "size":
        return figure.value, figure.value, figure.value
    if kind == "quality":
        return statistics.alone(figure.metric, figure.samples)
    if any(value <= 0 for row in figure.samples for value in row):  # no slack, no cache: nothing to take a logarithm of
        return figure.value, None, None
    return statistics.geometric_mean(figure.samples)


def _unmeasured(figure: Measurement, kind: str, limit: float, reason: str) -> GateResult:
    sentence = f"{figure.label}: {kind} {limit:g} can't be checked: {reason}"
    return _result(figure, kind, limit, (math.nan, None, None), "cannot_tell", sentence)


def _result(figure: Measurement, kind: str, limit: float, effect: Effect, verdict: Verdict, sentence: str) -> GateResult:
    estimate, low, high = effect
    return GateResult(
        metric=figure.metric, batch_size=figure.batch_size, prompt_tokens=figure.prompt_tokens, limit_kind=kind, limit=limit,
        estimate=None if math.isnan(estimate) else estimate, interval=None if low is None or high is None else (low, high),
        verdict=verdict, sentence=sentence,
    )  # fmt: skip


def _finite(effect: Effect) -> Effect:
    estimate, low, high = effect
    whole = all(x is not None and math.isfinite(x) for x in effect)
    return (estimate, low, high) if whole else (estimate if math.isfinite(estimate) else math.nan, None, None)


def _turned(effect: Effect) -> Effect:
    estimate, low, high = effect
    return -estimate, None if high is None else -high, None if low is None else -low


def _each(effect: Effect, change: Callable[[float], float]) -> Effect:
    estimate, low, high = effect
    return change(estimate), None if low is None else change(low), None if high is None else change(high)
