"""Concrete shapes, also where only a run can tell them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from modelpress_compression.graph import shapes
from modelpress_compression.graph.shapes import sample_shapes, shape_of, static_shapes
from modelpress_compression.graph.watch.shapes import TAKEN_BRANCH, observe_shapes
from modelpress_compression.inputs import Feeds, InputData
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
    shaped = static_shapes(model, {"x": (2, 6)})
    found = {value.name: shape_of(value) for node in shaped.graph.all_nodes() for value in node.outputs}
    assert found["w"] == (2, 6)
    assert found["y"] == (2, 6)
    assert len(list(model.nodes())) == 8


def test_a_graph_is_run_once_for_its_shapes(
    model_from_text: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run told is remembered with the branch that it took, by graph and by extents; each caller gets a graph of
    its own."""
    runs: list[Model] = []

    def observe(model: Model, feeds: Feeds) -> bool:
        runs.append(model)
        return observe_shapes(model, feeds)

    monkeypatch.setattr(shapes, "observe_shapes", observe)
    text = (
        f"{HEAD} g (float[N,6] x) => (float[a,b] y) {{ r = NonZero(x) s = Shape(r) w = ConstantOfShape(s)"
        " c = Cast<to=9>(q) y = If (c) <then_branch = t () => (float[a,b] u) { u = Relu(w) }, "
        "else_branch = e () => (float[a,b] v) { v = MatMul(w, k) }> }"
    )
    weights = {"k": np.ones((12, 7), np.float32), "q": np.float32([0.0])}
    first, again = (static_shapes(model_from_text(text, weights), {"x": (2, 6)}) for _ in range(2))
    assert len(runs) == 1
    for graph in (first, again):
        (branching,) = (node for node in graph.graph if node.op_type == "If")
        assert branching.meta[TAKEN_BRANCH] == "else_branch"
        assert shape_of(branching.outputs[0]) == (2, 7)
        branching.outputs[0].shape = ir.Shape([9, 9])  # is nobody else's
    static_shapes(model_from_text(text, weights), {"x": (3, 6)})
    assert len(runs) == 2


def test_shapes_of_one_sample(model_from_text: Callable[..., Model]) -> None:
    """`sample_shapes` are those of a feed with one sample."""
    model = model_from_text(f"{HEAD} g (float[N,6] x) => (float[N,6] y) {{ y = Relu(x) }}")
    data = InputData.from_arrays({"x": np.zeros((5, 6), np.float32)}, model.inputs)
    assert sample_shapes(data) == {"x": (1, 6)}


@pytest.mark.parametrize(
    ("calls", "dtypes"),
    [
        (
            "q = com.microsoft.QuantizeLinear (x, s, z) y = com.microsoft.DequantizeLinear (q, s, z)",
            {"q": ir.DataType.UINT16, "y": ir.DataType.FLOAT},
        ),
        (
            "y, m = com.microsoft.EmbedLayerNormalization <epsilon = 0.00001> (ids, , words, places, , g, b)",
            {"y": ir.DataType.FLOAT},
        ),
    ],
)
def test_types_of_operators_that_onnx_does_not_know(
    model_from_text: Callable[..., Model], calls: str, dtypes: dict[str, ir.DataType]
) -> None:
    """That of the zero point, of the scale, of the table of words: onnxruntime refuses a file that says otherwise."""
    text = (
        '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
        f"g (float[N,6] x, int32[N,6] ids) => (y) {{ {calls} }}"
    )
    weights = {
        "s": np.float32(0.1),
        "z": np.uint16(1 << 15),
        "words": np.ones((9, 4), np.float32),
        "places": np.ones((6, 4), np.float32),
        "g": np.ones(4, np.float32),
        "b": np.ones(4, np.float32),
    }
    shaped = static_shapes(model_from_text(text, weights), {"x": (2, 6), "ids": (2, 6)})
    found = {value.name: value.dtype for node in shaped.graph for value in node.outputs}
    assert {name: found[name] for name in dtypes} == dtypes
