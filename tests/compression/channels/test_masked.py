"""The masked model is what the formulas say, computed by numpy on the units that stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from modelpress_compression.channels.groups import Analysis, Group, Member, Role
from modelpress_compression.model import Model, Provenance
from modelpress_compression.runtime import run, session_of
from oracles.masking import masked

Arrays = dict[str, np.ndarray]
HIDDEN = 8
KEPT = np.array([0, 2, 3, 6], np.int64)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 5, 4)).astype(np.float32)
WEIGHTS: Arrays = {
    "w1": RNG.normal(size=(4, HIDDEN)).astype(np.float32),
    "b1": RNG.normal(size=HIDDEN).astype(np.float32),
    "scale": RNG.uniform(0.5, 1.5, HIDDEN).astype(np.float32),
    "bias": RNG.normal(size=HIDDEN).astype(np.float32),
    "w2": RNG.normal(size=(HIDDEN, 2)).astype(np.float32),
}


def _member(tensor: str, axis: int, role: Role, node: str) -> Member:
    return Member(tensor, axis, np.arange(HIDDEN, dtype=np.int64)[:, None], role, node)


MEMBERS = (
    _member("w1", 1, "producer", "first"),
    _member("b1", 0, "passenger", "add"),
    _member("scale", 0, "passenger", "norm"),
    _member("bias", 0, "passenger", "norm"),
    _member("w2", 0, "consumer", "last"),
)


def _between(text: str) -> Model:
    """x [3, 5, 4] -> MatMul to 8 hidden units -> `text` makes n of h -> MatMul to 2."""
    proto = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N,5,4] x) => (float[N,5,2] y)
        <float[4,{HIDDEN}] w1, float[{HIDDEN}] b1, float[{HIDDEN}] scale, float[{HIDDEN}] bias, float[{HIDDEN},2] w2>
        {{ [first] p = MatMul (x, w1)  [add] h = Add (p, b1)  {text}  [last] y = MatMul (n, w2) }}
    """)
    names = set(WEIGHTS)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(WEIGHTS[name], name) for name in sorted(names))
    return Model(onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto)), Provenance("onnx", "", 0))


def _layer_norm(h: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = h - h.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def _rms_norm(h: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def _group_norm(h: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Two groups along the last axis, statistics over positions as well."""
    grouped = h.reshape(*h.shape[:2], 2, -1)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    return (centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-5)).reshape(h.shape) * scale + bias


def _softmax_free(h: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return np.maximum(h * scale + bias, 0)


CASES: dict[str, tuple[str, Callable[..., np.ndarray]]] = {
    "no statistic": ("m = Mul (h, scale) a = Add (m, bias) n = Relu (a)", _softmax_free),
    "LayerNormalization": ("[norm] n = LayerNormalization <axis = -1> (h, scale, bias)", _layer_norm),
    "LayerNormalization in parts": (
        """axes = Constant <value_ints = [-1]> ()  two = Constant <value = float {2.0}> ()
           eps = Constant <value = float {0.00001}> ()
           mean = ReduceMean (h, axes)  d = Sub (h, mean)  sq = Pow (d, two)  var = ReduceMean (sq, axes)
           e = Add (var, eps)  s = Sqrt (e)  q = Div (d, s)  m = Mul (q, scale)  n = Add (m, bias)""",
        _layer_norm,
    ),
    "RMSNorm in parts": (
        """axes = Constant <value_ints = [-1]> ()  eps = Constant <value = float {0.00001}> ()
           sq = Mul (h, h)  var = ReduceMean (sq, axes)  e = Add (var, eps)  s = Sqrt (e)
           q = Div (h, s)  m = Mul (q, scale)  n = Add (m, bias)""",
        _rms_norm,
    ),
    "GroupNormalization": (
        """t = Transpose <perm = [0, 2, 1]> (h)  [norm] g = GroupNormalization <num_groups = 2> (t, scale, bias)
           n = Transpose <perm = [0, 2, 1]> (g)""",
        _group_norm,
    ),
    "GroupNorm as InstanceNormalization": (
        """t = Transpose <perm = [0, 2, 1]> (h)  to = Constant <value_ints = [0, 2, -1]> ()  r = Reshape (t, to)
           one = Constant <value_floats = [1.0, 1.0]> ()  zero = Constant <value_floats = [0.0, 0.0]> ()
           i = InstanceNormalization <epsilon = 0.00001> (r, one, zero)  shape = Shape (t)  b = Reshape (i, shape)
           u = Transpose <perm = [0, 2, 1]> (b)  m = Mul (u, scale)  n = Add (m, bias)""",
        _group_norm,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula_on_the_units_that_stay(case: str) -> None:
    """Two of four units in each half are cut: statistics are taken over the rest alone; rtol 1e-4, atol 1e-5."""
    text, formula = CASES[case]
    model = _between(text)
    analysis = Analysis((Group("first", HIDDEN, "channel", MEMBERS, 0.0),), ())
    kept = KEPT if "Group" not in case else np.array([0, 2, 4, 6], np.int64)
    result = masked(model, analysis, {"first": kept}, {"x": X})
    w = WEIGHTS
    hidden = (X @ w["w1"] + w["b1"])[..., kept]
    expected = formula(hidden, w["scale"][kept], w["bias"][kept]) @ w["w2"][kept]
    with session_of(result) as session:
        np.testing.assert_allclose(run(session, {"x": X})["y"], expected, rtol=1e-4, atol=1e-5)


def test_the_model_itself_stays_as_it_is() -> None:
    """The full model gives the same numbers after it was masked."""
    model = _between(CASES["LayerNormalization in parts"][0])
    before = _run(model)
    masked(model, Analysis((Group("first", HIDDEN, "channel", MEMBERS, 0.0),), ()), {"first": KEPT}, {"x": X})
    np.testing.assert_array_equal(_run(model), before)


def test_keeping_everything_changes_nothing() -> None:
    """With all units kept the masked model has no changed node and the same numbers."""
    model = _between(CASES["LayerNormalization"][0])
    analysis = Analysis((Group("first", HIDDEN, "channel", MEMBERS, 0.0),), ())
    result = masked(model, analysis, {"first": np.arange(HIDDEN, dtype=np.int64)}, {"x": X})
    assert [node.op_type for node in result.graph] == [node.op_type for node in model.graph]
    np.testing.assert_array_equal(_run(result), _run(model))


def test_a_shared_tensor_is_silenced_for_its_consumer_alone() -> None:
    """One matrix makes the hidden units and reads others: only its use as a consumer gets a zeroed copy."""
    proto = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N,8] x) => (float[N,8] y)
        { [one] h = MatMul (x, w)  [two] y = MatMul (h, w) }
    """)
    weight = RNG.normal(size=(8, 8)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model = Model(onnx_ir.from_proto(proto), Provenance("onnx", "", 0))
    members = (_member("w", 1, "producer", "one"), _member("w", 0, "consumer", "two"))
    result = masked(
        model, Analysis((Group("one", 8, "channel", members, 0.0),), ()), {"one": KEPT}, {"x": X[0, :, :1].repeat(8, 1)}
    )
    x = RNG.normal(size=(3, 8)).astype(np.float32)
    with session_of(result) as session:
        np.testing.assert_allclose(
            run(session, {"x": x})["y"], (x @ weight)[:, KEPT] @ weight[KEPT], rtol=1e-4, atol=1e-5
        )


def _run(model: Model) -> Any:
    with session_of(model) as session:
        return run(session, {"x": X})["y"]
