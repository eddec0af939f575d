"""How far outputs are from those of another model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.passes.prune.channel.outputs import Moments


@given(pieces=st.integers(1, 5), seed=st.integers(0, 20))
def test_streamed_distance_is_that_of_all_samples(pieces: int, seed: int) -> None:
    """Error and lost share as numpy computes them from all rows at once (1e-6)."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((20, 3))
    b = a * [1, 2, -1] + rng.standard_normal((20, 3))
    moments = Moments()
    for part in np.array_split(np.arange(20), pieces):
        moments.add({"y": a[part]}, {"y": b[part]}, None)
    spread = np.square(a - a.mean(0)).sum(0)
    told = [np.corrcoef(a[:, index], b[:, index])[0, 1] ** 2 for index in range(3)]
    distance = moments.distance()
    np.testing.assert_allclose(distance.error, np.square(a - b).sum() / spread.sum(), rtol=1e-6)
    np.testing.assert_allclose(distance.lost, ((1 - np.array(told)) * spread).sum() / spread.sum(), rtol=1e-6)


def test_a_shift_and_a_scale_lose_nothing() -> None:
    """Outputs that another constant and factor bring back err, but nothing is lost; constant ones lose everything."""
    a = np.random.default_rng(0).standard_normal((30, 4))
    for b, lost in ((3 * a + 7, 0.0), (np.full_like(a, 5.0), 1.0)):
        moments = Moments()
        moments.add({"y": a}, {"y": b}, None)
        distance = moments.distance()
        assert distance.error > 1
        assert distance.lost == pytest.approx(lost, abs=1e-9)


def test_padding_integers_and_infinities() -> None:
    """Positions that are padding do not count, nor do outputs that are no floats; what is not finite is far away."""
    a = np.arange(8.0).reshape(1, 4, 2)
    b = a.copy()
    b[0, 2:] = 100
    moments = Moments()
    moments.add({"y": a, "n": np.arange(3)}, {"y": b, "n": np.zeros(3, int)}, np.array([[True, True, False, False]]))
    assert moments.distance().error == 0
    moments.add({"y": a}, {"y": np.full_like(b, np.inf)}, None)
    assert moments.distance().error == np.inf
    assert Moments().distance().lost == 0
