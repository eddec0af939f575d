"""Residual streams that can be rotated: found, exact, and left alone with the reason where something is in the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelpress_compression.graph.shapes import infer_shapes
from modelpress_compression.model import Model, Provenance
from modelpress_compression.passes.quantize.scaling.rotation import Rotation, rotate
from modelpress_compression.passes.quantize.scaling.streams import find_streams
from modelpress_compression.runtime import run, session_of
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

NODE = helper.make_node
NORMALIZATIONS = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "layer", "rms", "rms_mul")


class Net:
    """A network being written: nodes and weights, under names of its own."""

    def __init__(self, seed: int, channels: int) -> None:
        self.rng, self.channels = np.random.default_rng(seed), channels
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, NDArray[Any]] = {}

    def weight(self, *shape: int, spread: float = 0.0) -> str:
        """Normal numbers, or gains around 1 whose logarithms spread."""
        name = f"w{len(self.weights)}"
        numbers = np.exp(self.rng.normal(0, spread, shape)) if spread else self.rng.normal(0, 1, shape)
        self.weights[name] = (numbers if spread else numbers / np.sqrt(shape[0])).astype(np.float32)
        return name

    def constant(self, array: Any) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = np.asarray(array)
        return name

    def node(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(NODE(op_type, list(inputs), [name], f"{op_type}_{len(self.nodes)}", **attributes))
        return name

    def product(self, value: str, rows: int, columns: int, bias: bool = True) -> str:
        found = self.node("MatMul", value, self.weight(rows, columns))
        return self.node("Add", self.weight(columns), found) if bias else found

    def normalized(self, kind: str, x: str) -> str:
        """x [..., K], with gains and, for layer normalizations, a bias."""
        gain, bias = self.weight(self.channels, spread=0.5), self.weight(self.channels)
        if kind[0].isupper():
            inputs = [x, gain, bias] if kind == "LayerNormalization" else [x, gain]
            return self.node(kind, *inputs, axis=-1, epsilon=1e-5)
        if kind == "layer":
            x = self.node("Sub", x, self.node("ReduceMean", x, self.constant(np.asarray([-1])), keepdims=1))
        two = self.constant(np.float32(2))
        squares = self.node("Mul", x, x) if kind == "rms_mul" else self.node("Pow", x, two)
        mean = self.node("ReduceMean", squares, self.constant(np.asarray([-1])), keepdims=1)
        root = self.node("Sqrt", self.node("Add", mean, self.constant(np.float32(1e-5))))
        normal = self.node("Mul", x, self.node("Reciprocal", root)) if kind == "rms" else self.node("Div", x, root)
        scaled = self.node("Mul", gain, normal) if kind == "rms" else self.node("Mul", normal, gain)
        return self.node("Add", scaled, bias) if kind == "layer" else scaled

    def model(self, output: str, *, tokens: bool = False) -> Model:
        """x -> y, x [n, 5] of integers below 11, or [n, 5, 6] of floats."""
        self.nodes.append(NODE("Identity", [output], ["y"], "end"))
        given_as = (TensorProto.INT64, ["n", 5]) if tokens else (TensorProto.FLOAT, ["n", 5, 6])
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info("x", *given_as)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        ir = onnx_ir.from_proto(proto)
        infer_shapes(ir)
        return Model(ir, Provenance("onnx", "0" * 64, 0))


def answers(model: Model) -> NDArray[np.float32]:
    rng = np.random.default_rng(1)
    floats = model.inputs[0].dtype == "float32"
    x = rng.normal(0, 1, (3, 5, 6)).astype(np.float32) if floats else rng.integers(0, 11, (3, 5))
    with session_of(model, optimize=False) as session:
        return np.asarray(run(session, {"x": x})["y"], np.float32)


def check_rotated(model: Model, count: int = 1) -> Model:
    """So many streams are found; rotated, all their weights are others, no node is added, and the answers stay."""
    work = model.clone()
    streams, blocked = find_streams(work)
    assert (len(streams), blocked) == (count, {})
    rotate(work, streams)
    assert [node.op_type for node in work.graph] == [node.op_type for node in model.graph]
    before, after = answers(model), answers(work)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4 * float(np.abs(before).max()))
    return work


def residual_net(seed: int, channels: int, kind: str, *, tokens: bool, bias: bool, scaled: bool) -> Model:
    """Two blocks, each norm -> product -> Relu -> product (-> gain) -> sum, then norm -> head."""
    net = Net(seed, channels)
    if tokens:
        x = net.node("Add", net.node("Gather", net.weight(11, channels), "x"), net.weight(1, 5, channels))
    else:
        x = net.product("x", 6, channels, bias)
    for _ in range(2):
        inner = net.node("Relu", net.product(net.normalized(kind, x), channels, 10, bias))
        branch = net.product(inner, 10, channels, bias)
        if scaled:
            branch = net.node("Mul", branch, net.weight(channels, spread=1.0))
        x = net.node("Add", x, branch)
    return net.model(net.product(net.normalized(kind, x), channels, 4, bias), tokens=tokens)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    channels=st.sampled_from([2, 7, 12, 16, 24]),
    kind=st.sampled_from(NORMALIZATIONS),
    tokens=st.booleans(),
    bias=st.booleans(),
    scaled=st.booleans(),
)
def test_answers_stay(seed: int, channels: int, kind: str, tokens: bool, bias: bool, scaled: bool) -> None:
    """Whatever the normalization, its form and gains, with biases and gains of branches or without, from tables or
    products: equal within 1e-4."""
    check_rotated(residual_net(seed, channels, kind, tokens=tokens, bias=bias, scaled=scaled))


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 12, 40, 128, 384])
def test_rotations_keep_lengths_and_means(channels: int) -> None:
    """Q Q^T = 1 and 1^T Q = 1^T within 1e-9; the same seed gives the same Q, another one another; and from 8 channels
    on no channel keeps more than 0.75 of itself in one place."""
    matrix = Rotation(channels, 3).of(np.eye(channels))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(channels), atol=1e-9)
    np.testing.assert_allclose(matrix.sum(axis=0), 1, atol=1e-9)
    np.testing.assert_array_equal(Rotation(channels, 3).of(np.eye(channels)), matrix)
    if channels >= 8:
        assert not np.allclose(Rotation(channels, 4).of(np.eye(channels)), matrix)
        assert np.abs(matrix).max() < 0.75


def attention_net(kind: str, *, tied: bool = False) -> Model:
    """Tokens, one block of attention with 4 heads of 4 by reshapes and transposes, the first token's answer, a head;
    `tied`: the head is the table's transpose, and has no gains before it."""
    net = Net(5, 16)
    table = net.weight(11, 16)
    x = net.node("Gather", table, "x")
    normal = net.normalized(kind, x)
    split, joined = net.constant(np.asarray([0, 0, 4, 4])), net.constant(np.asarray([0, 0, 16]))
    queries, keys, values = (
        net.node("Transpose", net.node("Reshape", net.product(normal, 16, 16), split), perm=[0, 2, 1, 3])
        for _ in range(3)
    )
    scores = net.node("MatMul", queries, net.node("Transpose", keys, perm=[0, 1, 3, 2]))
    mixed = net.node("MatMul", net.node("Softmax", scores), values)
    heads = net.node("Reshape", net.node("Transpose", mixed, perm=[0, 2, 1, 3]), joined)
    x = net.node("Add", x, net.product(heads, 16, 16))
    first = net.node("Gather", x, net.constant(np.asarray(0)), axis=1)
    if tied:
        normal = net.node("SimplifiedLayerNormalization", first, net.constant(np.ones(16, np.float32)), axis=-1)
        return net.model(net.node("MatMul", normal, net.node("Transpose", table)), tokens=True)
    return net.model(net.product(net.normalized(kind, first), 16, 3), tokens=True)


