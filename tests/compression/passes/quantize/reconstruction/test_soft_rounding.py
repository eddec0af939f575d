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
        soft.descend(torch.ones(5, 7), 3.0, 300.0)
        assert not soft.offsets.grad.any()  # type: ignore[union-attr]
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
    soft.descend(2 * soft.weight().detach(), 2.5, 300.0)
    assert torch.isfinite(soft.offsets.grad).all()  # type: ignore[arg-type]
    for end in (-50.0, 50.0):
        soft.offsets.data.fill_(end)
        assert np.abs(soft.levels()).max() <= 7


@given(seed=st.integers(0, 1000), beta=st.sampled_from([None, 2.0, 3.7, 20.0]))
@settings(max_examples=20)
def test_the_gradient_is_that_of_the_formula(seed: int, beta: float | None) -> None:
    """What descends is the gradient of |W~|^2 / 2 + 7 f(V), as autograd finds it from the formulas."""
    random = np.random.default_rng(seed)
    soft = SoftRounding(grid(random.normal(0, 2, (4, 3))), CPU)
    soft.offsets.data.copy_(torch.from_numpy(random.normal(0, 3, (4, 3))))
    ends = []
    for end in (-50.0, 50.0):
        kept = soft.offsets.data.clone()
        ends.append(torch.from_numpy(0.5 * _levels_at(soft, end)))
        soft.offsets.data.copy_(kept)
    offsets = soft.offsets.detach().clone().requires_grad_()
    moved = torch.clamp(1.2 * torch.sigmoid(offsets) - 0.1, 0, 1)
    weight = ends[0] + moved * (ends[1] - ends[0])
    loss = weight.square().sum() / 2
    if beta is not None:
        loss = loss + 7 * (1 - (2 * moved - 1).abs().pow(beta)).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    soft.descend(soft.weight().detach(), beta, 7.0)
    torch.testing.assert_close(soft.offsets.grad, offsets.grad, rtol=1e-4, atol=1e-5)


def _levels_at(soft: SoftRounding, end: float) -> np.ndarray:
    soft.offsets.data.fill_(end)
    return soft.levels().astype(np.float32)


def test_a_fused_step_moves_each_weight_of_a_convolution_by_its_own_gradient() -> None:
    """W~ is laid out with its channels last, V is not: one step of Adam goes against the sign of each gradient."""
    soft = SoftRounding(grid(np.random.default_rng(0).normal(0, 1, (4, 3, 2, 2))), CPU)
    before = soft.offsets.detach().clone()
    soft.descend(torch.from_numpy(np.random.default_rng(1).normal(0, 1, (4, 3, 2, 2)).astype(np.float32)), None, 0.0)
    gradient = soft.offsets.grad
    assert gradient is not None
    wanted = -gradient.sign()
    torch.optim.Adam([soft.offsets], lr=0.1, fused=True).step()
    torch.testing.assert_close((soft.offsets.detach() - before).sign(), wanted)


def test_the_exponent_falls_after_the_warm_up() -> None:
    """None at first, then from 20 to 2."""
    assert beta_at(0.0) is None
    assert beta_at(WARMUP) == pytest.approx(20)
    assert beta_at(1.0) == pytest.approx(2)
    assert (beta_at(0.3) or 0) > (beta_at(0.7) or 0)
