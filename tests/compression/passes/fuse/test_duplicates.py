"""Equal nodes and equal weights are kept once."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper


def _value(name: str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def test_equal_chains_merge(build: Any, fuse: Any, ops: Any) -> None:
    """Exp, Mul twice over, with two copies of the same constant."""
    nodes = [
        helper.make_node("Exp", ["x"], ["a"]),
        helper.make_node("Exp", ["x"], ["b"]),
        helper.make_node("Mul", ["a", "k1"], ["c"]),
        helper.make_node("Mul", ["b", "k2"], ["d"]),
        helper.make_node("Add", ["c", "d"], ["y"]),
    ]
    result = fuse(build(nodes, {"k1": 2.0, "k2": 2.0}))
    assert ops(result) == ["Exp", "Mul", "Add"]
    assert result.changes == {"common_subexpression": 2}


def test_different_nodes_stay(build: Any, fuse: Any, ops: Any) -> None:
    """Other attributes, other constants, other types of constants."""
    nodes = [
        helper.make_node("LeakyRelu", ["x"], ["a"], alpha=0.1),
        helper.make_node("LeakyRelu", ["x"], ["b"], alpha=0.2),
        helper.make_node("Mul", ["a", "k1"], ["c"]),
        helper.make_node("Mul", ["a", "k2"], ["d"]),
        helper.make_node("Sum", ["b", "c", "d"], ["y"]),
    ]
    assert len(ops(fuse(build(nodes, {"k1": 2.0, "k2": [2.0]})))) == 5


def test_random_nodes_stay(build: Any, fuse: Any, ops: Any, rng: Any) -> None:
    """Two draws are two draws, even where they are multiplied by zero."""
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["a"], seed=1.0),
        helper.make_node("RandomNormalLike", ["x"], ["b"], seed=1.0),
        helper.make_node("Sub", ["a", "b"], ["c"]),
        helper.make_node("Mul", ["c", "zero"], ["d"]),
        helper.make_node("Add", ["x", "d"], ["y"]),
    ]
    assert ops(fuse(build(nodes, {"zero": 0.0}))).count("RandomNormalLike") == 2


def test_node_of_a_branch_takes_the_outer_one(build: Any, fuse: Any, ops: Any) -> None:
    """What the graph around an If computes need not be computed in its branch; branches do not share."""

    def branch(name: str) -> Any:
        nodes = [
            helper.make_node("Exp", ["x"], [f"{name}_e"]),
            helper.make_node("Tan", ["x"], [f"{name}_t"]),
            helper.make_node("Mul", [f"{name}_e", f"{name}_t"], [f"{name}_o"]),
        ]
        return helper.make_graph(nodes, name, [], [_value(f"{name}_o")])

    nodes = [
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("ReduceSum", ["e"], ["total"], keepdims=0),
        helper.make_node("Less", ["total", "zero"], ["negative"]),
        helper.make_node("If", ["negative"], ["y"], then_branch=branch("a"), else_branch=branch("b")),
    ]
    result = fuse(build(nodes, {"zero": 0.0}))
    assert ops(result).count("Exp") == 1
    assert ops(result).count("Tan") == 2


def test_equal_weights_merge(build: Any, fuse: Any, rng: Any) -> None:
    """Large ones once; small ones stay apart, so that layers are not tied together."""
    weight, bias = rng.standard_normal((64, 64)), rng.standard_normal(64)
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"]),
    ]
    model = build(nodes, {"w1": weight, "w2": weight.copy(), "b1": bias, "b2": bias.copy()}, shape=("n", 64))
    result = fuse(model)
    assert result.changes == {"duplicate_initializer": 1}
    assert result.model.weight_bytes() == model.weight_bytes() - 64 * 64 * 4


def test_weights_are_compared_by_bytes(build: Any, fuse: Any) -> None:
    """Weights that only look alike stay apart: -0.0 is not 0.0 in bytes."""
    zeros = np.zeros((32, 32), np.float32)
    nodes = [
        helper.make_node("Add", ["x", "a"], ["h"]),
        helper.make_node("Div", ["h", "b"], ["z"]),
        helper.make_node("Sigmoid", ["z"], ["y"]),
    ]
    result = fuse(build(nodes, {"a": zeros, "b": -zeros}, shape=("n", 32, 32)))
    assert "duplicate_initializer" not in result.changes


def test_statistics_that_onnxruntime_writes_over_stay_apart(build: Any, fuse: Any) -> None:
    """Under training_mode it puts new ones into the constants that hold the old ones."""
    ones = np.ones(512, np.float32)
    inputs = ["x", "scale", "bias", "mean", "variance"]
    nodes = [helper.make_node("BatchNormalization", inputs, ["y", "m", "v"], training_mode=1)]
    weights = {"scale": ones, "bias": 2 * ones, "mean": 0 * ones, "variance": ones}
    result = fuse(build(nodes, weights, shape=(3, 512)))
    assert "duplicate_initializer" not in result.changes
