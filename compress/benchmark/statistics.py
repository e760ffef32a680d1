"""How certain a difference between two models is: estimates with intervals, without torch.

Every quality metric is a function of summed statistics of the examples (ROUGE: sums of scores; BLEU: n-gram counts; perplexity:
log-likelihoods and token counts). So one paired bootstrap serves them all, corpus-level metrics included. Speeds and memory
are compared round by round on the log scale, where a ratio is a difference.

An estimate is an `Effect`: a confidence distribution (Schweder and Hjort 2016). Intervals, p-values and the number of further samples
follow from it in the same way, whatever it rests on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

RESAMPLES = 4000
FEWEST = 20  # examples for an interval; the percentile bootstrap covers 74 % at 3, 81 % at 5, 91 % at 10
POWER = 0.8  # the chance that the number of samples needed decides (Cohen 1988)
MOST = 1000  # times the samples at hand; a limit that needs more can't be told from the estimate itself


class Needed(NamedTuple):
    """How many examples or rounds would decide.

    least   if the truth is as far from the limit as the interval allows
    most    if the truth is so near the limit that it is nearer still only with a chance of 1 - POWER; None where it may then be on the
            limit, so that it is too early to say
    """

    least: int
    most: int | None


@dataclass(frozen=True)
class Effect:
    """An estimate without an interval: exact or, where its error can't be told, unknown.

    samples   how many examples or rounds it rests on
    known     whether its error can be told
    """

    estimate: float
    samples: int = 0
    known: bool = True

    def quantile(self, share: float) -> float:
        """The value below which a `share` of the confidence lies."""
        return self.estimate

    def at_most(self, limit: float) -> float:
        """How confident one may be that the truth is no more than `limit`: a one-sided p-value of the contrary."""
        return float(self.estimate <= limit)

    def at_least(self, limit: float) -> float:
        return float(self.estimate >= limit)

    def interval(self, confidence: float) -> tuple[float, float] | None:
        """The two-sided interval; None where there is too little to tell."""
        if not self.known:
            return None
        return self.quantile((1 - confidence) / 2), self.quantile((1 + confidence) / 2)

    def needed(self, limit: float, confidence: float) -> "Needed | None":
        """How many examples or rounds would likely decide on which side of `limit` the truth is; None without an interval.

        By the normal theory of sample sizes the interval shrinks with the root of their number. So the number goes with the inverse square
        of the truth's distance from the limit. That distance is known only as precisely as the interval.
        """
        interval = self.interval(confidence)
        if interval is None or not self.samples or interval[0] == interval[1]:
            return None
        z, power = NormalDist().inv_cdf((1 + confidence) / 2), NormalDist().inv_cdf(POWER)
        low, high, here = self._even(interval[0]), self._even(interval[1]), self._even(limit)
        error = self._error((high - low) / 2 / z)

        def number(distance: float) -> int | None:
            """How many samples that distance of the truth from the limit takes; None where they are beyond reach."""
            times = math.inf if distance <= 0 else ((z + power) * error / distance) ** 2
            return max(self.samples + 1, math.ceil(times * self.samples + self._few(z))) if times < MOST else None

        nearer = self._even(self.quantile(1 - POWER)) - here if self.estimate > limit else here - self._even(self.quantile(POWER))
        least = number(max(abs(low - here), abs(high - here)))
        return None if least is None else Needed(least, number(nearer))

    def _even(self, value: float) -> float:
        """A value on the scale on which errors are the same everywhere."""
        return value

    def _error(self, normal: float) -> float:
        """The standard error on that scale; `normal` is what it is where the interval is a normal one."""
        return normal

    def _few(self, z: float) -> float:
        """Samples to be added because the spread is estimated from few."""
        return 0.0


@dataclass(frozen=True)
class Student(Effect):
    """Student's t around a mean of logs, told as a ratio: speeds and memory."""

    error: float = 0.0
    freedom: float = 1.0

    def quantile(self, share: float) -> float:
        from scipy import special  # scipy.stats takes two seconds to import

        return math.exp(math.log(self.estimate) + self.error * float(special.stdtrit(self.freedom, share))) if self.error else self.estimate

    def at_most(self, limit: float) -> float:
        from scipy import special

        if limit <= 0 or not self.error:
            return float(self.estimate <= limit)
        return float(special.stdtr(self.freedom, (math.log(limit) - math.log(self.estimate)) / self.error))

    def at_least(self, limit: float) -> float:
        return 1 - self.at_most(limit) if self.error else float(self.estimate >= limit)

    def _even(self, value: float) -> float:
        return math.log(value) if value > 0 else -math.inf

    def _error(self, normal: float) -> float:
        return self.error

    def _few(self, z: float) -> float:
        return z**2 / 2  # Guenther 1981


