"""May the candidate replace the baseline? Every figure against its counterpart, every gate against its limit.

A gate is a test of non-inferiority: it passes when the whole interval lies within the limit, and fails when it lies outside. It can't tell
when the limit is inside the interval, or when there is too little data for one. Sizes are exact and have none. The worst gate decides;
what was not measured can't pass.

Among many gates one fails by chance more easily than a single one would, so failures are held to Holm's correction. Passes need none: all
gates pass by chance together no more easily than each of them alone (an intersection-union test, Berger 1982).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.benchmark import statistics
from compress.benchmark.statistics import Effect, Needed
from compress.errors import ReportError
from compress.metrics import METRICS
from compress.recipe import Gate
from compress.report.missing import MOST, lost, together
from compress.results.report import Report
from compress.results.sides import Comparison, GateResult, Measurement, Side, Verdict

BEYOND_DOUBT = 0.999
RATIOS = ("max_ratio", "min_ratio")
USUAL = {"rouge_tokenizer": "latin", "bleu_tokenizer": "13a"}  # reports that don't say were made with these
WORDS = {"max_drop": " drop", "max_rise": " rise", "max_ratio": " ratio", "min_ratio": " ratio", "max": "", "min": ""}


@dataclass(frozen=True)
class Pair:
    """A figure on both sides. `same_run`: whether the sides took turns; examples are always the same ones."""

    theirs: Measurement
    ours: Measurement
    same_run: bool

    def effect(self, ratio: bool) -> Effect:
        """candidate / baseline, or for quality candidate - baseline unless a ratio is asked for."""
        a, b = self.theirs, self.ours
        assert a.value is not None and b.value is not None
        kind = METRICS[b.metric].kind
        if kind == "quality":
            if len(a.samples) != len(b.samples):
                raise ReportError(f"{b.metric} was measured on {len(a.samples)} examples on one side and {len(b.samples)} on the other")
            theirs, ours = together(a, b)
            return statistics.paired(b.metric, theirs, ours, ratio) if ours else Effect(math.nan, known=False)
        if a.value <= 0 or any(x <= 0 for x in [b.value, *(x for row in [*a.present, *b.present] for x in row)]):
            return Effect(math.nan, known=False)
        if kind == "size":
            return Effect(b.value / a.value)
        if self.same_run:
            rounds = min(len(a.samples), len(b.samples))
            return statistics.paired_ratio(a.present[:rounds], b.present[:rounds])
        return statistics.unpaired_ratio(a.present, b.present)

    @property
    def left_out(self) -> int:
        """Examples that one side has no samples of, or neither has."""
        if METRICS[self.ours.metric].kind != "quality" or len(self.theirs.samples) != len(self.ours.samples):
            return 0
        return len(self.ours.samples) - len(together(self.theirs, self.ours)[0])


@dataclass(frozen=True)
class Claim:
    """That one limit of a gate is kept at one figure.

    effect          a difference, a ratio or the candidate's own value
    scale, origin   the limit bounds scale x (effect - origin): a drop in points is the difference with its sign turned
    left_out        how many examples the effect doesn't rest on
    """

    figure: Measurement
    kind: str
    limit: float
    effect: Effect
    scale: float = 1.0
    origin: float = 0.0
    left_out: int = 0

    @property
    def bound(self) -> float:
        """The limit on the effect."""
        return self.limit / self.scale + self.origin

    @property
    def confidence(self) -> float:
        """How confident one may be that it is kept; the p-value of its being broken."""
        at_most = self.kind.startswith("max") == (self.scale > 0)
        return self.effect.at_most(self.bound) if at_most else self.effect.at_least(self.bound)

    def on_limit_scale(self, effect: float) -> float:
        """An effect on the scale that the limit is given on."""
        return self.scale * (effect - self.origin) + 0.0


def pairs(baseline: Side, candidate: Side, same_run: bool) -> list[Pair]:
    """Every figure that both sides have."""
    matches = []
    for ours in candidate.measurements:
        theirs = baseline.figure(ours.point)
        if theirs is not None and theirs.value is not None and ours.value is not None:
            matches.append(Pair(theirs, ours, same_run))
    return matches


def compare(pair: Pair, confidence: float) -> Comparison:
    """How the two figures compare: by difference for quality, by ratio for all else."""
    ratio = METRICS[pair.ours.metric].kind != "quality"
    effect = pair.effect(ratio)
    low, high = effect.interval(confidence) or (None, None)
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        low = high = None
    assert pair.theirs.value is not None and pair.ours.value is not None
    return Comparison(
        metric=pair.ours.metric, batch_size=pair.ours.batch_size, prompt_tokens=pair.ours.prompt_tokens, baseline=pair.theirs.value,
        candidate=pair.ours.value, kind="ratio" if ratio else "difference",
        estimate=effect.estimate if math.isfinite(effect.estimate) else None, low=low, high=high,
        left_out=pair.left_out,
    )  # fmt: skip


def gates(check: dict[str, Gate], compared: Sequence[Pair], baseline: Side | None, candidate: Side, confidence: float) -> list[GateResult]:
    """Every limit of every gate, at every grid point that either side was to be measured at."""
    by_point = {pair.ours.point: pair for pair in compared}
    claims: list[Claim | GateResult] = []
    for metric, gate in check.items():
        sides = [side for side in (candidate, baseline) if side is not None]
        figures = {m.point: m for side in reversed(sides) for m in side.measurements if m.metric == metric}
        for kind in Gate.model_fields:
            limit = getattr(gate, kind)
            if limit is None:
                continue
            if not figures:
                claims.append(_unmeasured(Measurement(metric=metric, value=None), kind, limit, "not measured"))
            for point, figure in figures.items():
                theirs = baseline.figure(point) if baseline is not None else None
                claims.append(_claim(figure, by_point.get(point), theirs, candidate.figure(point), kind, limit))
    chances = [claim for claim in claims if isinstance(claim, Claim) and claim.effect.samples and claim.effect.known]
    corrected = dict(zip(map(id, chances), statistics.holm([claim.confidence for claim in chances]), strict=True))
    return [_judged(claim, corrected.get(id(claim)), len(chances), confidence) if isinstance(claim, Claim) else claim for claim in claims]


def is_clear(check: dict[str, Gate], sides: Sequence[Side]) -> bool:
    """Whether every gate on speed or memory, of which there is one, is decided beyond doubt.

    Looking again and again finds what isn't there; at a confidence of 99.9 % a look costs nothing (Haybittle 1971, Peto et al. 1976).
    """
    limits = {metric: gate for metric, gate in check.items() if METRICS[metric].kind in ("speed", "memory")}
    baseline = sides[0] if len(sides) > 1 else None
    compared = pairs(baseline, sides[-1], same_run=True) if baseline else []
    results = gates(limits, compared, baseline, sides[-1], BEYOND_DOUBT)
    return bool(results) and all(result.verdict != "cannot_tell" for result in results)


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
    mine, other = ({"engine": report.engine, **measured_how(report)} for report in (ours, theirs))
    if unlike := differing(mine, other):
        what = unlike[0]
        raise ReportError(
            f"{ours.folder} and {theirs.folder} were not measured alike: {what} is {mine.get(what)!r} in one, {other.get(what)!r} in the "
            "other; measure one again as the other was"
        )


def measured_how(report: Report) -> dict[str, Any]:
    """All that two reports must share for their figures to be comparable, by name. What is off is left out: older reports lack it."""
    settings, environment = report.settings, report.environment
    conditions = {
        "the digest of the examples": report.examples_digest,
        **{f"data.{key}": settings["data"].get(key) for key in ("chat", "max_tokens", "stride")},
        **({f"data.{key}": settings["data"].get(key) for key in ("samples", "seed")} if settings["data"].get("join") is not None else {}),
        **_flat("generation", settings["generation"]),
        **_flat("benchmark", settings["benchmark"]),
        "benchmark.confidence": report.confidence,
        **{what: environment.get(what) for what in ("device", "gpu", "cpu", "threads", "cores")},
        **{what: environment[what] for what, usual in USUAL.items() if environment.get(what, usual) != usual},
    }
    return {what: value for what, value in conditions.items() if value}


def baseline_key(report: Report, side: Side) -> str:
    """A key that two baselines share if they are the same model, measured alike."""
    return json.dumps([side.model, report.engine, report.settings.get("model"), measured_how(report)], sort_keys=True, default=str)


def differing(mine: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    return [what for what in {**mine, **other} if mine.get(what) != other.get(what)]


def _flat(name: str, value: Any) -> dict[str, Any]:
    """{benchmark: {rounds: 2}} as {benchmark.rounds: 2}."""
    if not isinstance(value, dict):
        return {name: value}
    return {path: leaf for key, inner in value.items() for path, leaf in _flat(f"{name}.{key}", inner).items()}


def _claim(
    figure: Measurement, pair: Pair | None, theirs: Measurement | None, ours: Measurement | None, kind: str, limit: float
) -> Claim | GateResult:  # fmt: skip
    """The claim that a limit makes at a figure, or why it can't be checked there."""
    quality = METRICS[figure.metric].kind == "quality"
    if quality and ours is not None and (broken := _broken(theirs, ours)):
        return _result(figure, kind, limit, "fail", f"{figure.label} of the candidate is broken: {broken}")
    if kind in ("min", "max"):
        if ours is None or ours.value is None:
            return _unmeasured(figure, kind, limit, (ours and ours.reason) or "not measured")
        return Claim(figure, kind, limit, _absolute(ours), left_out=ours.missing)
    if pair is None or pair.theirs.value is None:
        reason = (ours and ours.reason) or figure.reason or "not measured on both sides"
        return _unmeasured(figure, kind, limit, reason)
    if quality and figure.better == "higher" and pair.theirs.value <= 0 and kind in ("max_drop", "min_ratio"):
        return _unmeasured(figure, kind, limit, f"the baseline has {pair.theirs.value:g}, so nothing could be lost")
    effect, sign = pair.effect(ratio=kind in RATIOS or not quality), -1 if kind == "max_drop" else 1
    if kind in RATIOS:
        return Claim(figure, kind, limit, effect, left_out=pair.left_out)
    if quality:
        return Claim(figure, kind, limit, effect, sign, left_out=pair.left_out)
    return Claim(figure, kind, limit, effect, sign * pair.theirs.value, 1.0)


