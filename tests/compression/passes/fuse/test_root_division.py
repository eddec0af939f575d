"""Normalizations by a reciprocal root: RMSNorm as torch.export writes it, layer normalization as JAX does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

NODE = helper.make_node


def rms_norm(square: str = "Pow", swapped: bool = False) -> list[Any]:
    """x [n, s, 16] / root of its mean square * g."""
    return [
        NODE("Pow", ["x", "two"], ["q"]) if square == "Pow" else NODE("Mul", ["x", "x"], ["q"]),
        NODE("ReduceMean", ["q", "axes"], ["m"]),
        NODE("Add", ["m", "eps"], ["e"]),
        NODE("Sqrt", ["e"], ["r"]),
        NODE("Reciprocal", ["r"], ["i"]),
        NODE("Mul", ["i", "x"] if swapped else ["x", "i"], ["n"], name="normalize"),
        NODE("Mul", ["n", "g"], ["y"]),
    ]


WEIGHTS: dict[str, Any] = {
    "two": 2.0,
    "eps": 1e-5,
    "axes": np.array([-1], np.int64),
    "g": np.random.default_rng(3).standard_normal(16),
    "b": np.random.default_rng(4).standard_normal(16),
}


@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize("swapped", [False, True])
def test_rms_norm_divides(build: Any, fuse: Any, ops: Any, square: str, swapped: bool) -> None:
    """One node less, which keeps its name; the fixture compares the answers."""
    result = fuse(build(rms_norm(square, swapped), WEIGHTS, shape=("n", "s", 16), opset=18))
    assert "Reciprocal" not in ops(result)
    assert result.changes == {"root_division": 1}
    assert [node.name for node in result.model.nodes() if node.op_type == "Div"] == ["normalize"]


def test_onnxruntime_knows_it(build: Any, fuse: Any, loaded_operators: Any) -> None:
    """The whole is one node once onnxruntime has loaded it, and was not before."""
    model = build(rms_norm(), WEIGHTS, shape=("n", "s", 16), opset=18)
    assert "SimplifiedLayerNormalization" not in loaded_operators(model)
    assert loaded_operators(fuse(model).model) == ["SimplifiedLayerNormalization"]


def test_layer_normalization_comes_of_it(build: Any, fuse: Any, ops: Any) -> None:
    """With the mean taken away before, the division completes a LayerNormalization."""
    nodes = [
        NODE("ReduceMean", ["x", "axes"], ["mu"]),
        NODE("Sub", ["x", "mu"], ["d"]),
        NODE("Mul", ["d", "d"], ["q"]),
        NODE("ReduceMean", ["q", "axes"], ["m"]),
        NODE("Add", ["m", "eps"], ["e"]),
        NODE("Sqrt", ["e"], ["r"]),
        NODE("Reciprocal", ["r"], ["i"]),
        NODE("Mul", ["d", "i"], ["n"]),
        NODE("Mul", ["n", "g"], ["s"]),
        NODE("Add", ["s", "b"], ["y"]),
    ]
    assert ops(fuse(build(nodes, WEIGHTS, shape=("n", "s", 16), opset=18))) == ["LayerNormalization"]


@pytest.mark.parametrize("change", ["output", "other value", "no mean"])
def test_others_stay(build: Any, fuse: Any, ops: Any, change: str) -> None:
    """A reciprocal that is an output, one of another value's root, and one of no mean are left as they are."""
    nodes, output = rms_norm(), ("y", "i") if change == "output" else ("y",)
    if change == "other value":
        nodes[0] = NODE("Abs", ["x"], ["q"])
    elif change == "no mean":
        nodes[1] = NODE("ReduceMax", ["q", "axes"], ["m"])
    weights = WEIGHTS
    assert "Reciprocal" in ops(fuse(build(nodes, weights, shape=("n", "s", 16), opset=18, output=output)))