@dataclass(frozen=True)
class Bootstrapped(Effect):
    """Draws of the bootstrap, in order, with Efron's corrections for bias and for an error that depends on the value (BCa, 1987).

    Draws from a sample spread less than the truth does, by as much as the normal distribution is narrower than Student's t. So quantiles
    are taken further out by as much (Hesterberg 2015, the expanded percentile interval).
    """

    draws: tuple[float, ...] = ()
    bias: float = 0.0
    acceleration: float = 0.0

    def quantile(self, share: float) -> float:
        import numpy as np
        from scipy import special

        z = self.bias + self._expansion * float(special.stdtrit(self.samples - 1, share))
        return float(np.quantile(self.draws, NormalDist().cdf(self.bias + z / (1 - self.acceleration * z))))

    def at_most(self, limit: float) -> float:
        import numpy as np

        return self._corrected(float(np.searchsorted(self.draws, limit, side="right")) / len(self.draws))

    def at_least(self, limit: float) -> float:
        import numpy as np

        return 1 - self._corrected(float(np.searchsorted(self.draws, limit, side="left")) / len(self.draws))

    def _corrected(self, share: float) -> float:
        """The inverse of `quantile`: the confidence that belongs to this share of the draws."""
        from scipy import special

        if share in (0, 1):
            return share
        w = NormalDist().inv_cdf(share) - self.bias
        return float(special.stdtr(self.samples - 1, (w / (1 + self.acceleration * w) - self.bias) / self._expansion))

    @property
    def _expansion(self) -> float:
        return math.sqrt(self.samples / (self.samples - 1))


def combine(metric: str) -> "Callable[[Array, int], Array]":
    """The function from summed statistics to the metric.

    It takes sums of shape (..., k) over `n` examples and returns values of shape (...).
    """
    if metric == "perplexity":
        return _perplexity
    if metric == "bleu":
        return _bleu
    if metric == "chrf":
        return _chrf
    if metric in ("cer", "equal_top"):
        return _share
    if metric.startswith("divergence"):
        return _a_token
    if metric == "f1":
        return _f1
    return _mean


def corpus_value(metric: str, samples: Sequence[Sequence[float]]) -> float:
    """The metric over all examples; `samples` is (examples, k) statistics."""
    import numpy as np

    rows = np.asarray(samples, dtype=np.float64)
    return float(combine(metric)(rows.sum(axis=0), len(rows)))


def paired(
    metric: str, baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]], ratio: bool = False, seed: int = 0
) -> Effect:
    """candidate - baseline, or candidate / baseline, by the paired bootstrap over examples.

    Both are (examples, k) statistics of the same examples in the same order. Efron and Tibshirani 1993; for BLEU, Koehn 2004. With fewer
    than 20 examples the effect is unknown: an interval would be far too narrow. Raises ValueError when the shapes differ.
    """
    import numpy as np

    a, b = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"not the same examples: {a.shape} against {b.shape}")
    both, width, value = np.concatenate([a, b], axis=1), a.shape[1], combine(metric)

    def effect(sums: "Array", n: int) -> "Array":
        theirs, ours = value(sums[..., :width], n), value(sums[..., width:], n)
        with np.errstate(divide="ignore", invalid="ignore"):
            return ours / theirs if ratio else ours - theirs

    return _bootstrap(both, effect, seed)