def _broken(theirs: Measurement | None, ours: Measurement) -> str | None:
    """What the candidate has in place of numbers that the baseline has; None where it has numbers too."""
    if reasons := lost(theirs, ours):
        counts = ", ".join(f"{reason} in {number:,}" for reason, number in reasons.items())
        return f"{counts} of {len(ours.samples):,} examples" + (" in which the baseline's is a number" if theirs is not None else "")
    if ours.value is None and not ours.samples and not (theirs is not None and theirs.value is None):
        return ours.reason
    return None


def _judged(claim: Claim, corrected: float | None, tests: int, confidence: float) -> GateResult:
    """The verdict on a claim.

    corrected   the p-value of its being kept among that many `tests`; None where chance has no part in it
    """
    effect, level = claim.effect, (1 - confidence) / 2
    unit = "" if claim.kind in RATIOS else f" {claim.figure.unit}"
    bound = f"{'at most' if claim.kind.startswith('max') else 'at least'} {claim.limit:g}{unit} is allowed"
    what = f"{claim.figure.label}{WORDS[claim.kind]} is {claim.on_limit_scale(effect.estimate):.4g}{unit}"
    interval, total = effect.interval(confidence), claim.left_out + effect.samples
    left_out = f"; {claim.left_out:,} of {total:,} examples are left out" if claim.left_out else ""
    if interval is None:
        sentence = f"{what}, from too little data for an interval{left_out}; {bound}"
        return _result(
            claim.figure, claim.kind, claim.limit, "cannot_tell", sentence, claim.on_limit_scale(effect.estimate), left_out=claim.left_out
        )
    low, high = sorted(map(claim.on_limit_scale, interval))
    spread = "" if low == high else f" ({100 * confidence:g} % {low:.4g} to {high:.4g})"
    broken = claim.confidence if corrected is None else corrected
    verdict: Verdict = "pass" if claim.confidence >= 1 - level else "fail" if broken <= level else "cannot_tell"
    sentence, needed = f"{what}{spread}; {bound}{left_out}", None
    if verdict == "pass" and claim.left_out > MOST * total:
        verdict, sentence = "cannot_tell", f"{sentence}, and with more than {100 * MOST:g} % left out it can't pass"
    elif verdict == "cannot_tell":
        needed = effect.needed(claim.bound, confidence)
        sentence += f"; {_more(claim, needed, tests if claim.confidence <= level else 0)}"
    return _result(
        claim.figure, claim.kind, claim.limit, verdict, sentence, claim.on_limit_scale(effect.estimate), (low, high), needed, claim.left_out
    )


