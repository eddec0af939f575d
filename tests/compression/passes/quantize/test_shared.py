"""A weight is written once, whatever reads it: levels of a pyramid, branches, a table and its transpose."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

NODE = helper.make_node
SCHEMES = ("static", "dynamic", "weight_only", "float16")


def _matrix_bytes(model) -> int:  # type: ignore[no-untyped-def]
    """Bytes of all constants of more than one axis and of 1 KiB or more."""
    return sum(tensor.nbytes for tensor in model.tensors() if len(tensor.shape) > 1 and tensor.nbytes >= 1024)


def _weight(rng, *shape):  # type: ignore[no-untyped-def]
    return (rng.standard_normal(shape) * np.prod(shape[1:]) ** -0.5).astype(np.float32)


@pytest.fixture
def tied(build, rng):  # type: ignore[no-untyped-def]
    """`tied(head)`: an embedding of 300 words, a product, and a head that reads the embedding."""

    def make(head, extra=()):  # type: ignore[no-untyped-def]
        nodes = [NODE("Gather", ["table", "ids"], ["e"], "lookup"), NODE("MatMul", ["e", "w"], ["z"], "product"), *head]
        weights = {"table": _weight(rng, 300, 64), "w": _weight(rng, 64, 64), **dict(extra)}
        return build(nodes, weights, {"ids": ["n", "t"]}, types={"ids": TensorProto.INT64})

    return make


HEADS = {
    "transposed": (
        [NODE("Transpose", ["table"], ["turned"], "turn"), NODE("MatMul", ["z", "turned"], ["y"], "head")], ()),
    "renamed": (
        [
            NODE("Identity", ["table"], ["same"], "same"),
            NODE("Transpose", ["same"], ["turned"], "turn", perm=[1, 0]),
            NODE("MatMul", ["z", "turned"], ["y"], "head"),
        ],
        (),
    ),
    "gemm": (
        [NODE("Reshape", ["z", "rows"], ["flat"], "flat"), NODE("Gemm", ["flat", "table"], ["y"], "head", transB=1)],
        (("rows", np.array([-1, 64])),),
    ),
    "einsum": ([NODE("Einsum", ["z", "table"], ["y"], "head", equation="btd,vd->btv")], ()),
    "fused": (
        [NODE("FusedMatMul", ["z", "table"], ["y"], "head", domain="com.microsoft", transB=1, alpha=0.5)], ()),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_head(tied, quantize, sqnr, rng, head, scheme) -> None:  # type: ignore[no-untyped-def]
    """One table in fewer bits serves look-up and product; nothing of it is left in float32."""
    model = tied(*HEADS[head])
    words = {"ids": rng.integers(0, 300, (8, 6))}
    result = quantize(model, words, scheme=scheme)
    narrow = 2 if scheme == "float16" else 1
    assert _matrix_bytes(result.model) <= narrow * (300 * 64 + 64 * 64) + 4 * 300
    assert sqnr(model, result.model, words) > 30


@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only"])
def test_a_table_of_16_bits_and_its_transpose(build, quantize, sqnr, rng, scheme) -> None:  # type: ignore[no-untyped-def]
    """Both read what a Cast widens."""
    nodes = [
        NODE("Cast", ["narrow"], ["table"], "widen", to=TensorProto.FLOAT),
        NODE("Gather", ["table", "ids"], ["e"], "lookup"),
        NODE("Transpose", ["table"], ["turned"], "turn", perm=[1, 0]),
        NODE("MatMul", ["e", "turned"], ["y"], "head"),
    ]
    weights = {"narrow": _weight(rng, 300, 64).astype(np.float16)}
    model = build(nodes, weights, {"ids": ["n", "t"]}, types={"ids": TensorProto.INT64})
    words = {"ids": rng.integers(0, 300, (8, 6))}
    result = quantize(model, words, scheme=scheme)
    assert _matrix_bytes(result.model) <= 64 * 300 + 4 * 300
    assert sqnr(model, result.model, words) > 30


def test_a_table_of_16_bits_that_stays(build, quantize, rng) -> None:  # type: ignore[no-untyped-def]
    """What nobody may quantize is written in 16 bits again, once, for look-up and product."""
    nodes = [
        NODE("Cast", ["narrow"], ["table"], "widen", to=TensorProto.FLOAT),
        NODE("Gather", ["table", "ids"], ["e"], "lookup"),
        NODE("Transpose", ["table"], ["turned"], "turn", perm=[1, 0]),
        NODE("MatMul", ["e", "turned"], ["h"], "head"),
        NODE("MatMul", ["h", "w"], ["y"], "last"),
    ]
    weights = {"narrow": _weight(rng, 300, 64).astype(np.float16), "w": _weight(rng, 300, 64)}
    model = build(nodes, weights, {"ids": ["n", "t"]}, types={"ids": TensorProto.INT64})
    words = {"ids": rng.integers(0, 300, (8, 6))}
    result = quantize(model, words, scheme="static", exclude=("lookup", "head"))
    assert result.changes["MatMul"] == 1
    assert _matrix_bytes(result.model) <= 2 * 64 * 300 + 64 * 300


def test_a_table_that_is_stored_as_the_head(build, quantize, sqnr, rng) -> None:  # type: ignore[no-untyped-def]
    """The product reads W [64, 300], the look-up its transpose."""
    nodes = [
        NODE("Transpose", ["w"], ["table"], "turn", perm=[1, 0]),
        NODE("Gather", ["table", "ids"], ["e"], "lookup"),
        NODE("MatMul", ["e", "w"], ["y"], "head"),
    ]
    model = build(nodes, {"w": _weight(rng, 64, 300)}, {"ids": ["n", "t"]}, types={"ids": TensorProto.INT64})
    words = {"ids": rng.integers(0, 300, (8, 6))}
    for scheme in SCHEMES:
        result = quantize(model, words, scheme=scheme)
        assert _matrix_bytes(result.model) <= (2 if scheme == "float16" else 1) * 64 * 300 + 4 * 300
        assert sqnr(model, result.model, words) > 30


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_a_weight_that_is_summed_up_both_ways(build, quantize, sqnr, rng, scheme) -> None:  # type: ignore[no-untyped-def]
    """x W W^T has one scale, and levels of 64 at most, which cannot saturate either way."""
    nodes = [
        NODE("MatMul", ["x", "w"], ["h"], "encoder"),
        NODE("Transpose", ["w"], ["turned"], "turn", perm=[1, 0]),
        NODE("MatMul", ["h", "turned"], ["y"], "decoder"),
    ]
    model = build(nodes, {"w": _weight(rng, 96, 64)}, {"x": ["n", 96]})
    vectors = {"x": rng.standard_normal((16, 96)).astype(np.float32)}
    result = quantize(model, vectors, scheme=scheme)
    levels = [tensor.numpy() for tensor in result.model.tensors() if tensor.size == 96 * 64]
    assert [array.dtype for array in levels] == [np.int8]
    assert int(np.abs(levels[0].astype(np.int16)).max()) == 64
    assert sqnr(model, result.model, vectors) > 25


def test_a_head_over_levels(build, quantize, sqnr, rng) -> None:  # type: ignore[no-untyped-def]
    """Smoothing and biases that differ from level to level make no copies of the weights."""
    nodes, outputs = [], []
    for level in range(3):
        source = "x" if level == 0 else f"p{level}"
        if level:
            before = "x" if level == 1 else f"p{level - 1}"
            nodes.append(NODE("MaxPool", [before], [source], f"pool{level}", kernel_shape=[2, 2], strides=[2, 2]))
        nodes += [
            NODE("Conv", [source, "wa", "ba"], [f"a{level}"], f"first{level}", pads=[1] * 4),
            NODE("Relu", [f"a{level}"], [f"r{level}"], f"relu{level}"),
            NODE("Conv", [f"r{level}", "wb", "bb"], [f"b{level}"], f"second{level}", pads=[1] * 4),
            NODE("GlobalAveragePool", [f"b{level}"], [f"g{level}"], f"mean{level}"),
        ]
        outputs.append(f"g{level}")
    nodes.append(NODE("Concat", outputs, ["y"], "join", axis=1))
    weights = {"wa": _weight(rng, 32, 16, 3, 3), "ba": _weight(rng, 32), "wb": _weight(rng, 32, 32, 3, 3)}
    model = build(nodes, {**weights, "bb": _weight(rng, 32)}, {"x": ["n", 16, 16, 16]})
    images = {"x": rng.standard_normal((16, 16, 16, 16)).astype(np.float32)}
    result = quantize(model, images, scheme="static")
    assert result.changes["Conv"] == 6
    assert _matrix_bytes(result.model) == 32 * 16 * 9 + 32 * 32 * 9
    assert sqnr(model, result.model, images) > 25


@pytest.mark.parametrize("scheme", ["dynamic", "weight_only"])
def test_branches_share_what_lies_outside(build, quantize, rng, scheme, outputs_of) -> None:  # type: ignore[no-untyped-def]
    """Both branches of an If read one weight of the main graph; it stays there, once."""

    def branch(name: str, op_type: str) -> onnx.GraphProto:
        nodes = [
            NODE("MatMul", ["x", "w"], [f"{name}_h"], f"{name}_product"),
            NODE(op_type, [f"{name}_h"], [name], name),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])

    branches = {"then_branch": branch("left", "Relu"), "else_branch": branch("right", "Neg")}
    nodes = [
        NODE("ReduceSum", ["x"], ["sum"], "sum", keepdims=0),
        NODE("Greater", ["sum", "zero"], ["positive"], "positive"),
        NODE("If", ["positive"], ["y"], "if", **branches),
    ]
    model = build(nodes, {"w": _weight(rng, 64, 96), "zero": np.float32(0)}, {"x": ["n", 64]})
    x = rng.standard_normal((4, 64)).astype(np.float32)
    result = quantize(model, {"x": x}, scheme=scheme)
    assert _matrix_bytes(result.model) <= 64 * 96
    for sign in (1, -1):
        feed = sign * np.abs(x)
        expected, got = outputs_of(model, feed), outputs_of(result.model, feed)
        assert np.abs(got - expected).max() < 0.03 * np.abs(expected).max()


def test_weights_behind_nodes(build, quantize, sqnr, rng) -> None:  # type: ignore[no-untyped-def]
    """A weight that is cast, reshaped or transposed at run time is a weight; one that stays keeps its 16 bits."""
    weights = {
        "a": _weight(rng, 64, 64).astype(np.float16),
        "b": _weight(rng, 64 * 64),
        "shape": np.array([64, 64]),
        "c": _weight(rng, 96, 64),
        "d": _weight(rng, 64, 64).astype(np.float16),
    }
    nodes = [
        NODE("Cast", ["a"], ["wa"], "cast", to=TensorProto.FLOAT),
        NODE("Reshape", ["b", "shape"], ["wb"], "shape"),
        NODE("Transpose", ["c"], ["wc"], "turn", perm=[1, 0]),
        NODE("Cast", ["d"], ["wd"], "kept_cast", to=TensorProto.FLOAT),
        NODE("MatMul", ["x", "wd"], ["kept"], "kept"),
        NODE("MatMul", ["kept", "wa"], ["h"], "first"),
        NODE("MatMul", ["h", "wb"], ["i"], "second"),
        NODE("MatMul", ["i", "wc"], ["y"], "third"),
    ]
    model = build(nodes, weights, {"x": ["n", 64]})
    vectors = {"x": rng.standard_normal((8, 64)).astype(np.float32)}
    result = quantize(model, vectors, scheme="dynamic", exclude=("kept",))
    assert result.changes == {"MatMul": 3}
    assert _matrix_bytes(result.model) == 64 * 64 * 2 + 64 * 96 + 2 * 64 * 64
    assert sqnr(model, result.model, vectors) > 30


def test_the_rest_of_a_quantized_model(build, quantize, operators, rng) -> None:  # type: ignore[no-untyped-def]
    """What another tool left in float32 is quantized; what it wrote stays."""
    weight, other = _weight(rng, 64, 64), _weight(rng, 64, 64)
    nodes = [
        NODE("DequantizeLinear", ["q", "scale"], ["w"], "given"),
        NODE("MatMul", ["x", "w"], ["h"], "first"),
        NODE("MatMul", ["h", "other"], ["y"], "second"),
    ]
    scale = np.float32(np.abs(weight).max() / 127)
    levels = np.rint(weight / scale).astype(np.int8)
    model = build(nodes, {"q": levels, "scale": scale, "other": other}, {"x": ["n", 64]})
    vectors = {"x": rng.standard_normal((8, 64)).astype(np.float32)}
    result = quantize(model, vectors, scheme="dynamic")
    assert result.changes == {"MatMul": 1}
    assert "DequantizeLinear" in operators(result.model)
    again = quantize(result.model, vectors, scheme="dynamic")
    assert not again.changed
    assert "quantized already" in again.skipped[0].reason
