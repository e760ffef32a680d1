"""Observers against quantiles, brute force over raw values, and what each promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.quantize._observer import BINS, OUTSIDE, SHRINKINGS, Histogram

OBSERVERS = ["minmax", "percentile", "mse", "entropy"]


def normal(count=200_000, rows=1, seed=0, mean=0.0):
    return torch.randn(rows, count, generator=torch.Generator().manual_seed(seed)) + mean


def ends(values, observer, bits=8, symmetric=False):
    low, high = Histogram(values).range(observer, bits, symmetric)
    return low.double().numpy(), high.double().numpy()


def lost(values, low, high, bits):
    """The mean squared error of rounding raw values to 2^bits levels from low to high, in float64."""
    step = (high - low) / (2**bits - 1)
    level = np.clip(np.round((values - low) / step), 0, 2**bits - 1)
    return ((level * step + low - values) ** 2).mean()


@pytest.mark.parametrize("mean", [-20.0, -1.0, 0.0, 1.0, 20.0])
def test_min_max_is_the_exact_range_with_zero_in_it(mean):
    values = normal(1000, rows=3, mean=mean)
    raw = values.double().numpy()
    low, high = ends(values, "minmax")
    assert np.array_equal(low, np.minimum(raw.min(axis=1), 0))
    assert np.array_equal(high, np.maximum(raw.max(axis=1), 0))
    low, high = ends(values, "minmax", symmetric=True)
    assert np.array_equal(high, np.abs(raw).max(axis=1))
    assert np.array_equal(low, -high)


@pytest.mark.parametrize("skewed", [False, True])
def test_percentile_leaves_out_the_outermost_hundredth_of_a_percent(skewed):
    values = normal(1_000_000)
    values = values.exp() - 3 if skewed else values
    raw = values.double().numpy()[0]
    bin_width = (raw.max() - raw.min()) / (BINS / 2)
    low, high = ends(values, "percentile")
    assert low[0] == pytest.approx(np.quantile(raw, OUTSIDE / 2, method="inverted_cdf"), abs=bin_width)
    assert high[0] == pytest.approx(np.quantile(raw, 1 - OUTSIDE / 2, method="inverted_cdf"), abs=bin_width)
    assert high[0] < 0.9 * raw.max()
    inside = ((raw >= low[0]) & (raw <= high[0])).mean()
    assert 1 - OUTSIDE <= inside < 1


def test_percentile_drops_none_of_a_few_values():
    values = normal(1000)
    raw = values.double().numpy()
    low, high = ends(values, "percentile")
    assert (low[0], high[0]) == (raw.min(), raw.max())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", ["normal", "heavy", "positive", "away from zero"])
def test_mse_is_near_the_best_candidate_by_brute_force_on_the_raw_values(shape, bits, symmetric):
    values = normal(20_000)
    values = {"normal": values, "heavy": values**3, "positive": values.abs(), "away from zero": values + 6}[shape]
    raw = values.double().numpy()[0]
    low, high = min(raw.min(), 0), max(raw.max(), 0)
    if symmetric:
        high = max(high, -low)
        low = -high
    error = lost(raw, *(end[0] for end in ends(values, "mse", bits, symmetric)), bits)
    assert error <= lost(raw, low, high, bits) * 1.001
    best = min(lost(raw, low * shrink, high * shrink, bits) for shrink in SHRINKINGS)
    assert error <= best * 1.02


def test_at_few_bits_mse_clips():
    low, high = ends(normal(), "mse", 2)
    raw = normal().double().numpy()[0]
    assert high[0] - low[0] < 0.7 * (raw.max() - raw.min())


@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_clips_far_outliers(symmetric):
    values = normal()
    values[0, :2] = torch.tensor([-40.0, 40.0])
    low, high = ends(values, "entropy", 8, symmetric)
    assert 3 < high[0] < 8
    assert -8 < low[0] < -3


@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_of_even_values_is_about_min_max(symmetric):
    values = torch.rand(1, 500_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    low, high = ends(values, "entropy", 8, symmetric)
    assert low[0] < -0.95 and high[0] > 0.95


def divergence(values, low, high, bits):
    """KL of what is seen, clipped, from what levels keep of it (Migacz 2017), by loops over bins as wide as the observer's."""
    width = 2.0 ** np.frexp((values.max() - values.min()) / (BINS - 1))[1]
    start = np.floor(values.min() / width) * width
    counts = np.histogram(values, bins=BINS, range=(start, start + BINS * width))[0]
    centres = start + width * (np.arange(BINS) + 0.5)
    step = (high - low) / (2**bits - 1)
    inside = [n for n in range(BINS) if 0 <= np.round((centres[n] - low) / step) <= 2**bits - 1]
    seen = {n: float(counts[n]) for n in inside}
    clipped = dict(seen)
    clipped[inside[0]] += counts[: inside[0]].sum()
    clipped[inside[-1]] += counts[inside[-1] + 1 :].sum()
    levels: dict = {}
    for n in inside:
        levels.setdefault(int(np.round((centres[n] - low) / step)), []).append(n)
    kept = {}
    for members in levels.values():
        filled = [n for n in members if clipped[n] > 0]
        kept |= {n: sum(seen[m] for m in members) / len(filled) for n in filled}
    whole, all_kept = sum(clipped.values()), sum(kept.values())
    return sum(clipped[n] / whole * np.log(clipped[n] / whole / max(kept[n] / all_kept, 1e-12)) for n in kept)