def _more(claim: Claim, needed: Needed | None, tests: int) -> str:
    """What would decide a claim. `tests` is their number where the claim on its own would fail, else 0."""
    if tests:
        return f"on its own it would fail, as one of {tests} it may be chance"
    what = "examples" if METRICS[claim.figure.metric].kind == "quality" else "rounds"
    if needed is None:
        return f"how many {what} would tell is unknown"
    if needed.most is None:
        number, early = f"at least about {needed.least:,}", "; it is too early to say how many at most"
    else:
        number, early = "about " + " to ".join(dict.fromkeys([f"{needed.least:,}", f"{needed.most:,}"])), ""
    return f"{number} {what} would tell, there were {claim.effect.samples:,}{early}"


def _absolute(figure: Measurement) -> Effect:
    """The candidate's own value with its uncertainty."""
    assert figure.value is not None
    kind = METRICS[figure.metric].kind
    if kind == "size":
        return Effect(figure.value)
    if kind == "quality":
        return statistics.single_side(figure.metric, figure.present)
    if any(value <= 0 for row in figure.present for value in row):  # no slack, no cache: nothing to take a logarithm of
        return Effect(figure.value, known=False)
    return statistics.geometric_mean(figure.present)


def _unmeasured(figure: Measurement, kind: str, limit: float, reason: str) -> GateResult:
    return _result(figure, kind, limit, "cannot_tell", f"{figure.label}: {kind} {limit:g} can't be checked: {reason}")


def _result(
    figure: Measurement, kind: str, limit: float, verdict: Verdict, sentence: str, estimate: float = math.nan,
    interval: tuple[float, float] | None = None, needed: Needed | None = None, left_out: int = 0,
) -> GateResult:  # fmt: skip
    return GateResult(
        metric=figure.metric, batch_size=figure.batch_size, prompt_tokens=figure.prompt_tokens, limit_kind=kind, limit=limit,
        estimate=estimate if math.isfinite(estimate) else None, interval=interval, needed=needed and needed.least,
        needed_at_most=needed and needed.most, left_out=left_out, verdict=verdict, sentence=sentence,
    )  # fmt: skip
