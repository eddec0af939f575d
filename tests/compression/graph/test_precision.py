"""Models that compute in other floats compute in float32, with inputs and outputs as they were."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir
import pytest
from modelpress_compression import Recipe, compress
from modelpress_compression.graph.precision import NARROW, OTHER_FLOATS, compute_in_float32, computes_in
from modelpress_compression.model import Model
from modelpress_compression.runtime import run, session_of

HEAD = '<ir_version: 9, opset_import: ["" : 19]>'
RNG = np.random.default_rng(5)
DTYPES = {"float16": np.float16, "double": np.float64}


def build(model_from_text: Callable[..., Model], name: str) -> Model:
    """A layer, a branch with a layer of its own, a type named in an attribute, an input that is an output."""
    branch = f"g1 () => ({name}[n,4] {{0}}) {{{{ {{0}} = MatMul(r, {{1}}) }}}}"
    text = (
        f"{HEAD} g ({name}[n,64] x, bool c) => ({name}[n,4] y, {name}[n,64] x, float[n,4] z) {{ "
        "h = MatMul(x, w)  r = Relu(h)  "
        f"s = If (c) <then_branch = {branch.format('t', 'v')}, else_branch = {branch.format('e', 'u')}> "
        f"k = Shape(s)  o = ConstantOfShape <value = {name}[1] {{2}}> (k)  y = Mul(s, o)  z = Cast <to = 1> (y) }}"
    )
    dtype = DTYPES[name]
    weights = {"w": RNG.standard_normal((64, 32)) / 8, "v": RNG.standard_normal((32, 4)), "u": np.ones((32, 4))}
    return model_from_text(text, {key: array.astype(dtype) for key, array in weights.items()})


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("condition", [True, False])
def test_the_same_numbers_and_types(model_from_text: Callable[..., Model], name: str, condition: bool) -> None:
    """Outputs up to the rounding of the coarser of both types; large weights of 16 bits do not grow."""
    model = build(model_from_text, name)
    changed = model.clone()
    assert computes_in(model, OTHER_FLOATS)
    assert compute_in_float32(changed)
    assert not computes_in(changed, OTHER_FLOATS)
    assert computes_in(model, OTHER_FLOATS)  # the copy alone has changed
    assert changed.inputs == model.inputs
    assert changed.outputs == model.outputs
    assert changed.weight_bytes() <= 1.2 * model.weight_bytes()
    feed = {"x": RNG.standard_normal((3, 64)).astype(DTYPES[name]), "c": np.array(condition)}
    with session_of(model) as before, session_of(changed) as after:
        expected, got = run(before, feed), run(after, feed)
    for key, array in expected.items():
        assert got[key].dtype == array.dtype
        np.testing.assert_allclose(got[key], array, rtol=5e-3 if name == "float16" else 1e-4, atol=2e-2)


def test_sequences_of_other_floats_stay(model_from_text: Callable[..., Model]) -> None:
    """An output that is a sequence has no Cast."""
    text = f"{HEAD} g (double[n,4] x) => (seq(double[n,4]) s) {{ y = MatMul(x, w)  s = SequenceConstruct(y, x) }}"
    model = model_from_text(text, {"w": np.eye(4)})
    assert not compute_in_float32(model)
    assert computes_in(model, OTHER_FLOATS)


def test_a_double_model_in_8_bits(model_from_text: Callable[..., Model]) -> None:
    """Weights of 64 bits become 8; inputs and outputs stay double, and a warning says what computes how."""
    text = f"{HEAD} g (double[n,64] x) => (double[n,8] y) {{ h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }}"
    model = model_from_text(text, {"w": RNG.standard_normal((64, 64)) / 8, "v": RNG.standard_normal((64, 8)) / 8})
    recipe = Recipe.from_dict(
        {"version": 1, "steps": [{"quantize": {"scheme": "dynamic"}}], "benchmark": {"rounds": 5}}
    )
    result = compress(model, recipe, data={"x": RNG.standard_normal((32, 64))})
    assert result.model.weight_bytes() * 5 < model.weight_bytes()
    assert [spec.dtype for spec in (*result.model.inputs, *result.model.outputs)] == ["float64", "float64"]
    assert any("float64" in warning for warning in result.report["warnings"])
    assert result.report["fidelity"]["outputs"]["y"]["cosine"] > 0.99


def test_bfloat16_becomes_runnable(model_from_text: Callable[..., Model]) -> None:
    """onnxruntime has no kernel for it on CPU: weights keep their bits, and are multiplied in float32."""
    text = (
        f"{HEAD} g (float[n,64] x) => (float[n,8] y) "
        "{ b = Cast <to = 16> (x)  h = MatMul(b, w)  y = Cast <to = 1> (h) }"
    )
    weight = RNG.standard_normal((64, 8)).astype(ml_dtypes.bfloat16)
    model = model_from_text(text, {"w": np.zeros((64, 8), np.float32)})
    value = model.graph.initializers["w"]
    value.const_value = onnx_ir.Tensor(weight, name="w")
    for item in (value, *(output for node in list(model.graph)[:2] for output in node.outputs)):
        item.type = onnx_ir.TensorType(onnx_ir.DataType.BFLOAT16)
    assert compute_in_float32(model, NARROW)
    assert model.weight_bytes() == weight.nbytes
    x = RNG.standard_normal((3, 64)).astype(np.float32)
    with session_of(model) as session:
        np.testing.assert_allclose(run(session, {"x": x})["y"], x @ weight.astype(np.float32), rtol=1e-4, atol=1e-4)
