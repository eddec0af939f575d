"""The sums against numpy on all rows at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.passes.repair.normal_equations import Ridge, Sums


def rows(rng: np.random.Generator, *shape: int) -> Any:
    """Random float32."""
    return rng.standard_normal(shape).astype(np.float32)


@given(
    groups=st.integers(1, 3), inputs=st.integers(1, 6), answers=st.integers(1, 4), seed=st.integers(0, 9),
    pieces=st.integers(1, 4),
)  # fmt: skip
def test_streamed_sums_are_those_of_all_rows(groups: int, inputs: int, answers: int, seed: int, pieces: int) -> None:
    """However the rows are cut into pieces: sums and best bias are those of numpy (1e-5, products in float32)."""
    rng = np.random.default_rng(seed)
    x, y = rows(rng, groups, 40, inputs) + 3, rows(rng, groups, 40, answers) - 2
    sums = Sums.zeros(groups, inputs, answers)
    for part in np.array_split(np.arange(40), pieces):
        sums.add(x[:, part], y[:, part])
    assert sums.rows == 40
    np.testing.assert_allclose(sums.inputs, x.transpose(0, 2, 1).astype(np.float64) @ x, rtol=1e-5)
    weight = rng.standard_normal((groups, inputs, answers))
    np.testing.assert_allclose(
        sums.best_bias(weight), (y - x @ weight).mean(axis=1, keepdims=True), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_small_ridge_is_least_squares(scale: float) -> None:
    """With enough rows and next to no penalty: numpy.linalg.lstsq with a column of ones (1e-3), also where one input is
    far larger than the others."""
    rng = np.random.default_rng(0)
    x, y = rows(rng, 1, 100, 5) + 1, rows(rng, 1, 100, 3)
    x[:, :, 0] *= scale
    sums = Sums.zeros(1, 5, 3)
    sums.add(x, y)
    weight = Ridge(sums, intercept=True).solve(1e-6)
    assert weight is not None
    expected = np.linalg.lstsq(np.hstack([x[0], np.ones((100, 1))]).astype(np.float64), y[0], rcond=None)[0]
    np.testing.assert_allclose(x[0] @ weight[0], x[0] @ expected[:5], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(sums.best_bias(weight)[0, 0], expected[5], rtol=1e-3, atol=1e-3)
    through_zero = Ridge(sums, intercept=False).solve(1e-6)
    assert through_zero is not None
    expected = np.linalg.lstsq(x[0].astype(np.float64), y[0], rcond=None)[0]
    np.testing.assert_allclose(x[0] @ through_zero[0], x[0] @ expected, rtol=1e-3, atol=1e-3)


@given(scale=st.floats(0.2, 5), seed=st.integers(0, 9))
def test_fits_do_not_depend_on_the_scale_of_an_input(scale: float, seed: int) -> None:
    """An input in other units gives the same answers (1e-3), as long as it is not below the least energy."""
    rng = np.random.default_rng(seed)
    x, y = rows(rng, 1, 60, 4), rows(rng, 1, 60, 2)
    answers = []
    for factor in (1.0, scale):
        scaled = (x * np.array([factor, 1, 1, 1])).astype(np.float32)
        sums = Sums.zeros(1, 4, 2)
        sums.add(scaled, y)
        weight = Ridge(sums, intercept=True).solve(0.1)
        assert weight is not None
        answers.append(scaled @ weight)
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-3, atol=1e-3)


def test_large_ridge_changes_nothing() -> None:
    """The penalty draws to no correction, also where data says nothing."""
    rng = np.random.default_rng(0)
    sums = Sums.zeros(1, 8, 2)
    sums.add(rows(rng, 1, 3, 8), rows(rng, 1, 3, 2))
    weight = Ridge(sums, intercept=True).solve(1e9)
    assert weight is not None
    np.testing.assert_allclose(weight, 0, atol=1e-6)
    assert Ridge(sums, intercept=True).solve(1e-4) is not None


def test_rows_that_are_not_finite_are_left_out() -> None:
    """One NaN does not spoil the sums."""
    sums = Sums.zeros(1, 2, 1)
    x = np.array([[[1.0, 2.0], [np.nan, 1.0], [3.0, 4.0]]], np.float32)
    sums.add(x, np.array([[[1.0], [1.0], [np.inf]]], np.float32))
    assert sums.rows == 1
    np.testing.assert_array_equal(sums.input_sums, [[[1.0, 2.0]]])
