"""Intervals against closed forms and simulations; corpus BLEU against sacreBLEU."""

import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from compress.benchmark import statistics
from compress.scores import bleu


def test_the_mean_difference_has_the_interval_of_the_normal_theory():
    rng = np.random.default_rng(1)
    a = rng.normal(50, 20, size=(400, 1))
    b = a - 1 + rng.normal(0, 4, size=(400, 1))
    effect, d = statistics.paired("rougeL", a.tolist(), b.tolist()), (b - a)[:, 0]
    assert effect.estimate == pytest.approx(d.mean())
    for confidence, z in ((0.95, 1.96), (0.8, 1.2816)):
        half = z * d.std(ddof=1) / math.sqrt(len(d))
        assert effect.interval(confidence) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.03)


def test_labels_right_on_one_side_alone_are_tested_as_mcnemar_does():
    """Against the sum of binomial probabilities, written out; 150 and 86 are Agresti's approval ratings (Categorical Data Analysis, 1990)."""
    cases = {(0, 0): 1.0, (3, 3): 1.0, (8, 1): 2 * sum(math.comb(9, k) for k in range(2)) / 2**9}
    cases[150, 86] = 2 * sum(math.comb(236, k) for k in range(87)) / 2**236
    for (lost, won), p in cases.items():
        a = [[100.0]] * lost + [[0.0]] * won + [[100.0], [0.0]] * 7
        b = [[0.0]] * lost + [[100.0]] * won + [[100.0], [0.0]] * 7
        assert statistics.mcnemar(a, b) == (lost, won, pytest.approx(p, rel=1e-9))
        assert statistics.mcnemar(a, b)[2] == pytest.approx(stats.binomtest(won, lost + won).pvalue if lost + won else 1)


def test_equal_sides_differ_by_nothing():
    rows = [[float(x)] for x in range(50)]
    assert statistics.paired("rougeL", rows, rows).interval(0.95) == (0, 0)


def test_different_examples_are_refused():
    with pytest.raises(ValueError, match="not the same examples"):
        statistics.paired("rougeL", [[1.0]], [[1.0], [2.0]])


def test_the_ratio_of_rounds_has_students_interval_on_the_log_scale():
    a, b = [[1.0, 1.1], [0.9, 1.2], [1.0, 1.0]], [[1.3, 1.32], [1.2, 1.5], [1.25, 1.3]]
    effect = statistics.paired_ratio(a, b)
    logs = (np.log(b) - np.log(a)).mean(axis=1)
    expected = stats.t.interval(0.95, len(logs) - 1, logs.mean(), stats.sem(logs))
    assert math.log(effect.estimate) == pytest.approx(logs.mean())
    assert np.log(effect.interval(0.95)) == pytest.approx(expected)
    p = stats.ttest_1samp(logs, math.log(1.1), alternative="greater").pvalue
    assert effect.at_most(1.1) == pytest.approx(p)
    assert effect.at_least(1.1) == pytest.approx(1 - p)
    single = statistics.paired_ratio([[1.0, 1.0]], [[2.0, 2.0]])
    assert (single.estimate, single.interval(0.95)) == (2.0, None)


def test_ratios_of_two_runs_follow_welch():
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(0, 0.1, (6, 1)), rng.lognormal(0.2, 0.3, (9, 1))
    low, high = statistics.unpaired_ratio(a.tolist(), b.tolist()).interval(0.95)
    expected = stats.ttest_ind(np.log(b[:, 0]), np.log(a[:, 0]), equal_var=False).confidence_interval(0.95)
    assert (math.log(low), math.log(high)) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("rounds", [3, 5, 10])
@pytest.mark.parametrize("process_spread", [0.0, 0.02])
def test_intervals_of_speed_ratios_cover_the_truth_95_times_of_100(rounds, process_spread):
    """Slow moments hit both sides of a turn; each process has its own luck, which its turns share."""
    rng = np.random.default_rng(rounds)
    hits = 0
    for _ in range(2000):
        machine = rng.lognormal(0, 0.5, (rounds, 3))
        a = machine * rng.lognormal(0, process_spread, (rounds, 1)) * rng.lognormal(0, 0.01, (rounds, 3))
        b = 1.1 * machine * rng.lognormal(0, process_spread, (rounds, 1)) * rng.lognormal(0, 0.01, (rounds, 3))
        low, high = statistics.paired_ratio(a.tolist(), b.tolist()).interval(0.95)
        hits += low <= 1.1 <= high
    assert 0.935 <= hits / 2000 <= 0.965


