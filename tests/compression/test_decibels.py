"""Errors as signal-to-noise ratios: bounds hold, extremes have an answer, and the way back agrees."""

import math

import pytest
from modelpress_compression.decibels import MAX_SQNR_DB, decibels, power_share


def test_a_hundredth_of_the_power_is_twenty_decibels() -> None:
    """With and without the signal, and back."""
    assert decibels(0.01) == pytest.approx(20.0, abs=1e-12)
    assert decibels(3.0, 300.0) == pytest.approx(20.0, abs=1e-12)
    assert power_share(decibels(0.37)) == pytest.approx(0.37, rel=1e-12)


def test_what_has_no_logarithm_is_at_a_bound() -> None:
    """No noise is the upper bound, no signal and noise that is no number the lower one; no noise comes first."""
    assert decibels(0.0) == decibels(0.0, 0.0) == MAX_SQNR_DB
    assert decibels(1.0, 0.0) == decibels(math.inf) == decibels(math.nan) == -MAX_SQNR_DB


def test_bounds_are_the_caller_s() -> None:
    """Another caller's scale ends elsewhere."""
    assert decibels(1e-12, most=90.0) == decibels(0.0, most=90.0) == 90.0
    assert decibels(math.inf, least=-math.inf) == -math.inf
    assert decibels(1e5, least=-3.0) == -3.0


def test_the_quotient_may_overflow() -> None:
    """Only its logarithm is taken."""
    assert decibels(1e-300, 1e300, most=math.inf) == pytest.approx(6000.0)