@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_takes_the_candidate_with_the_least_divergence(symmetric):
    values = normal(30_000) ** 3
    raw = values.double().numpy()[0]
    low, high = (end[0] for end in ends(values, "minmax", 4, symmetric))
    told = {shrink: divergence(raw, low * shrink, high * shrink, 4) for shrink in SHRINKINGS}
    assert ends(values, "entropy", 4, symmetric)[1][0] == pytest.approx(high * min(told, key=told.get))


@given(
    st.lists(st.lists(st.floats(-1e4, 1e4, width=32) | st.floats(-2, 2, width=32), min_size=1, max_size=20), min_size=1, max_size=8).filter(
        lambda pieces: any(any(piece) for piece in pieces)
    )
)
@settings(max_examples=150)
def test_values_in_pieces_count_as_if_they_came_at_once(pieces):
    histogram = Histogram(torch.tensor([pieces[0]]))
    for piece in pieces[1:]:
        histogram.add(torch.tensor([piece]))
    values = torch.tensor([[value for piece in pieces for value in piece]])
    whole = Histogram(values)
    assert torch.equal(histogram.counts, whole.counts)
    assert float(histogram.counts.sum()) == values.numel()
    for observer in ("minmax", "percentile"):
        assert histogram.range(observer, 8, False) == whole.range(observer, 8, False)
    # every value stands within half a bin of the centre of its bin
    centres = np.repeat(histogram.centres()[0].numpy(), histogram.counts[0].int().numpy())
    raw = np.sort(values.double().numpy()[0])
    assert np.abs(centres - raw).max() <= max((raw[-1] - raw[0]) / (BINS - 1), 2e-6 * np.abs(raw).max(), 1e-35)


def test_a_range_that_grows_by_a_hair_each_time_does_not_carry_values_along():
    values = torch.rand(1, 10_000, generator=torch.Generator().manual_seed(0))
    histogram = Histogram(values)
    tops = [1.0002**step for step in range(500)]
    for top in tops:
        histogram.add(torch.tensor([[top]]))
    median = histogram.centres()[0][(histogram.counts[0].cumsum(0) * 2 > histogram.counts.sum()).int().argmax()]
    everything = np.concatenate([values.double().numpy()[0], tops])
    assert float(median) == pytest.approx(np.median(everything), abs=2 * max(tops) / BINS)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_know_nothing_of_each_other(observer, symmetric):
    values = normal(20_000, rows=3) * torch.tensor([[0.01], [1.0], [300.0]]) + torch.tensor([[0.0], [3.0], [-900.0]])
    values[1, :2] = torch.tensor([-20.0, 70.0])
    low, high = ends(values, observer, 4, symmetric)
    for row in range(3):
        single = ends(values[row : row + 1], observer, 4, symmetric)
        assert (low[row], high[row]) == (single[0][0], single[1][0])


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("mean", [-50.0, -3.0, 0.0, 3.0, 50.0])
def test_ranges_include_zero_and_are_symmetric_where_asked(observer, bits, mean):
    values = normal(20_000, mean=mean)
    low, high = ends(values, observer, bits)
    assert low[0] <= 0 <= high[0] and high[0] > low[0]
    whole = ends(values, "minmax", bits)
    assert whole[0] <= low and high <= whole[1]
    low, high = ends(values, observer, bits, symmetric=True)
    assert high[0] == -low[0] > 0


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("constant", [-7.0, 0.0, 0.3, 1e-8, 3e4])
def test_a_constant_has_a_finite_range(observer, constant):
    low, high = ends(torch.full((1, 100), constant), observer)
    assert np.isfinite([low, high]).all()
    assert low[0] <= min(constant, 0) * 0.999 and high[0] >= max(constant, 0) * 0.999