def test_a_quality_ratio_that_is_the_same_in_every_example_is_certain():
    a = [[float(n % 7 + 1), 10.0] for n in range(50)]
    b = [[nll + 10 * math.log(1.05), tokens] for nll, tokens in a]
    effect = statistics.paired("perplexity", a, b, ratio=True)
    assert (effect.estimate, *effect.interval(0.95)) == pytest.approx((1.05, 1.05, 1.05))
    assert (effect.at_most(1.06), effect.at_most(1.04), effect.at_least(1.04)) == (1, 0, 1)


def test_too_few_examples_give_no_interval():
    rows = [[float(x)] for x in range(19)]
    for effect, value in ((statistics.paired("rougeL", rows, rows), 0), (statistics.single_side("rougeL", rows), 9)):
        assert (effect.estimate, effect.interval(0.95), effect.needed(1, 0.95)) == (value, None, None)


@pytest.mark.slow
def test_intervals_of_quality_differences_cover_the_truth_95_times_of_100():
    rng = np.random.default_rng(3)
    hits = 0
    for number in range(400):
        a = rng.beta(2, 2, size=(200, 1)) * 100
        b = a - 1 + rng.normal(0, 6, size=(200, 1))
        low, high = statistics.paired("rougeL", a.tolist(), b.tolist(), seed=number).interval(0.95)
        hits += low <= -1 <= high
    assert 0.925 <= hits / 400 <= 0.975


def test_intervals_of_a_divergence_cover_the_truth_95_times_of_100(monkeypatch):
    """Sixty texts of 200 to 500 tokens whose divergence spreads by 0.4 of its mean, as a 4-bit model's does over rows of wikitext."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng = np.random.default_rng(11)
    hits = 0
    for number in range(600):
        tokens = rng.integers(200, 512, 60).astype(float)
        means = 0.15 * rng.lognormal(-(0.4**2) / 2, 0.4, 60)
        low, high = statistics.single_side("divergence", np.column_stack([tokens * means, tokens]).tolist(), seed=number).interval(0.95)
        hits += low <= 0.15 <= high
    assert 0.93 <= hits / 600 <= 0.97, hits / 600


@pytest.mark.parametrize("metric", ["rougeL", "perplexity", "bleu"])
def test_the_bootstrap_is_scipys_bca(metric):
    """Skewed differences, where the corrections move the bounds by a tenth of the interval."""
    rng = np.random.default_rng(4)
    if metric == "bleu":
        words = ["the", "cat", "sat", "on", "a", "red", "mat", "and", "dog"]
        references = [" ".join(rng.choice(words, 12)) for _ in range(60)]
        kept = [" ".join(w if rng.random() < 0.8 else "x" for w in text.split()) for text in references]
        a, b = (np.array(bleu(texts, [[text] for text in references])) for texts in (references, kept))
    else:
        a = np.column_stack([rng.lognormal(1, 1, 60), rng.integers(5, 15, 60).astype(float)])[:, : 1 + (metric == "perplexity")]
        b = a + np.column_stack([rng.exponential(2, 60) ** 2, np.zeros(60)])[:, : a.shape[1]]
    value = statistics.combine(metric)

    def apart(places, axis=-1):
        picked = places.astype(int)
        return value(b[picked].sum(axis=-2), 60) - value(a[picked].sum(axis=-2), 60)

    expected = stats.bootstrap(
        (np.arange(60.0),), apart, vectorized=True, n_resamples=20_000, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    effect = statistics.paired(metric, a.tolist(), b.tolist())
    low, high = effect.interval(0.95)
    width = expected.high - expected.low
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.06 * width)
    assert effect.at_most(high) == pytest.approx(0.975, abs=0.002)
    assert effect.at_least(low) == pytest.approx(0.975, abs=0.002)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_is_never_below_the_p_value_nor_above_bonferroni(p_values):
    corrected = statistics.holm(p_values)
    assert all(p <= q <= min(1, len(p_values) * p) + 1e-12 for p, q in zip(p_values, corrected, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert list(np.array(corrected)[order]) == sorted(corrected)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def in_truth(spread, distance, samples, confidence=0.95):
    """The textbook's number of samples that tell four times of five, with the truth in the place of estimates; more than there are."""
    z = stats.norm.ppf((1 + confidence) / 2)
    return max(samples + 1, (spread * (z + stats.norm.ppf(0.8)) / distance) ** 2) if distance else math.inf


