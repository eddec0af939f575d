"""Layers as matrix products, against onnxruntime: rows times matrix are the answers."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelpress_compression.graph import linear
from modelpress_compression.graph.linear import Convolution, Linear, drawn, linear_of, parts_along, pieces
from onnx import helper

RTOL, ATOL = 1e-4, 1e-4  # float32 in onnxruntime, float64 here


def check(model: Any, x: Any, y: Any, bias: Any = 0.0) -> None:
    """A random half of the rows of X W + b equals the same rows of y; the matrix comes back as the weight."""
    node = next(iter(model.graph))
    linear = linear_of(node)
    assert isinstance(linear, str) is False, linear
    total = math.prod(linear.extents(x.shape))
    assert total == y.size // y.shape[linear.channel_axis]
    places = np.random.default_rng(0).permutation(total)[: (total + 1) // 2]
    weight = node.inputs[1].const_value.numpy()
    matrix = linear.matrix(weight)
    answers = linear.answers(y, places)
    split = np.reshape(bias, (matrix.shape[0], 1, -1)) if np.ndim(bias) else bias
    np.testing.assert_allclose(linear.inputs(x, places) @ matrix + split, answers, rtol=RTOL, atol=ATOL)
    np.testing.assert_array_equal(linear.weight(matrix, weight.shape), weight)
    assert answers.shape[0] * answers.shape[2] == y.shape[linear.channel_axis]


@given(data=st.data())
@settings(max_examples=40)
def test_convolutions(data: Any, channel_model: Any, outputs_of: Any) -> None:
    """1 to 3 dimensions, groups, strides, dilations, explicit and automatic padding."""
    axes = data.draw(st.integers(1, 3))
    groups = data.draw(st.sampled_from([1, 2]))
    kernel = data.draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    strides = data.draw(st.lists(st.integers(1, 2), min_size=axes, max_size=axes))
    attributes: dict[str, Any] = {"group": groups, "strides": strides}
    padding = data.draw(st.sampled_from(["pads", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if padding == "pads":
        attributes["pads"] = data.draw(st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes))
        attributes["dilations"] = data.draw(st.lists(st.integers(1, 2), min_size=axes, max_size=axes))
    else:
        attributes["auto_pad"] = padding
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((6, 4 // groups, *kernel)), "b": rng.standard_normal(6)}
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)
    model = channel_model([node], weights, ["n", 4, *[7] * axes], ["n", 6, *[None] * axes])
    x = rng.standard_normal((2, 4, *[7] * axes)).astype(np.float32)
    check(model, x, outputs_of(model, x), weights["b"])


def test_large_activations_are_neither_copied_nor_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows, of all channels and of some, whether the activation is turned or read in its place; and in its
    place without a copy of it: 100 of 65,536 patches take less than a tenth of the 32 MiB that they come from."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal((1, 128, 256, 256)).astype(np.float32)
    convolution = Convolution(2, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    places, kept = drawn(256 * 256, 100, 0), np.arange(128) % 4 < 2
    tracemalloc.start()
    rows, some = convolution.inputs(data, places), convolution.inputs(data, places, kept)
    answers = convolution.answers(data, places, kept)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < data.nbytes / 10
    monkeypatch.setattr(linear, "_TURNED_BYTES", data.nbytes)
    np.testing.assert_array_equal(rows, convolution.inputs(data, places))
    np.testing.assert_array_equal(some, convolution.inputs(data[:, kept], places))
    np.testing.assert_array_equal(answers, convolution.answers(data[:, kept], places))


@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=4), axis=st.integers(0, 3), limit=st.integers(1, 400))
def test_parts_are_all_of_an_activation(shape: list[int], axis: int, limit: int) -> None:
    """Sums over the parts are those over the whole; a part takes about the limit, or has one index of its axis."""
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    axis %= len(shape)
    parts = list(parts_along(values, axis, limit))
    assert sum(part.sum() for part in parts) == values.sum()
    assert all(part.shape[axis] == shape[axis] for part in parts)
    assert all(part.nbytes <= limit or 1 in part.shape or len(shape) == 1 for part in parts)
    assert sum(part.size for part in parts) == values.size


def test_pieces_bound_the_rows() -> None:
    """All places in their order, each piece within the limit; one row at least, however long it is."""
    places = np.arange(10)
    assert [part.tolist() for part in pieces(places, 3, 4 * 3 * 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [len(part) for part in pieces(places, 1000, 16)] == [1] * 10


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(transposed: int, channel_model: Any, outputs_of: Any) -> None:
    """With the weight either way round."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((3, 5) if transposed else (5, 3)), "b": rng.standard_normal(3)}
    model = channel_model(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=transposed)], weights, ["n", 5], ["n", 3]
    )
    x = rng.standard_normal((6, 5)).astype(np.float32)
    check(model, x, outputs_of(model, x), weights["b"])


def test_matmul_of_sequences(channel_model: Any, outputs_of: Any) -> None:
    """Every position of every sequence is a row."""
    rng = np.random.default_rng(0)
    model = channel_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": rng.standard_normal((5, 3))}, ["n", 4, 5], ["n", 4, 3]
    )
    x = rng.standard_normal((2, 4, 5)).astype(np.float32)
    check(model, x, outputs_of(model, x))


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        (helper.make_node("ConvTranspose", ["x", "w"], ["y"]), (4, 4, 3, 3)),
        (helper.make_node("Gemm", ["x", "w"], ["y"], alpha=0.5), (4, 4)),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transA=1), (4, 4)),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (2, 4, 4)),
    ],
)
def test_says_why_not(node: Any, shape: tuple[int, ...], channel_model: Any) -> None:
    """What is no plain product is refused in words."""
    model = channel_model([node], {"w": np.ones(shape)}, None, None)
    reason: Linear | str = linear_of(next(iter(model.graph)))
    assert isinstance(reason, str)
    assert reason
