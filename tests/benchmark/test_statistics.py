"""Intervals against closed forms and simulations; corpus BLEU against sacreBLEU."""

import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from compress.benchmark import statistics
from compress.scores import bleu


def test_the_mean_difference_has_the_interval_of_the_normal_theory():
    rng = np.random.default_rng(1)
    a = rng.normal(50, 20, size=(400, 1))
    b = a - 1 + rng.normal(0, 4, size=(400, 1))
    estimate, low, high = statistics.paired("rougeL", a.tolist(), b.tolist())
    d = (b - a)[:, 0]
    half = 1.96 * d.std(ddof=1) / math.sqrt(len(d))
    assert estimate == pytest.approx(d.mean())
    assert (low, high) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.03)


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
    assert statistics.paired("rougeL", rows, rows) == (0, 0, 0)


def test_different_examples_are_refused():
    with pytest.raises(ValueError, match="not the same examples"):
        statistics.paired("rougeL", [[1.0]], [[1.0], [2.0]])


def test_the_ratio_of_rounds_has_students_interval_on_the_log_scale():
    a, b = [[1.0, 1.1], [0.9, 1.2], [1.0, 1.0]], [[1.3, 1.32], [1.2, 1.5], [1.25, 1.3]]
    estimate, low, high = statistics.paired_ratio(a, b)
    logs = (np.log(b) - np.log(a)).mean(axis=1)
    expected = stats.t.interval(0.95, len(logs) - 1, logs.mean(), stats.sem(logs))
    assert (math.log(estimate), math.log(low), math.log(high)) == pytest.approx((logs.mean(), *expected))
    assert statistics.paired_ratio([[1.0, 1.0]], [[2.0, 2.0]]) == (2.0, None, None)


def test_ratios_of_two_runs_follow_welch():
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(0, 0.1, (6, 1)), rng.lognormal(0.2, 0.3, (9, 1))
    _, low, high = statistics.unpaired_ratio(a.tolist(), b.tolist())
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
        _, low, high = statistics.paired_ratio(a.tolist(), b.tolist())
        hits += low <= 1.1 <= high
    assert 0.935 <= hits / 2000 <= 0.965


def test_a_quality_ratio_that_is_the_same_in_every_example_is_certain():
    a = [[float(n % 7 + 1), 10.0] for n in range(50)]
    b = [[nll + 10 * math.log(1.05), tokens] for nll, tokens in a]
    assert statistics.paired("perplexity", a, b, ratio=True) == pytest.approx((1.05, 1.05, 1.05))


def test_too_few_examples_give_no_interval():
    rows = [[float(x)] for x in range(19)]
    assert statistics.paired("rougeL", rows, rows) == (0, None, None)
    assert statistics.alone("rougeL", rows) == (9, None, None)


@pytest.mark.slow
def test_intervals_of_quality_differences_cover_the_truth_95_times_of_100():
    rng = np.random.default_rng(3)
    hits = 0
    for number in range(400):
        a = rng.beta(2, 2, size=(200, 1)) * 100
        b = a - 1 + rng.normal(0, 6, size=(200, 1))
        _, low, high = statistics.paired("rougeL", a.tolist(), b.tolist(), seed=number)
        hits += low <= -1 <= high
    assert 0.925 <= hits / 400 <= 0.975


def test_perplexity_weighs_tokens_not_texts():
    rows = [[2.0, 1.0], [3.0, 9.0]]
    assert statistics.corpus_value("perplexity", rows) == pytest.approx(math.exp(5 / 10))


def test_macro_f1_by_hand():
    # label 0: 1 true positive, 1 false negative; label 1: 1 true positive, 1 false positive
    rows = [[1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 1, 0]]
    assert statistics.corpus_value("f1", rows) == pytest.approx(100 * (2 / 3 + 2 / 3) / 2)


words = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "red", "mat", ".", ",", "and", "dog"]), max_size=12).map(" ".join)


@settings(deadline=None)
@given(st.lists(st.tuples(words, words.filter(bool)), min_size=1, max_size=6))
def test_summed_statistics_give_sacrebleus_corpus_score(pairs):
    outputs, references = [p[0] for p in pairs], [p[1] for p in pairs]
    ours = statistics.corpus_value("bleu", bleu(outputs, [[r] for r in references]))
    assert ours == pytest.approx(sacrebleu.corpus_bleu(outputs, [references]).score, abs=1e-9)
