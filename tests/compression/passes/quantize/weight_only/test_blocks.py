"""Blocks of 4 and 8 bits: packing, ranges, and what onnxruntime makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from modelpress_compression.passes.quantize.weight_only.blocks import Blocks, along_rows, pack, quantize_blocks, unpack
from modelpress_compression.runtime import run, session_of
from onnx import helper

SIZES = [16, 32, 64, 128, 256]


def operands(blocks: Blocks) -> dict[str, np.ndarray]:
    """What MatMulNBits reads."""
    found = {"b": blocks.by_block(), "s": blocks.scale}
    return {**found, "z": blocks.packed_zero_points()} if blocks.has_zero_points else found


@given(
    levels=arrays.arrays(
        np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=70), elements=st.integers(0, 15)
    )
)
def test_unpacking_undoes_packing(levels: np.ndarray) -> None:
    """Any matrix of 4-bit levels comes back, an odd number of columns too; two levels share a byte."""
    packed = pack(levels, 4)
    assert packed.shape == (levels.shape[0], (levels.shape[1] + 1) // 2)
    np.testing.assert_array_equal(unpack(packed, 4, levels.shape[1]), levels)
    np.testing.assert_array_equal(unpack(pack(levels, 8), 8, levels.shape[1]), levels)


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
        assert (difference <= along_rows(blocks.scale, size, columns) * 0.5001).all()
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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [256, 33, 300, 17])
@pytest.mark.parametrize("size", [16, 32, 128])
def test_onnxruntime_reads_them_alike(build, rng, bits: int, columns: int, size: int) -> None:  # type: ignore[no-untyped-def]
    """MatMulNBits in float32 arithmetic equals the product with the dequantized matrix (rtol 1e-4), odd K included."""
    weight = rng.normal(0, 0.1, (24, columns)).astype(np.float32)
    blocks = quantize_blocks(weight, bits, size)
    found = operands(blocks)
    node = helper.make_node(
        "MatMulNBits", ["x", *found], ["y"], domain="com.microsoft", K=columns, N=24, bits=bits, block_size=size
    )
    model = build([node], found, {"x": ["n", columns]})
    x = rng.normal(0, 1, (7, columns)).astype(np.float32)
    with session_of(model) as session:
        y = run(session, {"x": x})["y"]
    np.testing.assert_allclose(y, x @ blocks.dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_gathers_them_alike(build, rng, bits: int) -> None:  # type: ignore[no-untyped-def]
    """GatherBlockQuantized gives the rows of the dequantized matrix (rtol 1e-6), also by negative indices."""
    blocks = quantize_blocks(rng.normal(0, 0.1, (50, 70)).astype(np.float32), bits, 32)
    found = {"b": blocks.by_row(), "s": blocks.scale}
    if blocks.has_zero_points:
        found["z"] = blocks.packed_zero_points()
    node = helper.make_node(
        "GatherBlockQuantized", ["b", "x", *list(found)[1:]], ["y"], domain="com.microsoft", bits=bits, block_size=32,
        gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    model = build([node], found, {"x": ["n"]}, types={"x": 7})
    index = np.asarray([0, 49, -1, 7])
    with session_of(model) as session:
        y = run(session, {"x": index})["y"]
    np.testing.assert_allclose(y, blocks.dequantize()[index], rtol=1e-6, atol=1e-7)
