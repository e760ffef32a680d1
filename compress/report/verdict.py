"""May the candidate replace the baseline? Every figure against its counterpart, every gate against its limit.

A gate passes when its whole interval lies within the limit, fails when it lies outside, and can't tell when the limit is inside it.
Figures that are exact have no interval. The worst gate decides.
"""

from collections.abc import Sequence
from typing import Any

from compress.benchmark import statistics
from compress.errors import ReportError
from compress.metrics import METRICS
from compress.recipe import Gate
from compress.results import Comparison, GateResult, Measurement, Report, Side, Verdict

ORDER: tuple[Verdict, ...] = ("fail", "cannot_tell", "pass")


def comparisons(baseline: Side, candidate: Side, paired: bool = True) -> list[Comparison]:
    """Every figure that both sides have. `paired` says that turns were taken in the same run; examples always are the same."""
    found = []
    for ours in candidate.measurements:
        theirs = baseline.figure(ours.point)
        if theirs is not None and theirs.value is not None and ours.value is not None:
            found.append(_compare(theirs, ours, paired))
    return found


def gates(check: dict[str, Gate], compared: Sequence[Comparison], candidate: Side) -> list[GateResult]:
    """Every limit of every gate, at every grid point of its metric."""
    results = []
    for metric, gate in check.items():
        figures = [m for m in candidate.measurements if m.metric == metric and m.value is not None]
        for kind in sorted(gate.model_fields_set, key=list(Gate.model_fields).index):
            limit = getattr(gate, kind)
            if limit is None:
                continue
            if kind in ("min", "max"):
                found = [_absolute(figure, kind, limit) for figure in figures]
            else:
                found = [_relative(c, kind, limit) for c in compared if c.metric == metric]
            results += found or [_unmeasured(metric, kind, limit)]
    return results


def absolute_part(gate: Gate) -> Gate:
    """Only the limits that need no baseline."""
    return gate.model_copy(update=dict.fromkeys(set(Gate.model_fields) - {"min", "max"}))


def require_same_examples(ours: Report, theirs: Report) -> None:
    """Raise ReportError unless both were measured on the same examples."""
    if ours.examples_digest != theirs.examples_digest:
        raise ReportError(
            f"{ours.folder} and {theirs.folder} were measured on different examples (digests {ours.examples_digest} and "
            f"{theirs.examples_digest}); measure one again with the other's data, prompt, samples and seed"
        )


def decide(results: Sequence[GateResult], failures: Sequence[str]) -> tuple[Verdict, str]:
    """The verdict and what decided it."""
    if failures:
        return "cannot_tell", f"not everything could be measured: {failures[0]}"
    for verdict in ORDER[:2]:
        for result in results:
            if result.verdict == verdict:
                return verdict, result.sentence
    return "pass", "every gate holds" if results else "no gates: the recipe sets no limits under check"


def _compare(theirs: Measurement, ours: Measurement, paired: bool) -> Comparison:
    assert theirs.value is not None and ours.value is not None
    quality = METRICS[ours.metric].kind == "quality"
    estimate: float | None
    low: float | None
    high: float | None
    if quality:
        if len(theirs.samples) != len(ours.samples):
            raise ReportError(
                f"{ours.metric} was measured on {len(theirs.samples)} examples on one side and {len(ours.samples)} on the other"
            )
        estimate, low, high = statistics.paired_difference(ours.metric, theirs.samples, ours.samples)
    else:
        estimate, low, high = _ratio(theirs, ours, paired)
    return Comparison(
        metric=ours.metric, batch_size=ours.batch_size, prompt_tokens=ours.prompt_tokens, baseline=theirs.value, candidate=ours.value,
        kind="difference" if quality else "ratio", estimate=estimate, low=low, high=high,
    )  # fmt: skip


def _ratio(theirs: Measurement, ours: Measurement, paired: bool) -> tuple[float | None, float | None, float | None]:
    assert theirs.value is not None and ours.value is not None
    a, b = [row[0] for row in theirs.samples], [row[0] for row in ours.samples]
    if not theirs.value or not ours.value or min([*a, *b], default=1) <= 0:
        return None, None, None
    if not a or not b:
        exact = ours.value / theirs.value
        return exact, exact, exact
    if paired:
        together = min(len(a), len(b))
        return statistics.paired_ratio(a[:together], b[:together])
    return statistics.unpaired_ratio(a, b)


def _relative(compared: Comparison, kind: str, limit: float) -> GateResult:
    estimate, low, high = compared.estimate, compared.low, compared.high
    if kind in ("max_drop", "max_rise") and compared.kind == "ratio":  # a difference of exact or timed figures
        scale = compared.baseline
        estimate, low, high = (None if x is None else (x - 1) * scale for x in (estimate, low, high))
    elif kind in ("max_ratio", "min_ratio") and compared.kind == "difference":
        scale = compared.baseline
        estimate, low, high = (None if x is None or not scale else 1 + x / scale for x in (estimate, low, high))
    if kind == "max_drop":
        estimate, low, high = (None if x is None else -x for x in (estimate, high, low))
    words = {"max_drop": "drop", "max_rise": "rise", "max_ratio": "ratio", "min_ratio": "ratio"}[kind]
    unit = "" if "ratio" in kind else f" {METRICS[compared.metric].unit}"
    label = Measurement(metric=compared.metric, value=0, batch_size=compared.batch_size, prompt_tokens=compared.prompt_tokens).label
    return _result(
        f"{label} {words}", unit, kind, limit, estimate, low, high,
        metric=compared.metric, batch_size=compared.batch_size, prompt_tokens=compared.prompt_tokens,
    )  # fmt: skip


def _absolute(figure: Measurement, kind: str, limit: float) -> GateResult:
    """A limit on the candidate alone. Quality has the bootstrap's interval against nothing, that is of the value itself."""
    value = figure.value
    low = high = value
    if METRICS[figure.metric].kind == "quality" and figure.samples:
        low, high = statistics.bootstrap(figure.metric, figure.samples)
    return _result(
        figure.label, f" {figure.unit}", kind, limit, value, low, high,
        metric=figure.metric, batch_size=figure.batch_size, prompt_tokens=figure.prompt_tokens,
    )  # fmt: skip


def _result(
    what: str, unit: str, kind: str, limit: float, estimate: float | None, low: float | None, high: float | None, **point: Any
) -> GateResult:
    at_most = kind in ("max_drop", "max_rise", "max_ratio", "max")
    bound = f"{'at most' if at_most else 'at least'} {limit:g}{unit}"
    interval = None if low is None or high is None else (low, high)
    verdict: Verdict
    if estimate is None or interval is None:
        verdict = "cannot_tell"
        sentence = f"{what}: too few turns for an interval, {bound} is allowed"
    else:
        inside = interval[1] <= limit if at_most else interval[0] >= limit
        outside = interval[0] > limit if at_most else interval[1] < limit
        verdict = "pass" if inside else "fail" if outside else "cannot_tell"
        spread = "" if interval[0] == interval[1] else f" (95 % {interval[0]:.4g} to {interval[1]:.4g})"
        sentence = f"{what} is {estimate:.4g}{unit}{spread}, {bound} is allowed"
    return GateResult(limit_kind=kind, limit=limit, estimate=estimate, interval=interval, verdict=verdict, sentence=sentence, **point)


def _unmeasured(metric: str, kind: str, limit: float) -> GateResult:
    return GateResult(
        metric=metric, limit_kind=kind, limit=limit, estimate=None, interval=None, verdict="cannot_tell",
        sentence=f"{metric} was not measured on both sides, so {kind} {limit:g} can't be checked",
    )  # fmt: skip
