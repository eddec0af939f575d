"""Two models side by side, and how far the outputs of one are from those of the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.inputs import InputData
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.repair.paired import Moments, Paired


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


MASKED = """
<ir_version: 8, opset_import: ["": 17]>
masked (int64[n, t] attention_mask, float[n, t, 2] x) => (float[n, t, 2] y) { y = Neg(x) }
"""


def test_samples_bring_their_mask(model_from_text: Any, tmp_path: Path) -> None:
    """That of a padded sample; None where nothing is padding."""
    model = model_from_text(MASKED)
    mask, x = np.array([[1, 0, 1], [1, 1, 1]]), np.zeros((2, 3, 2), np.float32)
    samples = InputData.from_arrays({"attention_mask": mask, "x": x}, model.inputs)
    pair = Paired(model, model, samples, ["y"], ["y"], frozenset({1}), Context(samples, tmp_path))
    padded, full = pair.advance(["y"], ["y"])
    np.testing.assert_array_equal(padded.mask, [[True, False, True]])
    assert full.mask is None
    assert [sample.held_out for sample in (padded, full)] == [False, True]