@pytest.mark.parametrize("kind", ["LayerNormalization", "rms"])
def test_attention_is_read_and_written_through_its_products(kind: str) -> None:
    """Query, key and value read the stream, the output product writes it; a token is picked from it."""
    model = attention_net(kind)
    work = check_rotated(model)
    weights = model.graph.initializers
    changed = [
        name for name, value in work.graph.initializers.items() if value.const_value is not weights[name].const_value
    ]
    bias, gains = (2, 2) if kind == "LayerNormalization" else (0, 2)
    assert len(changed) == 1 + 3 + 2 + 1 + bias + gains  # table; query, key, value; output product with bias; head


def test_images_are_written_by_their_patches() -> None:
    """Conv over patches, Reshape, Transpose, a constant token before them, positions: the channels are followed from
    axis to axis."""
    net = Net(6, 16)
    image = net.node("Reshape", "x", net.constant(np.asarray([-1, 1, 5, 6])))
    patches = net.node("Conv", image, net.weight(16, 1, 2, 2), net.weight(16), strides=[1, 2])
    rows = net.node("Transpose", net.node("Reshape", patches, net.constant(np.asarray([0, 16, -1]))), perm=[0, 2, 1])
    sizes = net.node("Shape", rows, start=0, end=1)
    one = net.node("Concat", sizes, net.constant(np.asarray([1, 16])), axis=0)
    token = net.node("Expand", net.weight(1, 1, 16), one)
    x = net.node("Add", net.node("Concat", token, rows, axis=1), net.weight(1, 13, 16))
    mean = net.node("ReduceMean", net.normalized("LayerNormalization", x), net.constant(np.asarray([1])), keepdims=0)
    check_rotated(net.model(net.product(mean, 16, 3)))


def blocked_by(model: Model) -> str:
    work = model.clone()
    streams, blocked = find_streams(work)
    assert not streams
    return " ".join(blocked.values())


def test_what_is_in_the_way_is_named() -> None:
    """A gain before a sum, an output, an activation function on the stream, a weight with another user, and gains of
    nearly 0: nothing is found, and the reason names the node."""
    net = Net(1, 12)
    after = net.normalized("LayerNormalization", net.product("x", 6, 12))
    end = net.node("Add", after, net.product(net.node("Relu", net.product(after, 12, 8)), 8, 12))
    model = net.model(net.product(net.normalized("LayerNormalization", end), 12, 4))
    assert "gains lie before it that no product takes in" in blocked_by(model)
    net = Net(1, 12)
    assert "is an output of the model" in blocked_by(net.model(net.normalized("rms", net.product("x", 6, 12))))
    net = Net(1, 12)
    x = net.node("Relu", net.product("x", 6, 12))
    assert "at Relu 'Relu_2': it is no part" in blocked_by(net.model(net.product(net.normalized("rms", x), 12, 4)))
    assert "its weight is shared with other nodes" in blocked_by(attention_net("rms", tied=True))
    net = Net(1, 12)
    normal = net.normalized("LayerNormalization", net.product("x", 6, 12))
    next(array for array in net.weights.values() if array.shape == (12,) and array.min() > 0)[3] = 0
    assert "some of its gains are nearly 0" in blocked_by(net.model(net.product(normal, 12, 4)))


def test_models_without_normalizations_have_no_streams() -> None:
    """Nothing is found, and no shapes are asked for."""
    net = Net(1, 12)
    assert find_streams(net.model(net.product(net.product("x", 6, 12), 12, 4))) == ([], {})
