"""Layer normalization and RMSNorm written out, and shapes around residual sums, which are not written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from modelpress_compression.passes.fuse.normalization import forget_residual_shapes
from onnx import helper

NODE = helper.make_node


def _nodes(square: str, opset: int, axis: int = -1) -> tuple[list[Any], dict[str, Any]]:
    rng = np.random.default_rng(3)
    weights: dict[str, Any] = {"two": 2.0, "eps": 1e-5, "g": rng.standard_normal(16), "b": rng.standard_normal(16)}
    if opset >= 18:
        weights["axes"] = np.array([axis], np.int64)

    def mean(source: str, target: str) -> Any:
        inputs, attributes = ([source, "axes"], {}) if opset >= 18 else ([source], {"axes": [axis]})
        return NODE("ReduceMean", inputs, [target], **attributes)

    squared = NODE("Pow", ["d", "two"], ["q"]) if square == "Pow" else NODE("Mul", ["d", "d"], ["q"])
    nodes = [
        mean("x", "mu"),
        NODE("Sub", ["x", "mu"], ["d"]),
        squared,
        mean("q", "var"),
        NODE("Add", ["var", "eps"], ["ve"]),
        NODE("Sqrt", ["ve"], ["sd"]),
        NODE("Div", ["d", "sd"], ["n"], name="div"),
        NODE("Mul", ["n", "g"], ["s"]),
        NODE("Add", ["s", "b"], ["y"]),
    ]
    return nodes, weights


@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize(("opset", "axis"), [(17, -1), (17, 2), (18, -1), (20, 2)])
def test_layer_normalization_is_fused(build: Any, fuse: Any, ops: Any, square: str, opset: int, axis: int) -> None:
    """Axes as attribute and as input, squares as Pow and as product."""
    nodes, weights = _nodes(square, opset, axis)
    result = fuse(build(nodes, weights, shape=("n", "s", 16), opset=opset))
    assert ops(result) == ["LayerNormalization"]
    assert result.changes == {"layer_normalization": 1}


def test_old_opset_says_why(build: Any, fuse: Any, ops: Any) -> None:
    """There is no LayerNormalization before opset 17; onnxruntime finds it when it loads the model."""
    nodes, weights = _nodes("Pow", 13)
    result = fuse(build(nodes, weights, shape=("n", "s", 16), opset=13))
    assert "Sqrt" in ops(result)
    assert "needs opset 17" in result.skipped[0].reason


def test_other_axis_stays(build: Any, fuse: Any, ops: Any) -> None:
    """A mean over the second axis is another normalization."""
    nodes, weights = _nodes("Pow", 17, axis=1)
    assert "Sqrt" in ops(fuse(build(nodes, weights, shape=("n", 7, 16))))


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
def test_other_reciprocals_stay(build: Any, fuse: Any, ops: Any, change: str) -> None:
    """A reciprocal that is an output, one of another value's root, and one of no mean are left as they are."""
    nodes, output = rms_norm(), ("y", "i") if change == "output" else ("y",)
    if change == "other value":
        nodes[0] = NODE("Abs", ["x"], ["q"])
    elif change == "no mean":
        nodes[1] = NODE("ReduceMax", ["q", "axes"], ["m"])
    weights = WEIGHTS
    assert "Reciprocal" in ops(fuse(build(nodes, weights, shape=("n", "s", 16), opset=18, output=output)))


def test_shapes_are_forgotten_after_fusing(build: Any, fuse: Any, rng: Any) -> None:
    """Those of the sum and of computed summands; inputs and outputs of the graph keep theirs."""
    nodes = [
        NODE("Identity", ["x"], ["i"]),
        NODE("MatMul", ["i", "w"], ["m"]),
        NODE("Add", ["m", "x"], ["a"]),
        NODE("LayerNormalization", ["a", "g", "b"], ["n"]),
        NODE("Relu", ["n"], ["y"]),
    ]
    weights = {"w": rng.standard_normal((8, 8)), "g": rng.standard_normal(8), "b": rng.standard_normal(8)}
    result = fuse(build(nodes, weights, shape=("n", "s", 8)))
    shapes = {value.name: value.shape for node in result.model.nodes() for value in node.outputs}
    assert shapes["m"] is None
    assert shapes["a"] is None
    assert result.model.inputs[0].shape == ("n", "s", 8)
    assert forget_residual_shapes(result.model.clone().ir) == 1


def test_other_sums_keep_theirs(build: Any) -> None:
    """No LayerNormalization, nothing to do."""
    model = build([NODE("Add", ["x", "x"], ["y"])], {})
    assert forget_residual_shapes(model.ir) == 0
