"""Blocks of 4 and 8 bits: their ranges and errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelpress_compression.passes.quantize.weight_only.blocks import quantize_blocks

SIZES = [16, 32, 64, 128, 256]


@given(data=st.data(), bits=st.sampled_from([4, 8]), size=st.sampled_from(SIZES))
@settings(max_examples=60)
def test_no_weight_is_off_by_more_than_half_a_step(data: st.DataObject, bits: int, size: int) -> None:
    """8 bits: within half a scale everywhere. 4 bits: the block's error is at most that of its whole range, uncut."""
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 300))
    seed = data.draw(st.integers(0, 1000))
    weight = np.random.default_rng(seed).standard_t(3, (rows, columns)).astype(np.float32)
    blocks = quantize_blocks(weight, bits, size)
    assert blocks.levels.shape == weight.shape
    assert blocks.scale.shape == blocks.zero_point.shape == (rows, -(-columns // size))
    difference = np.abs(blocks.dequantize() - weight)
    if bits == 8:
        assert (difference <= blocks.spread(blocks.scale) * 0.5001).all()
        return
    for start in range(0, columns, size):
        part = weight[:, start : start + size]
        step = (np.maximum(part.max(1), 0) - np.minimum(part.min(1), 0)) / 15
        # Half a step for rounding, and as much again for the zero point's own rounding.
        bound = np.sqrt(part.shape[1]) * step + 1e-6
        assert (np.sqrt(np.square(difference[:, start : start + size]).sum(axis=1)) <= bound).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_and_constants(bits: int) -> None:
    """Blocks of zeros stay exactly zero; of one value, of either sign or tiny, they keep it to a step of the range."""
    weight = np.zeros((6, 40), np.float32)
    weight[1], weight[2], weight[3], weight[4] = 3, -3, 1e-20, -1e20
    back = quantize_blocks(weight, bits, 16).dequantize()
    np.testing.assert_array_equal(back[[0, 5]], 0)
    np.testing.assert_allclose(back[1:5], weight[1:5], rtol=1e-5)


def test_the_cut_lessens_the_error(rng) -> None:  # type: ignore[no-untyped-def]
    """Of heavy-tailed weights 4 bits lose a twentieth less, or better, than by the whole range of each block."""
    weight = rng.standard_t(4, (64, 512)).astype(np.float32)
    parts = weight.reshape(64, -1, 128)
    low, high = np.minimum(parts.min(2, keepdims=True), 0), np.maximum(parts.max(2, keepdims=True), 0)
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    plain = (np.clip(np.rint(parts / scale) + zero, 0, 15) - zero) * scale
    ours = quantize_blocks(weight, 4, 128).dequantize()
    assert np.square(ours - weight).sum() < 0.95 * np.square(plain - parts).sum()