@pytest.mark.parametrize("kind", ["examples", "rounds"])
def test_the_range_of_how_many_would_tell_holds_the_truths_number(kind):
    """Truths lie evenly around the limit, within four errors; of those that can't be told, 95 % need the least and 80 % at most the most."""
    rng, draws = np.random.default_rng(0), stats.norm.ppf((np.arange(1000) + 0.5) / 1000)
    n, cases, least, most, both, early = (40 if kind == "examples" else 6), 0, 0, 0, 0, 0
    for _ in range(3000):
        truth = rng.uniform(-4, 4) / math.sqrt(n)
        if kind == "examples":  # what the bootstrap makes of 40
            drawn = truth + rng.normal(0, 1, n)
            error = drawn.std(ddof=1) / math.sqrt(n)
            effect, limit = statistics.Bootstrapped(drawn.mean(), n, draws=tuple(drawn.mean() + error * draws)), 0.0
        else:
            drawn = np.exp(0.1 * (truth + rng.normal(0, 1, (n, 1))))
            effect, limit = statistics.paired_ratio((drawn / drawn).tolist(), drawn.tolist()), 1.0
        low, high = effect.interval(0.95)
        if not low < limit < high:
            continue
        expected, needed = in_truth(1, abs(truth), n), effect.needed(limit, 0.95)
        above, below = needed.least <= 1.1 * expected, needed.most is None or needed.most >= 0.9 * expected
        cases, least, most, both, early = cases + 1, least + above, most + below, both + (above and below), early + (needed.most is None)
    assert cases > 200
    assert least / cases >= 0.93
    assert most / cases >= 0.77
    assert both / cases >= 0.74
    assert 0.3 <= early / cases <= 0.75, "a range with both ends is said where it can be"


def test_thirty_examples_on_the_limit_are_too_few_to_say_that_none_would_tell():
    """The estimate is the limit to a hundredth of an error, and the truth a whole error away: then 8 times as many tell, and 2.04 are the least."""
    drawn = 8 * stats.norm.ppf((np.arange(30) + 0.5) / 30)[:, None] - 2.01
    needed = statistics.paired("rougeL", (0 * drawn).tolist(), drawn.tolist()).needed(-2, 0.95)
    assert needed.most is None
    assert 50 <= needed.least <= 65
    assert in_truth(8, 8 / math.sqrt(30), 30) == pytest.approx(8 * 30, rel=0.02)


@pytest.mark.slow
def test_a_number_that_tells_does_so_four_times_of_five():
    rng = np.random.default_rng(0)
    n = round(in_truth(8, 1, 20))
    drops = (-1 + rng.normal(0, 8, (n, 1)) for _ in range(40))
    told = sum(statistics.paired("rougeL", (0 * drop).tolist(), drop.tolist()).at_least(-2) >= 0.975 for drop in drops)
    assert 0.6 <= told / 40 <= 0.96


def test_perplexity_weighs_tokens_not_texts():
    rows = [[2.0, 1.0], [3.0, 9.0]]
    assert statistics.corpus_value("perplexity", rows) == pytest.approx(math.exp(5 / 10))


def test_macro_f1_by_hand():
    # label 0: 1 true positive, 1 false negative; label 1: 1 true positive, 1 false positive
    rows = [[1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 1, 0]]
    assert statistics.corpus_value("f1", rows) == pytest.approx(100 * (2 / 3 + 2 / 3) / 2)


words = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "red", "mat", ".", ",", "and", "dog"]), max_size=12).map(" ".join)


@given(st.lists(st.tuples(words, words.filter(bool)), min_size=1, max_size=6))
def test_summed_statistics_give_sacrebleus_corpus_score(pairs):
    outputs, references = [p[0] for p in pairs], [p[1] for p in pairs]
    ours = statistics.corpus_value("bleu", bleu(outputs, [[r] for r in references]))
    assert ours == pytest.approx(sacrebleu.corpus_bleu(outputs, [references]).score, abs=1e-9)
