"""What a difference between two models is worth: estimates with intervals, without torch.

Every quality metric is a function of summed statistics of the examples (ROUGE: sums of scores; BLEU: n-gram counts; perplexity:
log-likelihoods and token counts), so one paired bootstrap serves them all, corpus-level metrics included. Speeds are
compared turn by turn on the log scale, where a ratio is a difference.
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

Interval = tuple[float, float]


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


def paired_difference(
    metric: str, baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]], seed: int = 0
) -> tuple[float, float, float]:
    """candidate - baseline with its 95 % percentile interval, by the paired bootstrap over examples.

    Both are (examples, k) statistics of the same examples in the same order. Efron and Tibshirani 1993; for BLEU,
    Koehn 2004. Raises ValueError when the lengths differ.
    """
    import numpy as np

    a, b = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"not the same examples: {a.shape} against {b.shape}")
    n, value = len(a), combine(metric)
    estimate = float(value(b.sum(axis=0), n) - value(a.sum(axis=0), n))
    low, high = _percentiles(n, lambda counts: value(counts @ b, n) - value(counts @ a, n), seed)
    return estimate, low, high


def bootstrap(metric: str, samples: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """The 95 % percentile interval of one side's value."""
    import numpy as np

    rows = np.asarray(samples, dtype=np.float64)
    n, value = len(rows), combine(metric)
    return _percentiles(n, lambda counts: value(counts @ rows, n), seed)


def paired_ratio(baseline: Sequence[float], candidate: Sequence[float]) -> tuple[float, float | None, float | None]:
    """candidate / baseline with its 95 % interval, from one figure a turn on each side, in the same turns.

    Student's t on the log ratios. There are only a handful of turns, for which a bootstrap over them is far too narrow (at five
    turns it covers about 80 % instead of 95). None for the bounds when there are fewer than two turns.
    """
    from scipy import stats

    logs = [math.log(b / a) for a, b in zip(baseline, candidate, strict=True)]
    mean = fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), None, None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1)) * stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def unpaired_ratio(baseline: Sequence[float], candidate: Sequence[float]) -> tuple[float, float | None, float | None]:
    """candidate / baseline with its 95 % interval from turns of two different runs: Welch's t on the logs."""
    import numpy as np
    from scipy import stats

    a, b = np.log(baseline), np.log(candidate)
    estimate = float(b.mean() - a.mean())
    if len(a) < 2 or len(b) < 2:
        return math.exp(estimate), None, None
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    if va + vb == 0:
        return math.exp(estimate), math.exp(estimate), math.exp(estimate)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(va + vb))
    return math.exp(estimate), math.exp(estimate - half), math.exp(estimate + half)


def _percentiles(n: int, statistic: "Callable[[Array], Array]", seed: int) -> Interval:
    """The bounds of a statistic over resamples of `n` examples; it is given (resamples, n) counts of how often each was drawn."""
    import numpy as np

    rng, values = np.random.default_rng(seed), np.empty(RESAMPLES)
    step = max(1, 4_000_000 // n)  # 32 MB of counts at a time
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        values[start : start + size] = statistic(rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64))
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


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
