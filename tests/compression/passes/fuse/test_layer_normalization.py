"""Layer normalization written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper


def _nodes(square: str, opset: int, axis: int = -1) -> tuple[list[Any], dict[str, Any]]:
    rng = np.random.default_rng(3)
    weights: dict[str, Any] = {"two": 2.0, "eps": 1e-5, "g": rng.standard_normal(16), "b": rng.standard_normal(16)}
    if opset >= 18:
        weights["axes"] = np.array([axis], np.int64)

    def mean(source: str, target: str) -> Any:
        inputs, attributes = ([source, "axes"], {}) if opset >= 18 else ([source], {"axes": [axis]})
        return helper.make_node("ReduceMean", inputs, [target], **attributes)

    squared = (
        helper.make_node("Pow", ["d", "two"], ["q"]) if square == "Pow" else helper.make_node("Mul", ["d", "d"], ["q"])
    )
    nodes = [
        mean("x", "mu"),
        helper.make_node("Sub", ["x", "mu"], ["d"]),
        squared,
        mean("q", "var"),
        helper.make_node("Add", ["var", "eps"], ["ve"]),
        helper.make_node("Sqrt", ["ve"], ["sd"]),
        helper.make_node("Div", ["d", "sd"], ["n"], name="div"),
        helper.make_node("Mul", ["n", "g"], ["s"]),
        helper.make_node("Add", ["s", "b"], ["y"]),
    ]
    return nodes, weights


@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize(("opset", "axis"), [(17, -1), (17, 2), (18, -1), (20, 2)])
def test_fused(build: Any, fuse: Any, ops: Any, square: str, opset: int, axis: int) -> None:
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
