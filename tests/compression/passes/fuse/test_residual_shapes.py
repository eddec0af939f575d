"""Shapes around residual sums are not written into the file."""

from __future__ import annotations

from typing import Any

from modelpress_compression.passes.fuse.residual_shapes import forget_residual_shapes
from onnx import helper


def test_shapes_are_forgotten_after_fusing(build: Any, fuse: Any, rng: Any) -> None:
    """Those of the sum and of computed summands; inputs and outputs of the graph keep theirs."""
    nodes = [
        helper.make_node("Identity", ["x"], ["i"]),
        helper.make_node("MatMul", ["i", "w"], ["m"]),
        helper.make_node("Add", ["m", "x"], ["a"]),
        helper.make_node("LayerNormalization", ["a", "g", "b"], ["n"]),
        helper.make_node("Relu", ["n"], ["y"]),
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
    model = build([helper.make_node("Add", ["x", "x"], ["y"])], {})
    assert forget_residual_shapes(model.ir) == 0
