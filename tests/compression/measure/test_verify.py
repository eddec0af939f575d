"""What counts as the same answer after a lossless pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.verify import outputs_match
from modelpress_compression.model import Model, Provenance

SCALED = "g (float[batch,3] x) => (float[batch,3] y) { y = Mul(x, k) }"
Save = Callable[..., Path]


@pytest.fixture
def data(samples: Callable[..., InputData]) -> InputData:
    """Samples whose largest element is 10, and whose smallest is nearly nothing."""
    return samples("x:float32[batch,3]", np.float32([[10, 1, 1e-6], [5, -10, 0]]))


def test_tolerances_are_relative_to_the_output(save_model: Save, data: InputData) -> None:
    """With 1e-4 more of everything: rtol 1.1e-4 passes, 0.9e-4 does not, and the error is that of the largest."""
    before, after = save_model(SCALED, {"k": np.float32(1)}), save_model(SCALED, {"k": np.float32(1.0001)}, "b")
    assert outputs_match(before, after, data, rtol=1.1e-4, atol=0) is None
    found = outputs_match(before, after, data, rtol=0.9e-4, atol=0)
    assert found is not None
    assert found.output == "y"
    assert found.error == pytest.approx(1e-3, rel=0.01)
    assert found.allowed == pytest.approx(0.9e-3, rel=0.01)
    assert "is allowed" in str(found)


def test_models_in_memory(save_model: Save, data: InputData) -> None:
    """A Model and a file compare alike."""
    path = save_model(SCALED, {"k": np.float32(1)})
    model = Model(onnx_ir.load(path), Provenance("onnx", "", 0))
    assert outputs_match(model, path, data, rtol=0, atol=0) is None


@pytest.mark.parametrize(
    ("graph", "says"),
    [
        ("g (float[batch,3] x) => (float[batch,3] y) { y = Log(x) }", "NaN or infinite"),
        ("g (float[batch,3] x) => (float[batch,3] z) { z = Identity(x) }", "missing"),
        ("g (float[batch,3] x) => (float[batch,1] y) { y = ReduceMax <axes = [1]> (x) }", "shape"),
        ("g (float[batch,3] x) => (double[batch,3] y) { y = Cast <to = 11> (x) }", "type"),
    ],
)
def test_what_no_tolerance_covers(save_model: Save, data: InputData, graph: str, says: str) -> None:
    """Missing outputs, other shapes and types, NaN: never the same."""
    before = save_model(SCALED, {"k": np.float32(1)})
    found = outputs_match(before, save_model(graph, name="after"), data, rtol=1e9, atol=1e9)
    assert found is not None
    assert says in found.reason
    assert found.error is None


def test_integers_must_be_equal(save_model: Save, data: InputData) -> None:
    """One index that differs is a difference."""
    text = "g (float[batch,3] x) => (int64[batch] i) {{ i = {}  <axis = 1, keepdims = 0> (x) }}"
    found = outputs_match(save_model(text.format("ArgMax")), save_model(text.format("ArgMin"), name="b"), data, 1, 1)
    assert found is not None
    assert found.reason == "1 of 1 elements differ"


def test_equal_infinities_match(save_model: Save, data: InputData) -> None:
    """NaN and infinities in the same places are the same answer."""
    path = save_model("g (float[batch,3] x) => (float[batch,3] y) { y = Log(x) }")
    assert outputs_match(path, path, data, rtol=0, atol=0) is None
