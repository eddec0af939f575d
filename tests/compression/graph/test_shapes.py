"""Concrete shapes, also where only a run can tell them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from modelpress_compression.graph.shapes import sample_shapes, shape_of, static_shapes
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def test_the_branch_that_runs_is_looked_into(model_from_text: Callable[..., Model]) -> None:
    """A computed shape inside the branch that a run takes is found, nested ones included; the model stays."""
    text = (
        f"{HEAD} g (float[N,6] x) => (float[a,b] y) {{ y = If (yes) <"
        "then_branch = t () => (float[a,b] u) { u = If (no) <"
        "  then_branch = tt () => (float[a,b] v) { v = Identity(x) }, "
        "  else_branch = te () => (float[a,b] v) { r = NonZero(k) s = Shape(r) w = Reshape(x, s) v = Neg(w) }> }, "
        "else_branch = e () => (float[a,b] b) { b = Identity(x) }> }"
    )
    weights = {"yes": np.bool_([True]), "no": np.bool_([False]), "k": np.ones((2, 3), np.float32)}
    model = model_from_text(text, weights)
    ir = static_shapes(model, {"x": (2, 6)})
    found = {value.name: shape_of(value) for node in ir.graph.all_nodes() for value in node.outputs}
    assert found["w"] == (2, 6)
    assert found["y"] == (2, 6)
    assert len(list(model.nodes())) == 8


def test_shapes_of_one_sample(model_from_text: Callable[..., Model]) -> None:
    """`sample_shapes` are those of a feed with one sample."""
    model = model_from_text(f"{HEAD} g (float[N,6] x) => (float[N,6] y) {{ y = Relu(x) }}")
    data = InputData.from_arrays({"x": np.zeros((5, 6), np.float32)}, model.inputs)
    assert sample_shapes(data) == {"x": (1, 6)}
