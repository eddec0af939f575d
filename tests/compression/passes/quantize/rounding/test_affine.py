"""Scales and zero points."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelpress_compression.passes.quantize.rounding import affine
from modelpress_compression.passes.quantize.rounding.affine import Range, activation_parameters, quantize_weight

FLOATS = st.floats(-1e5, 1e5, width=32)


@given(FLOATS, FLOATS, st.sampled_from(["uint8", "int8"]))
@settings(max_examples=200)
def test_values_in_the_range_come_back_within_a_step(one: float, other: float, dtype: str) -> None:
    """Within the range the error is at most one scale, and zero is exact."""
    value_range = Range(min(one, other), max(one, other))
    parameters = activation_parameters(value_range, dtype)
    low, high = min(value_range.low, 0), max(value_range.high, 0)
    values = np.append(np.linspace(low, high, 97), 0).astype(np.float32)
    error = np.abs(parameters.fake_quantize(values) - values)
    assert float(error.max()) <= float(parameters.scale) * 1.01
    assert error[-1] == 0
    info = np.iinfo(dtype)
    assert info.min <= parameters.zero_point <= info.max


def test_a_range_above_zero_starts_at_the_smallest_integer() -> None:
    """After a ReLU the zero point is the type's minimum, which lets onnxruntime drop the ReLU."""
    assert activation_parameters(Range(0.0, 6.0), "uint8").zero_point == 0
    assert activation_parameters(Range(0.5, 6.0), "int8").zero_point == -128


def test_a_constant_zero_tensor_has_scale_one() -> None:
    """No division by zero for a range of nothing."""
    assert activation_parameters(Range(0.0, 0.0), "uint8").scale == 1


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_weights_come_back_within_half_a_step(dtype: str, axis: int | None) -> None:
    """The error is at most half the scale of the slice; a slice of zeros comes back as zeros."""
    weight = np.random.default_rng(0).normal(0, 1, (6, 9, 2)).astype(np.float32)
    weight[2] = 0
    quantized = quantize_weight(weight, axis, dtype)
    assert quantized.levels.dtype == np.dtype(dtype)
    error = np.abs(quantized.dequantize() - weight)
    assert float(error.max()) <= float(quantized.scale.max()) * 0.501
    assert not quantized.dequantize()[2].any()
    assert quantized.scale.shape == (() if axis is None else (weight.shape[axis],))


def test_a_least_scale_is_kept() -> None:
    """A bias can ask for a coarser scale than the weights would need."""
    quantized = quantize_weight(np.full((2, 3), 1e-9, np.float32), 0, "int8", np.asarray([0.5, 0.0]))
    assert quantized.scale[0] == pytest.approx(0.5)
    assert quantized.scale[1] == pytest.approx(1e-9 / 127)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_blocks_give_the_same_levels(dtype: str, axis: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row as all at once, scales included."""
    weight = np.random.default_rng(0).normal(0, 1, (37, 64)).astype(np.float32)
    whole = quantize_weight(weight, axis, dtype)
    monkeypatch.setattr(affine, "_BLOCK_NUMBERS", 1)
    rows = quantize_weight(weight, axis, dtype)
    np.testing.assert_array_equal(rows.levels, whole.levels)
    np.testing.assert_array_equal(rows.scale, whole.scale)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_large_table_takes_little_beside_its_levels(dtype: str) -> None:
    """8 million numbers, 32 MiB, are quantized in less than that, the 8 MiB of levels included."""
    weight = np.ones((1 << 13, 1 << 10), np.float32)
    tracemalloc.start()
    quantize_weight(weight, 0, dtype)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < weight.nbytes
