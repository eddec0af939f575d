"""Bounds of 8-bit products against brute force, and weights that keep within them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from modelpress_compression.encodings.weight import QuantizedWeight
from modelpress_compression.graph.edit import Editor
from modelpress_compression.model import Model, Provenance
from modelpress_compression.passes.integers.products import Summation, of_node
from modelpress_compression.passes.integers.saturation import bounds, least_squares_scale, within_limit
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.rounding.affine import quantize_weight
from modelpress_compression.passes.quantize.rounding.balance import balanced
from modelpress_compression.passes.quantize.weights import WeightStore
from modelpress_compression.target import Target
from numpy.typing import NDArray

SHAPES = arrays.array_shapes(min_dims=2, max_dims=2, max_side=5)
LEVELS = arrays.arrays(np.int8, SHAPES, elements=st.integers(-127, 127))
ROWS = Summation((1,), 0)


def saturating_product(x: NDArray[np.generic], rows: NDArray[np.int8]) -> NDArray[np.int64]:
    """PMADDUBSW, PMADDWD and 32-bit sums: [samples, terms] of bytes by [outputs, terms]."""
    odd = rows.shape[1] % 2
    x, rows = np.pad(x, ((0, 0), (0, odd))).astype(np.int64), np.pad(rows, ((0, 0), (0, odd))).astype(np.int64)
    products = (x[:, None] * rows[None]).reshape(len(x), len(rows), -1, 2)
    return np.asarray(np.clip(products.sum(axis=3), -32768, 32767).sum(axis=2))


def store(cpu: str, *, per_channel: bool = True) -> WeightStore:
    """One for an empty model."""
    ir = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], opset_imports={"": 17}), ir_version=9)
    config = QuantizeConfig(scheme="static", per_channel=per_channel)
    return WeightStore(Editor(Model(ir, Provenance("onnx", "0" * 64, 0))), config, target=Target(cpu=cpu))


@given(LEVELS)
@settings(max_examples=100)
def test_bounds_are_those_of_all_extreme_activations(levels: NDArray[np.int8]) -> None:
    """Over every choice of 0 and 255, the largest pair and the smallest are the bounds; and no 32-bit sum is larger."""
    terms = levels.shape[1]
    x = np.asarray(list(itertools.product((0, 255), repeat=terms)), np.int64)
    odd = terms % 2
    products = x[:, None] * levels[None].astype(np.int64)
    pairs = np.pad(products, ((0, 0), (0, 0), (0, odd))).reshape(len(x), len(levels), -1, 2).sum(axis=3)
    found = bounds(levels, ROWS)
    np.testing.assert_array_equal(found.high[:, 0], np.maximum(pairs.max(axis=(0, 2)), 0))
    np.testing.assert_array_equal(found.low[:, 0], np.minimum(pairs.min(axis=(0, 2)), 0))
    assert (np.abs(products.sum(axis=2)).max(axis=0) <= found.total[:, 0]).all()


@given(LEVELS)
@settings(max_examples=100)
def test_what_is_not_certified_does_saturate(levels: NDArray[np.int8]) -> None:
    """The proof is sharp: a row saturates for some activations if and only if the bounds say so."""
    x = np.asarray(list(itertools.product((0, 255), repeat=levels.shape[1])), np.int64)
    differs = (saturating_product(x, levels) != x @ levels.T.astype(np.int64)).any(axis=0)
    np.testing.assert_array_equal(differs, bounds(levels, ROWS).saturates[:, 0])


@pytest.mark.parametrize(
    ("shape", "summation"),
    [
        ((4, 3, 5, 5), Summation((2, 3, 1), 0)),
        ((4, 3, 5, 5), Summation((2, 3, 1))),
        ((7, 6), Summation((0,), 1)),
        ((2, 9, 4), Summation((1,))),
        ((2, 8, 5), Summation((2,), 0)),
    ],
)
def test_pairs_can_be_put_back(shape: tuple[int, ...], summation: Summation) -> None:
    """Whatever the order of the axes, nothing is lost, and chunks cover the weight once."""
    weight = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(summation.restore(summation.pairs(weight), shape), weight)
    seen = np.zeros(shape, int)
    for _, index in summation.chunks(shape):
        seen[index] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("first", "second", "channels", "paired"),
    [
        ((0, 0, 0), (1, 0, 0), 4, True),  # channels 0 and 1 at one position
        ((1, 0, 0), (2, 0, 0), 4, False),  # halves of different pairs
        ((0, 0, 0), (0, 0, 1), 4, False),  # an even number of channels: positions never meet
        ((2, 0, 0), (0, 0, 1), 3, True),  # an odd one: the last channel meets the first of the next position
        ((0, 0, 0), (1, 0, 0), 3, True),
    ],
)
def test_convolutions_pair_channels_first(
    first: tuple[int, int, int], second: tuple[int, int, int], channels: int, paired: bool
) -> None:
    """Two large weights saturate where the kernel adds their products before anything else."""
    levels = np.zeros((1, channels, 3, 3), np.int8)
    levels[(0, *first)] = levels[(0, *second)] = 100
    node = onnx_ir.node("Conv", [onnx_ir.Value(name="x"), onnx_ir.Value(name="w")])
    assert bool(bounds(levels, of_node(node, levels.shape, 0)).saturates.any()) is paired


def test_depthwise_convolutions_have_no_pairs() -> None:
    """Their kernels add single products; with two outputs a channel they are ordinary products again."""
    inputs = [onnx_ir.Value(name="x"), onnx_ir.Value(name="w")]
    node = onnx_ir.node("Conv", inputs, {"group": 8})
    assert not of_node(node, (8, 1, 3, 3), 0).paired
    assert of_node(node, (16, 1, 3, 3), 0).paired


@given(
    st.integers(0, 10_000),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from(["normal", "uniform", "outliers", "ones"]),
)
@settings(max_examples=100)
def test_generic_weights_never_saturate(seed: int, terms: int, per_channel: bool, kind: str) -> None:
    """Whatever the weights; a column that is safe keeps its scale, and vnni changes no scale at all."""
    rng = np.random.default_rng(seed)
    weight = {
        "normal": rng.normal(0, 1, (terms, 6)),
        "uniform": rng.uniform(0.5, 1, (terms, 6)),
        "outliers": rng.standard_t(2, (terms, 6)),
        "ones": np.ones((terms, 6)),
    }[kind].astype(np.float32)
    summation = Summation((0,), 1 if per_channel else None)
    plain = quantize_weight(weight, summation.axis, "int8")
    generic = store("generic", per_channel=per_channel).quantize(weight, summation)
    assert not bounds(generic.levels.astype(np.int8), summation).saturates.any()
    assert not np.abs(generic.levels.astype(int)).max() > 127
    unsafe = bounds(plain.levels.astype(np.int8), summation).saturates.any(axis=1)
    assert generic.reduced == unsafe.sum()
    np.testing.assert_array_equal(np.atleast_1d(generic.scale)[~unsafe], np.atleast_1d(plain.scale)[~unsafe])
    vnni = store("vnni", per_channel=per_channel).quantize(weight, summation)
    np.testing.assert_array_equal(vnni.scale, plain.scale)
    assert vnni.reduced == 0


def _error(quantized: QuantizedWeight, weight: NDArray[np.float32]) -> float:
    return float(np.square(quantized.dequantize() - weight, dtype=np.float64).sum())


@pytest.mark.parametrize("terms", [16, 576, 20_000])
def test_the_scale_beats_scaling_alone_and_moving_alone(terms: int) -> None:
    """Over 32 channels its squared error is below that of moving pairs at the old scale, of half the range, and of any
    factor in between that is the same for all channels."""
    weight = np.random.default_rng(terms).normal(0, 1, (32, terms)).astype(np.float32)
    plain = quantize_weight(weight, 0, "int8").scale.astype(np.float64)

    def error(scale: NDArray[np.float64]) -> float:
        found = quantize_weight(weight, 0, "int8", scale)
        levels = within_limit(found.levels.astype(np.int8), found.scale, weight, ROWS)
        return _error(replace(found, levels=levels), weight)

    chosen = error(least_squares_scale(weight, ROWS))
    grid = [error(plain * factor) for factor in np.linspace(1, 2, 30)]
    assert chosen < 1.001 * min(grid)
    assert chosen < 0.7 * grid[-1]
    assert chosen < 0.5 * grid[0]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("shape", [(64, 8, 3, 3), (64, 1, 3, 3), (64, 3, 5, 5)])
def test_errors_of_a_sum_cancel_out(dtype: str, shape: tuple[int, ...]) -> None:
    """The sum of errors is within half a level; the squared error grows by less than a third, a wide sum's by 3 %."""
    weight = np.random.default_rng(3).normal(0, 1, shape).astype(np.float32)
    summation = Summation((2, 3, 1), 0)
    plain = quantize_weight(weight, 0, dtype)
    even = balanced(plain, weight, summation)
    left = (even.dequantize() - weight).sum(axis=(1, 2, 3)) / even.scale
    assert float(np.abs(left).max()) < 0.501
    assert np.abs(even.levels.astype(int) - plain.levels.astype(int)).max() <= 1
    assert _error(even, weight) < (1.03 if shape[1] == 8 else 1.33) * _error(plain, weight)


def test_a_bias_still_has_its_room() -> None:
    """The scale that a bias asks for is kept where saturation would be content with less."""
    weight = np.full((2, 8), 1.0, np.float32)
    quantized = store("generic").quantize(weight, ROWS, np.asarray([0.5, 0.0]))
    assert quantized.scale[0] == pytest.approx(0.5)
    assert quantized.scale[1] == pytest.approx(2 / 128, rel=1e-3)
