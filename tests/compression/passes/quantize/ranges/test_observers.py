"""Histograms against numpy on all the data at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from modelpress_compression.passes.quantize.ranges.observers import (
    BINS,
    METHODS,
    Histogram,
    entropy,
    minmax,
    moving_average,
    mse,
    percentile,
)

FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
CHUNKS = st.lists(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=FLOATS), min_size=1)


def histogram_of(*chunks: np.ndarray) -> Histogram:
    histogram = Histogram()
    for chunk in chunks:
        histogram.observe(chunk)
    return histogram


@given(CHUNKS)
@settings(max_examples=60)
def test_streaming_equals_numpy_on_all_the_data(chunks: list[np.ndarray]) -> None:
    """Counts equal numpy's histogram of everything over the final range, exactly, in ragged pieces of any order."""
    everything = np.concatenate([chunk.reshape(-1) for chunk in chunks]).astype(np.float64)
    histogram = histogram_of(*chunks)
    assert histogram.total == everything.size
    assert minmax(histogram) == (everything.min(), everything.max())
    if histogram.radius:
        expected, _ = np.histogram(everything, BINS, (-histogram.radius, histogram.radius))
        np.testing.assert_array_equal(histogram.counts, expected)
        np.testing.assert_array_equal(histogram.counts, histogram_of(*reversed(chunks)).counts)


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
def test_percentile_is_within_a_bin_of_the_quantiles(percent: float) -> None:
    """The range holds the two quantiles and ends at most a bin beyond them."""
    values = np.random.default_rng(1).standard_t(3, 200_000).astype(np.float32)
    histogram = histogram_of(*np.array_split(values, 7))
    found = percentile(histogram, percent)
    low, high = np.quantile(values, [1 - percent / 100, percent / 100], method="inverted_cdf")
    assert low - histogram.bin_width <= found.low <= low
    assert high <= found.high <= high + histogram.bin_width


def test_hundred_percent_is_minmax() -> None:
    """Nothing is cut at 100."""
    histogram = histogram_of(np.linspace(-3, 5, 999, dtype=np.float32))
    assert percentile(histogram, 100.0) == pytest.approx(minmax(histogram))


def test_entropy_clips_a_lone_outlier_and_keeps_a_uniform_tensor() -> None:
    """One value far out is cut; values that fill their range are kept to a tenth."""
    bulk = np.random.default_rng(2).normal(0, 1, 100_000).astype(np.float32)
    clipped = entropy(histogram_of(np.append(bulk, np.float32(100))))
    assert 2 < clipped.high < 50
    uniform = entropy(histogram_of(np.random.default_rng(3).uniform(-1, 1, 100_000).astype(np.float32)))
    assert uniform.high > 0.9
    assert uniform.low < -0.9


def test_entropy_is_not_drawn_to_zero_by_the_zeros_of_a_relu() -> None:
    """Half the values at exactly zero leave most of the range to the other half."""
    values = np.maximum(np.random.default_rng(4).normal(0, 1, 100_000), 0).astype(np.float32)
    found = entropy(histogram_of(values))
    assert found.low == 0
    assert found.high > 1.5


@pytest.mark.parametrize("method", [minmax, percentile, entropy])
def test_zeros_and_nothing_give_an_empty_range(method: object) -> None:
    """All-zero tensors, and tensors never seen, have the range [0, 0]."""
    assert callable(method)
    assert method(histogram_of(np.zeros((3, 4), np.float32))) == (0, 0)
    assert method(Histogram()) == (0, 0)
    assert method(histogram_of(np.zeros((0, 4), np.float32))) == (0, 0)


def test_values_that_are_not_finite_are_counted_apart() -> None:
    """Infinities and NaN change neither extremes nor counts."""
    histogram = histogram_of(np.asarray([1, np.nan, -2, np.inf], np.float32), np.asarray([np.nan], np.float32))
    assert histogram.non_finite == 3
    assert (histogram.low, histogram.high, histogram.total) == (-2, 1, 2)


def test_zeros_before_the_first_value_are_counted() -> None:
    """Zeros that came before any scale was known lie in the bin of zero."""
    histogram = histogram_of(np.zeros(5, np.float32), np.asarray([1.0], np.float32))
    assert histogram.counts[BINS // 2] == 5
    assert histogram.total == 6


def test_moving_average_follows_the_samples() -> None:
    """Extremes of each sample, the last one counting a tenth; a sample larger than a chunk counts once (rtol 1e-6)."""
    samples = [np.asarray([-1.0, 2.0]), np.asarray([-3.0, 4.0]), np.asarray([0.0, 20.0])]
    low, high = -1.0, 2.0
    for sample in samples[1:]:
        low, high = 0.9 * low + 0.1 * sample.min(), 0.9 * high + 0.1 * sample.max()
    assert moving_average(histogram_of(*samples)) == pytest.approx((low, high), rel=1e-6)
    large = np.linspace(-1, 1, (1 << 20) + 7, dtype=np.float32)
    assert moving_average(histogram_of(large)) == pytest.approx((-1, 1))


@pytest.mark.parametrize(("outliers", "clips"), [(0, False), (1, True)])
def test_mse_is_the_best_of_the_ranges_it_tries(outliers: int, clips: bool) -> None:
    """By the real error of 256 levels, no range between shares of the extremes is more than 5 % better; a lone value
    far out is clipped, a uniform tensor is not."""
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.uniform(-1, 2, 400_000), np.full(outliers, 4.0)]).astype(np.float32)

    def error(low: float, high: float) -> float:
        scale = (high - low) / 255
        zero = np.rint(-low / scale)
        levels = np.clip(np.rint(values / scale) + zero, 0, 255)
        return float(np.square((levels - zero) * scale - values).sum())

    found = mse(histogram_of(values))
    tried = [
        error(values.min() * a, values.max() * b) for a in np.linspace(0.1, 1, 19) for b in np.linspace(0.1, 1, 19)
    ]
    assert error(*found) <= 1.05 * min(tried)
    assert (found.high < 0.9 * values.max()) == clips


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_takes_zeros_constants_and_nothing(method: str) -> None:
    """An empty histogram, zeros alone and one constant give finite ranges that hold what was seen."""
    for values in ([], [0.0, 0.0], [3.0, 3.0, 3.0], [-2.0]):
        found = METHODS[method](histogram_of(np.asarray(values, np.float32)) if values else Histogram())
        assert np.isfinite([found.low, found.high]).all()
        if values:
            assert found.low <= min(values) + 1e-6
            assert found.high >= max(values) - 1e-6
