"""The sums against numpy on all rows at once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.passes.prune.channel.normal_equations import Sums


@given(
    groups=st.integers(1, 3), inputs=st.integers(1, 6), answers=st.integers(1, 4), seed=st.integers(0, 9),
    pieces=st.integers(1, 4),
)  # fmt: skip
def test_streamed_sums_are_those_of_all_rows(groups: int, inputs: int, answers: int, seed: int, pieces: int) -> None:
    """However the rows are cut into pieces: error, spread and best bias are those of numpy (1e-9, float64)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((groups, 40, inputs)) + 3
    y = rng.standard_normal((groups, 40, answers)) - 2
    sums = Sums.zeros(groups, inputs, answers)
    for part in np.array_split(np.arange(40), pieces):
        piece = Sums.zeros(groups, inputs, answers)
        piece.add(x[:, part], y[:, part])
        sums.merge(piece)
    weight, bias = rng.standard_normal((groups, inputs, answers)), rng.standard_normal((groups, 1, answers))
    np.testing.assert_allclose(sums.error(weight, bias), np.square(x @ weight + bias - y).sum(), rtol=1e-9)
    np.testing.assert_allclose(sums.spread(), np.square(y - y.mean(axis=1, keepdims=True)).sum(), rtol=1e-9)
    np.testing.assert_allclose(
        sums.best_bias(weight), (y - x @ weight).mean(axis=1, keepdims=True), rtol=1e-9, atol=1e-9
    )


def test_small_ridge_is_least_squares() -> None:
    """With enough rows and next to no penalty: numpy.linalg.lstsq with a column of ones (1e-5)."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((1, 100, 5)) + 1, rng.standard_normal((1, 100, 3))
    sums = Sums.zeros(1, 5, 3)
    sums.add(x, y)
    weight = sums.solve(np.zeros((1, 5, 3)), 1e-9, intercept=True)
    expected = np.linalg.lstsq(np.hstack([x[0], np.ones((100, 1))]), y[0], rcond=None)[0]
    np.testing.assert_allclose(weight[0], expected[:5], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(sums.best_bias(weight)[0, 0], expected[5], rtol=1e-5, atol=1e-7)
    through_zero = sums.solve(np.zeros((1, 5, 3)), 1e-9, intercept=False)
    np.testing.assert_allclose(through_zero[0], np.linalg.lstsq(x[0], y[0], rcond=None)[0], rtol=1e-5, atol=1e-7)


def test_large_ridge_keeps_the_weights() -> None:
    """The penalty draws to the weights that are there, also where data says nothing of them."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal((1, 8, 2))
    sums = Sums.zeros(1, 8, 2)
    sums.add(rng.standard_normal((1, 3, 8)), rng.standard_normal((1, 3, 2)))
    np.testing.assert_allclose(sums.solve(start, 1e9, intercept=True), start, atol=1e-6)
    assert np.isfinite(sums.solve(start, 1e-4, intercept=True)).all()


def test_rows_that_are_not_finite_are_left_out() -> None:
    """One NaN does not spoil the sums."""
    sums = Sums.zeros(1, 2, 1)
    sums.add(np.array([[[1.0, 2.0], [np.nan, 1.0], [3.0, 4.0]]]), np.array([[[1.0], [1.0], [np.inf]]]))
    assert sums.rows == 1
    np.testing.assert_array_equal(sums.input_sums, [[[1.0, 2.0]]])
