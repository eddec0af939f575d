"""What is held out decides, answer by answer."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.passes.repair.correction import HeldOut, choose, choose_correction
from modelpress_compression.passes.repair.normal_equations import Sums


@given(
    candidates=st.integers(1, 5), samples=st.integers(1, 6), answers=st.integers(1, 4), seed=st.integers(0, 99)
)  # fmt: skip
def test_the_simplest_within_one_standard_error(candidates: int, samples: int, answers: int, seed: int) -> None:
    """What is chosen is at most one standard error worse than the best and no worse than no correction, and it is the
    first that is."""
    errors = np.random.default_rng(seed).random((candidates, samples, 1, answers))
    chosen = choose(errors)
    for answer in range(answers):
        one = errors[:, :, 0, answer]
        worse = one - one[one.sum(axis=1).argmin()]
        fine = (worse.sum(axis=1) <= worse.std(axis=1) * np.sqrt(samples)) & (one.sum(axis=1) <= one[0].sum())
        assert chosen[0, answer] == np.flatnonzero(fine)[0]


def test_each_answer_by_itself() -> None:
    """One answer follows from the inputs and is fitted; the other is noise and stays, or all but stays, as it is."""
    rng = np.random.default_rng(0)
    weight = np.zeros((6, 2), np.float32)
    weight[:, 0] = 1.0
    sums, held_out = Sums.zeros(1, 6, 2), HeldOut()
    for index in range(10):
        x = rng.standard_normal((1, 4, 6)).astype(np.float32)
        z = (x @ weight + [0, 1] * rng.standard_normal((1, 4, 2))).astype(np.float32)
        if index % 2:
            held_out.add(x, z, index)
        else:
            sums.add(x, z)
    found = choose_correction(sums, held_out, intercept=True)
    np.testing.assert_allclose(found.weight[0, :, 0], 1.0, atol=0.02)
    assert np.abs(found.weight[0, :, 1]).max() < 0.2
    assert found.error_after < found.error_before


@given(rows=st.integers(2, 12), seed=st.integers(0, 50))
def test_never_worse_on_what_is_held_out(rows: int, seed: int) -> None:
    """However few rows there are, the error on what is held out is at most that of no correction."""
    rng = np.random.default_rng(seed)
    sums, held_out = Sums.zeros(1, 8, 3), HeldOut()
    sums.add(*(rng.standard_normal((1, rows, size)).astype(np.float32) for size in (8, 3)))
    for sample in range(3):
        held_out.add(*(rng.standard_normal((1, 2, size)).astype(np.float32) for size in (8, 3)), sample)
    found = choose_correction(sums, held_out, intercept=True)
    assert found.error_before == held_out.spreads().sum()
    assert found.error_after <= found.error_before


def test_no_bias_where_there_is_no_place_for_one() -> None:
    """Without an intercept only the weight changes."""
    rng = np.random.default_rng(0)
    sums, held_out = Sums.zeros(1, 3, 2), HeldOut()
    x = rng.standard_normal((1, 50, 3)).astype(np.float32)
    sums.add(x, x[:, :, :2] + 5)
    held_out.add(x, x[:, :, :2] + 5, 0)
    assert not choose_correction(sums, held_out, intercept=False).bias.any()
    np.testing.assert_allclose(choose_correction(sums, held_out, intercept=True).bias, 5, atol=0.1)
