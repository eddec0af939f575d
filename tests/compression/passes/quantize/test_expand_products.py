"""Einsum and FusedMatMul by a constant are the same numbers as MatMul."""

from __future__ import annotations

import numpy as np
import pytest
from modelpress_compression.graph.edit import Editor
from modelpress_compression.passes.quantize.expand_products import expand_products
from onnx import TensorProto, helper

NODE = helper.make_node


def _operators(model) -> list[str]:  # type: ignore[no-untyped-def]
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    ("equation", "shape", "weight"),
    [
        ("btd,vd->btv", (2, 3, 8), (5, 8)),
        ("btd, dv -> btv", (2, 3, 8), (8, 5)),
        ("...d,dv->...v", (2, 3, 8), (8, 5)),
        ("btd,dhk->bthk", (2, 3, 8), (8, 4, 5)),
        ("bthk,hkd->btd", (2, 3, 4, 2), (4, 2, 5)),
        ("bthk,khd->btd", (2, 3, 4, 2), (2, 4, 5)),
        ("btd,dhk->btkh", (2, 3, 8), (8, 4, 5)),
        ("bd,vd->bv", (3, 8), (5, 8)),
        ("bsd,dhe->bhse", (2, 3, 8), (8, 4, 5)),
        ("bhse,hed->bsd", (2, 4, 3, 5), (4, 5, 8)),
        ("bhse,dhe->dbs", (2, 4, 3, 5), (8, 4, 5)),
        ("btd,vd->tbv", (2, 3, 8), (5, 8)),
        ("bdt,vd->btv", (2, 8, 3), (5, 8)),
        ("d,vd->v", (8,), (5, 8)),
    ],
)
def test_einsum(build, sqnr, rng, equation, shape, weight) -> None:  # type: ignore[no-untyped-def]
    """Heads that share a table, dense layers of Flax, projections of attention; the node keeps its name."""
    nodes = [NODE("Einsum", ["x", "w"], ["y"], "layer", equation=equation)]
    inputs = {"x": ["n", *shape[1:]] if len(shape) > 1 else list(shape)}
    model = build(nodes, {"w": rng.standard_normal(weight).astype(np.float32)}, inputs)
    expanded = model.clone()
    assert expand_products(expanded, Editor(expanded)) == 1
    assert "Einsum" not in _operators(expanded)
    assert [node.op_type for node in expanded.graph if node.name == "layer"] == ["MatMul"]
    samples = {"x": rng.standard_normal(shape).astype(np.float32)}
    assert sqnr(model, expanded, samples) > 110


@pytest.mark.parametrize(
    ("equation", "shape", "weight"),
    [
        ("bhd,hdv->bhv", (2, 3, 8), (3, 8, 5)),
        ("btd,vd->bt", (2, 3, 8), (5, 8)),
        ("bdd,vd->bv", (2, 8, 8), (5, 8)),
        ("...d,dhk->...hk", (2, 3, 8), (8, 4, 5)),
    ],
)
def test_einsum_that_stays(build, rng, equation, shape, weight) -> None:  # type: ignore[no-untyped-def]
    """Batches of products, sums and diagonals of one factor, and axes that nobody counts."""
    nodes = [NODE("Einsum", ["x", "w"], ["y"], "layer", equation=equation)]
    weights = {"w": rng.standard_normal(weight).astype(np.float32)}
    model = build(nodes, weights, {"x": ["n", *shape[1:]]})
    assert expand_products(model, Editor(model)) == 0
    assert _operators(model) == ["Einsum"]


@pytest.mark.parametrize("attributes", [{}, {"transB": 1}, {"alpha": 0.25}, {"transB": 1, "alpha": -3.0}])
def test_fused_matmul(build, sqnr, rng, attributes) -> None:  # type: ignore[no-untyped-def]
    """With its transpose and its factor."""
    nodes = [NODE("FusedMatMul", ["x", "w"], ["y"], "layer", domain="com.microsoft", **attributes)]
    shape = (5, 8) if "transB" in attributes else (8, 5)
    model = build(nodes, {"w": rng.standard_normal(shape).astype(np.float32)}, {"x": ["n", 3, 8]})
    expanded = model.clone()
    assert expand_products(expanded, Editor(expanded)) == 1
    assert "FusedMatMul" not in _operators(expanded)
    assert sqnr(model, expanded, {"x": rng.standard_normal((4, 3, 8)).astype(np.float32)}) > 110


def test_fused_matmul_that_stays(build, rng) -> None:  # type: ignore[no-untyped-def]
    """With its first factor transposed."""
    nodes = [NODE("FusedMatMul", ["x", "w"], ["y"], "layer", domain="com.microsoft", transA=1)]
    model = build(nodes, {"w": rng.standard_normal((8, 5)).astype(np.float32)}, {"x": [8, "n"]})
    assert expand_products(model, Editor(model)) == 0


def test_weights_that_are_quantized_already_are_called_so(build, quantize, rng) -> None:  # type: ignore[no-untyped-def]
    """Neither an activation nor computed at run time."""
    nodes = [
        NODE("DequantizeLinear", ["levels", "scale"], ["w"], "weight"),
        NODE("MatMul", ["x", "w"], ["h"], "first"),
        NODE("MatMul", ["h", "v"], ["g"], "second"),
        NODE("MatMul", ["g", "h"], ["y"], "both"),
    ]
    weights = {
        "levels": rng.integers(-100, 100, (64, 64)).astype(np.int8),
        "scale": np.float32(0.01),
        "v": rng.standard_normal((64, 64)).astype(np.float32),
    }
    model = build(nodes, weights, {"x": [64, 64]}, types={"x": TensorProto.FLOAT})
    result = quantize(model, {"x": rng.standard_normal((64, 64)).astype(np.float32)}, scheme="dynamic")
    reasons = {skip.node: skip.reason for skip in result.skipped}
    assert reasons["first"] == "MatMul: its weight is quantized already"
    assert reasons["both"] == "MatMul: both factors are activations"
