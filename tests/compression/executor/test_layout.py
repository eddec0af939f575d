"""Slicing and padding, whatever the numbers."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.executor.ops.layout import padded, sliced

_NUMPY_MODES = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}


@given(st.integers(0, 6), st.integers(-9, 9), st.integers(-9, 9), st.integers(-4, 4).filter(bool))
def test_slices_are_those_of_numpy(extent: int, start: int, end: int, step: int) -> None:
    """Bounds beyond the axis are clamped; going backwards, an end before the first element takes that one as well."""
    x = np.arange(extent)
    stop = None if step < 0 and end < -extent else end
    found = sliced(torch.from_numpy(x), (start,), (end,), (0,), (step,))
    np.testing.assert_array_equal(found.numpy(), x[start:stop:step])


@given(st.sampled_from(sorted(_NUMPY_MODES)), st.integers(2, 5), st.integers(0, 9), st.integers(0, 9))
def test_padding_is_that_of_numpy(mode: str, extent: int, begin: int, end: int) -> None:
    """Also by more than the axis is long."""
    x = np.arange(2 * extent).reshape(2, extent)
    found = padded(torch.from_numpy(x), (begin, end), (1,), mode, 0)
    np.testing.assert_array_equal(found.numpy(), np.pad(x, ((0, 0), (begin, end)), mode=_NUMPY_MODES[mode]))
