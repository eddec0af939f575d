"""The relaxation between two levels: where it begins, what it permits, where it ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelpress_compression.passes.quantize.reconstruction.grids import Grid
from modelpress_compression.passes.quantize.reconstruction.soft_rounding import WARMUP, SoftRounding, beta_at
from modelpress_compression.passes.quantize.rounding.rounder import nearest

CPU = torch.device("cpu")


def grid(weight: np.ndarray, levels: np.ndarray | None = None, scale: float = 0.5, top: int = 7) -> Grid:
    """Levels from -top to top; those next to the weight where none are given."""
    low, high = np.asarray(-top, np.int16), np.asarray(top, np.int16)
    step = np.full((1,) * weight.ndim, scale, np.float32)
    if levels is None:
        levels = nearest(weight, step, low, high)
    return Grid(weight.astype(np.float32), step, low, high, levels.astype(np.int16))


@given(seed=st.integers(0, 1000), top=st.sampled_from([1, 7, 127]))
@settings(max_examples=40)
def test_it_chooses_between_the_two_levels_around_a_weight(seed: int, top: int) -> None:
    """From nearest rounding both ends of every offset are the levels below and above the weight, within the bounds."""
    weight = np.random.default_rng(seed).normal(0, 2, (5, 7))
    own = grid(weight, top=top)
    soft = SoftRounding(own, CPU)
    ends = []
    for end in (-50.0, 50.0):
        soft.offsets.data.fill_(end)
        ends.append(soft.levels())
        np.testing.assert_allclose(soft.weight().detach().numpy(), own.real(ends[-1]), rtol=1e-6)
        assert (np.abs(ends[-1]) <= top).all()
        assert float(soft.undecided(2.0).detach()) == 0
    np.testing.assert_array_equal(ends[0], own.levels)
    inside = np.abs(weight / 0.5) < top
    pair = np.sort(np.stack(ends), axis=0)
    np.testing.assert_array_equal(pair[0][inside], np.floor(weight.astype(np.float32) / 0.5)[inside])
    np.testing.assert_array_equal(pair[1][inside], pair[0][inside] + 1)


def test_it_begins_half_way_to_the_weight() -> None:
    """And ends, untrained, with the levels that there were; a level that lies further off is still among the ends."""
    weight = np.asarray([[0.6, -0.7, 1.2]])
    soft = SoftRounding(grid(weight, np.asarray([[1, -1, -2]])), CPU)
    np.testing.assert_allclose(soft.weight().detach().numpy()[0, :2], [0.55, -0.6], atol=1e-6)
    assert -1.0 < float(soft.weight()[0, 2].detach()) < -0.9
    np.testing.assert_array_equal(soft.levels(), [[1, -1, -2]])


@pytest.mark.parametrize("value", [3.5, -3.5, 100.0, -100.0, 0.0])
def test_the_ends_of_the_range_are_kept(value: float) -> None:
    """A weight at or beyond the last level never leaves it; everything stays finite."""
    soft = SoftRounding(grid(np.full((2, 2), value)), CPU)
    soft.weight().square().sum().backward()
    assert torch.isfinite(soft.offsets.grad).all()  # type: ignore[arg-type]
    for end in (-50.0, 50.0):
        soft.offsets.data.fill_(end)
        assert np.abs(soft.levels()).max() <= 7


def test_the_exponent_falls_after_the_warm_up() -> None:
    """None at first, then from 20 to 2."""
    assert beta_at(0.0) is None
    assert beta_at(WARMUP) == pytest.approx(20)
    assert beta_at(1.0) == pytest.approx(2)
    assert (beta_at(0.3) or 0) > (beta_at(0.7) or 0)
