"""Weights apart from their format, and levels in bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from modelpress_compression.encodings.weight import QuantizedWeight, pack, unpack


@pytest.mark.parametrize("bits", [2, 4, 8])
@given(data=st.data())
def test_unpacking_undoes_packing(bits: int, data: st.DataObject) -> None:
    """Levels of any rank come back, a last byte that is not full has zeros at its end; the first level lies lowest."""
    shapes = arrays.array_shapes(min_dims=1, max_dims=3, max_side=20)
    levels = data.draw(arrays.arrays(np.uint8, shapes, elements=st.integers(0, (1 << bits) - 1)))
    packed, count = pack(levels, bits), levels.shape[-1]
    assert packed.shape == (*levels.shape[:-1], -(-count * bits // 8))
    back = unpack(packed, bits)
    np.testing.assert_array_equal(back[..., :count], levels)
    assert not back[..., count:].any()
    np.testing.assert_array_equal(packed[..., 0] & ((1 << bits) - 1), levels[..., 0])


def test_each_level_has_its_own_parameters() -> None:
    """One scale, one a column, one a row, and one for each block of three, of which the last is short."""
    levels = np.arange(-5, 5, dtype=np.int8).reshape(2, 5)
    column = np.float32([1, 2, 3, 4, 5])
    blocks = np.float32([[1, 2], [3, 4]])
    for weight, scale in (
        (QuantizedWeight(levels, np.asarray(2, np.float32), np.zeros((), np.int8)), 2),
        (QuantizedWeight(levels, column, np.zeros(5, np.int8), 1), column),
        (QuantizedWeight(levels, column, np.zeros((), np.int8), -1), column),
        (QuantizedWeight(levels, np.float32([[1], [7]]), np.zeros((), np.int8)), np.float32([[1], [7]])),
        (QuantizedWeight(levels, blocks, np.zeros((2, 2), np.int8), 1, 3), blocks[:, [0, 0, 0, 1, 1]]),
    ):
        assert weight.is_consistent
        np.testing.assert_array_equal(weight.dequantize(), levels * scale)
        assert weight.nonzero() == 9


def test_zeros_are_the_levels_of_the_zero_point() -> None:
    """By channel, by block and for all."""
    levels = np.uint8([[128, 7, 0], [128, 1, 9]])
    one = np.ones((), np.float32)
    assert QuantizedWeight(levels, one, np.asarray(128, np.uint8)).nonzero() == 4
    assert QuantizedWeight(levels, one, np.uint8([128, 7, 9]), 1).nonzero() == 2
    assert QuantizedWeight(levels, one, np.uint8([[7, 0], [128, 9]]), 1, 2).nonzero() == 2
    assert QuantizedWeight(levels, one, np.float32([[7.5], [9]])).nonzero() == 5


@pytest.mark.parametrize(
    ("shape", "axis", "block"),
    [((4,), 1, 0), ((2, 4), 1, 2), ((3, 3), 1, 3), ((5,), None, 0), ((5,), 2, 0), ((2, 1, 5), 1, 0)],
)
def test_parameters_of_another_shape_are_told(shape: tuple[int, ...], axis: int | None, block: int) -> None:
    """Of levels [2, 5]: neither one, nor by channel, nor by block."""
    weight = QuantizedWeight(np.zeros((2, 5), np.int8), np.ones(shape), np.zeros((), np.int8), axis, block)
    assert not weight.is_consistent


def test_biases_keep_32_bits() -> None:
    """A level beyond float32's 24 bits is exact before it is scaled down."""
    level = (1 << 30) + 64
    weight = QuantizedWeight(np.int32([level]), np.float64([2.0**-30]), np.zeros((), np.int32), 0, bits=32)
    assert weight.dequantize()[0] == np.float32(1 + 2.0**-24)