def mcnemar(baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> tuple[int, int, float]:
    """How many examples only the baseline has right, how many only the candidate, and the probability of counts so unequal by chance.

    Both are (examples, 1), above zero where right, of the same examples in the same order. The exact two-sided test (McNemar 1947): if both
    are equally good, an example that only one side has right is as likely to be either's.
    """
    from scipy import stats

    pairs = [(a > 0, b > 0) for (a,), (b,) in zip(baseline, candidate, strict=True)]
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    return lost, won, float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def single_side(metric: str, samples: Sequence[Sequence[float]], seed: int = 0) -> Effect:
    """A single side's metric over (examples, k) statistics, by the same bootstrap."""
    import numpy as np

    return _bootstrap(np.asarray(samples, dtype=np.float64), combine(metric), seed)


def paired_ratio(baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> Effect:
    """candidate / baseline of speeds or memory; both are (rounds, turns) in the same rounds and turns.

    Student's t over the rounds' mean log ratios. A round has processes of its own, whose turns share their luck (memory layout, a neighbour
    on the machine). So rounds are independent, and turns are not. With only a handful of rounds a hierarchical bootstrap (rounds, then
    turns) is too narrow: `selftest` shows both side by side.
    """
    ours, theirs = _round_means(candidate), _round_means(baseline)
    return _student([b - a for a, b in zip(theirs, ours, strict=True)])


def unpaired_ratio(baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> Effect:
    """candidate / baseline from the rounds of two different runs: Welch's t on the logs."""
    import numpy as np

    a, b = np.asarray(_round_means(baseline)), np.asarray(_round_means(candidate))
    estimate, samples = math.exp(float(b.mean() - a.mean())), min(len(a), len(b))
    if samples < 2:
        return Effect(estimate, samples, known=False)
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    if va + vb == 0:
        return Effect(estimate, samples)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return Student(estimate, samples, error=math.sqrt(va + vb), freedom=float(freedom))


def geometric_mean(samples: Sequence[Sequence[float]]) -> Effect:
    """One side's speed or memory over (rounds, turns): Student's t over rounds on the log scale."""
    return _student(_round_means(samples))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests, raised so that any of them falls below a level as rarely as that of a single test (Holm 1979)."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def _round_means(samples: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(math.log(value) for value in turns) for turns in samples]


def _student(logs: list[float]) -> Effect:
    estimate = math.exp(fmean(logs))
    if len(logs) < 2:
        return Effect(estimate, len(logs), known=False)
    return Student(estimate, len(logs), error=stdev(logs) / math.sqrt(len(logs)), freedom=len(logs) - 1)


def _bootstrap(rows: "Array", value: "Callable[[Array, int], Array]", seed: int) -> Effect:
    """The effect of a metric, `value` of sums over (examples, k) rows, by the bootstrap over examples."""
    import numpy as np

    n, total = len(rows), rows.sum(axis=0)
    estimate = float(value(total, n))
    if n < FEWEST:
        return Effect(estimate, n, known=False)
    rng, draws = np.random.default_rng(seed), np.empty(RESAMPLES)
    step = max(1, 4_000_000 // n)  # 32 MB of counts at a time
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        draws[start : start + size] = value(counts @ rows, n)
    without = value(total - rows, n - 1)
    if not (np.isfinite(draws).all() and np.isfinite(without).all()):
        return Effect(estimate, n, known=False)
    if np.ptp(draws) <= 1e-12 * max(1.0, abs(estimate)):  # the same in every example
        return Effect(estimate, n)
    below = float((draws < estimate).mean() + (draws == estimate).mean() / 2)
    apart = without.mean() - without
    bent = float((apart**3).sum() / (6 * (apart**2).sum() ** 1.5)) if apart.any() else 0.0
    bias = NormalDist().inv_cdf(min(max(below, 1 / RESAMPLES), 1 - 1 / RESAMPLES))
    return Bootstrapped(estimate, n, draws=tuple(np.sort(draws).tolist()), bias=bias, acceleration=bent)


def _mean(sums: "Array", n: int) -> "Array":
    return sums[..., 0] / n


def _perplexity(sums: "Array", n: int) -> "Array":
    """exp of summed negative log-likelihood (nats) over summed tokens."""
    import numpy as np

    with np.errstate(over="ignore"):
        return np.exp(sums[..., 0] / sums[..., 1])


def _bleu(sums: "Array", n: int) -> "Array":
    """Corpus BLEU-4 with sacreBLEU's default exponential smoothing, times 100 (Papineni et al. 2002; Post 2018).

    Statistics: 4 matched n-gram counts, 4 totals, output length, reference length.
    """
    import numpy as np

    matched, total, length, reference = sums[..., :4], sums[..., 4:8], sums[..., 8], sums[..., 9]
    log_precision = np.zeros(matched.shape[:-1])
    halving = np.ones(matched.shape[:-1])
    usable = np.ones(matched.shape[:-1], dtype=bool)
    for order in range(4):
        none = matched[..., order] == 0
        halving = np.where(none, halving * 2, halving)
        share = np.where(none, 1 / halving, matched[..., order])
        usable &= total[..., order] > 0
        log_precision = log_precision + np.log(share / np.maximum(total[..., order], 1e-300)) / 4
    usable &= matched.sum(axis=-1) > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        brevity = np.where(length < reference, 1 - reference / np.maximum(length, 1e-300), 0.0)
        return np.where(usable, 100 * np.exp(np.where(usable, log_precision + brevity, 0.0)), 0.0)


def _chrf(sums: "Array", n: int) -> "Array":
    """Corpus chrF2 times 100 (Popović 2015); precision and recall are means over the orders of which both texts have n-grams.

    Statistics: for each order n-grams of the output, of the reference, in both.
    """
    import numpy as np

    orders = sums.reshape(*sums.shape[:-1], -1, 3)
    ours, theirs, both = orders[..., 0], orders[..., 1], orders[..., 2]
    there = (ours > 0) & (theirs > 0)
    count = np.maximum(there.sum(axis=-1), 1)
    precision, recall = ((np.where(there, both / np.maximum(total, 1), 0.0)).sum(axis=-1) / count for total in (ours, theirs))
    score: Array = 100 * 5 * precision * recall / np.maximum(4 * precision + recall, 1e-300)
    return score


def _share(sums: "Array", n: int) -> "Array":
    """Edits over the references' characters, or equal tokens over all, times 100."""
    return 100 * sums[..., 0] / sums[..., 1]


def _a_token(sums: "Array", n: int) -> "Array":
    """A sum over tokens, over their number."""
    return sums[..., 0] / sums[..., 1]


def _f1(sums: "Array", n: int) -> "Array":
    """Macro F1 times 100. Statistics: for each label true positives, false positives, false negatives."""
    import numpy as np

    labels = sums.reshape(*sums.shape[:-1], -1, 3)
    there = labels.sum(axis=-1) > 0
    scores = np.where(there, 2 * labels[..., 0] / np.maximum(2 * labels[..., 0] + labels[..., 1] + labels[..., 2], 1e-300), 0.0)
    macro: Array = 100 * scores.sum(axis=-1) / np.maximum(there.sum(axis=-1), 1)
    return macro
