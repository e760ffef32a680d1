"""What a difference between two models is worth: estimates with intervals, without torch.

Every quality metric is a function of summed statistics of the examples (ROUGE: sums of scores; BLEU: n-gram counts; perplexity:
log-likelihoods and token counts), so one paired bootstrap serves them all, corpus-level metrics included. Speeds and memory
are compared round by round on the log scale, where a ratio is a difference.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 4000
FEWEST = 20  # examples for an interval; the percentile bootstrap covers 74 % at 3, 81 % at 5, 91 % at 10

Effect = tuple[float, float | None, float | None]  # estimate, low, high; bounds are None where there is too little to tell


def combine(metric: str) -> "Callable[[Array, int], Array]":
    """How summed statistics become the metric.

    The function takes sums of shape (..., k) over `n` examples and gives values of shape (...).
    """
    if metric == "perplexity":
        return _perplexity
    if metric == "bleu":
        return _bleu
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
    """candidate - baseline, or candidate / baseline, with its 95 % percentile interval by the paired bootstrap over examples.

    Both are (examples, k) statistics of the same examples in the same order. Efron and Tibshirani 1993; for BLEU, Koehn 2004. No interval
    below 20 examples, where it would be far too narrow. Raises ValueError when the lengths differ.
    """
    import numpy as np

    a, b = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"not the same examples: {a.shape} against {b.shape}")
    n, value = len(a), combine(metric)

    def effect(theirs: "Array", ours: "Array") -> "Array":
        with np.errstate(divide="ignore", invalid="ignore"):
            return value(ours, n) / value(theirs, n) if ratio else value(ours, n) - value(theirs, n)

    return _bootstrap(n, float(effect(a.sum(axis=0), b.sum(axis=0))), lambda counts: effect(counts @ a, counts @ b), seed)


def mcnemar(baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> tuple[int, int, float]:
    """How many examples only the baseline has right, how many only the candidate, and the probability of counts so unequal by chance.

    Both are (examples, 1), above zero where right, of the same examples in the same order. The exact two-sided test (McNemar 1947): of the
    examples that only one has right, each has either as likely where both are equally good.
    """
    from scipy import stats

    pairs = [(a > 0, b > 0) for (a,), (b,) in zip(baseline, candidate, strict=True)]
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    return lost, won, float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def alone(metric: str, samples: Sequence[Sequence[float]], seed: int = 0) -> Effect:
    """One side's value over (examples, k) statistics, with its interval in the same way."""
    import numpy as np

    rows = np.asarray(samples, dtype=np.float64)
    n, value = len(rows), combine(metric)
    return _bootstrap(n, float(value(rows.sum(axis=0), n)), lambda counts: value(counts @ rows, n), seed)


def paired_ratio(baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> Effect:
    """candidate / baseline of speeds or memory with its 95 % interval; both are (rounds, turns) in the same rounds and turns.

    Student's t over the rounds' mean log ratios. A round has processes of its own, and turns within one share their luck (memory layout,
    a neighbour on the machine), so rounds and not turns are what is independent. There are only a handful, for which a bootstrap
    would be far too narrow (at five it covers about 80 % instead of 95).
    """
    ours, theirs = _round_means(candidate), _round_means(baseline)
    return _exp(_student([b - a for a, b in zip(theirs, ours, strict=True)]))


def unpaired_ratio(baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> Effect:
    """candidate / baseline with its 95 % interval from the rounds of two different runs: Welch's t on the logs."""
    import numpy as np
    from scipy import stats

    a, b = np.asarray(_round_means(baseline)), np.asarray(_round_means(candidate))
    estimate = float(b.mean() - a.mean())
    if len(a) < 2 or len(b) < 2:
        return math.exp(estimate), None, None
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    if va + vb == 0:
        return _exp((estimate, estimate, estimate))
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(va + vb))
    return _exp((estimate, estimate - half, estimate + half))


def geometric_mean(samples: Sequence[Sequence[float]]) -> Effect:
    """One side's speed or memory over (rounds, turns), with Student's interval over rounds on the log scale."""
    return _exp(_student(_round_means(samples)))


def _round_means(samples: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(math.log(value) for value in turns) for turns in samples]


def _student(values: list[float]) -> Effect:
    from scipy import stats

    mean = fmean(values)
    if len(values) < 2:
        return mean, None, None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _exp(logs: Effect) -> Effect:
    estimate, low, high = logs
    return math.exp(estimate), None if low is None else math.exp(low), None if high is None else math.exp(high)


def _bootstrap(n: int, estimate: float, statistic: "Callable[[Array], Array]", seed: int) -> Effect:
    """An estimate with its bounds over resamples of `n` examples; `statistic` gets (resamples, n) counts of how often each was drawn."""
    import numpy as np

    if n < FEWEST:
        return estimate, None, None
    rng, values = np.random.default_rng(seed), np.empty(RESAMPLES)
    step = max(1, 4_000_000 // n)  # 32 MB of counts at a time
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        values[start : start + size] = statistic(rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64))
    if not np.isfinite(values).all():
        return estimate, None, None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return estimate, float(low), float(high)


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


def _f1(sums: "Array", n: int) -> "Array":
    """Macro F1 times 100. Statistics: for each label true positives, false positives, false negatives."""
    import numpy as np

    labels = sums.reshape(*sums.shape[:-1], -1, 3)
    there = labels.sum(axis=-1) > 0
    scores = np.where(there, 2 * labels[..., 0] / np.maximum(2 * labels[..., 0] + labels[..., 1] + labels[..., 2], 1e-300), 0.0)
    macro: Array = 100 * scores.sum(axis=-1) / np.maximum(there.sum(axis=-1), 1)
    return macro
