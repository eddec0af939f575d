"""Scales that move between activations and weights: found where they may, exact, and for the better."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.model import Model
from modelpress_compression.passes.base import PassResult
from modelpress_compression.passes.quantize.plan import LAYER_OPERATORS
from modelpress_compression.passes.quantize.scaling.edges import find_edges
from modelpress_compression.passes.quantize.scaling.equalize import equalize, pair_scale
from modelpress_compression.runtime import run, session_of
from numpy.typing import NDArray
from onnx import helper

Arrays = Mapping[str, NDArray[np.generic]]
Apply = Callable[..., PassResult]
NODE = helper.make_node


def answers(model: Model, arrays: Arrays) -> NDArray[np.float32]:
    with session_of(model, optimize=False) as session:
        return np.asarray(run(session, dict(arrays))["y"], np.float32)


@pytest.fixture
def encoder(build, rng: np.random.Generator) -> Model:  # type: ignore[no-untyped-def]
    """LayerNormalization read by two products alone; their outputs meet, a Gelu-like part follows: x [N,T,32]."""
    weights = {
        "gamma": rng.lognormal(0, 1.5, 32), "beta": rng.normal(0, 1, 32),
        "q": rng.normal(0, 0.2, (32, 48)), "k": rng.normal(0, 0.2, (32, 48)),
        "bias": rng.normal(0, 0.2, 48), "o": rng.normal(0, 0.2, (48, 16)),
    }  # fmt: skip
    nodes = [
        NODE("LayerNormalization", ["x", "gamma", "beta"], ["n"], "norm"),
        NODE("MatMul", ["n", "q"], ["a"], "query"),
        NODE("MatMul", ["n", "k"], ["b"], "key"),
        NODE("Add", ["a", "bias"], ["c"], "bias"),
        NODE("Relu", ["c"], ["d"], "relu"),
        NODE("Tanh", ["b"], ["t"], "tanh"),
        NODE("Mul", ["d", "t"], ["m"], "gate"),
        NODE("MatMul", ["m", "o"], ["y"], "out"),
    ]
    return build(nodes, {name: array.astype(np.float32) for name, array in weights.items()}, {"x": ["n", "t", 32]})


def edges_of(model: Model):  # type: ignore[no-untyped-def]
    return find_edges(model.graph, [node for node in model.graph if node.op_type in LAYER_OPERATORS])


def test_edges_end_where_the_channels_are_made(encoder: Model) -> None:
    """Both products share the normalization's output, whose constants can be divided; the gate's cannot."""
    first, second = edges_of(encoder)
    assert [slot.node.name for slot in first.weights] == ["query", "key"]
    assert [(slot.node.name, slot.index) for slot in first.makers] == [("norm", 1), ("norm", 2)]
    assert [slot.node.name for slot in second.weights] == ["out"]
    assert second.makers == ()


def test_any_positive_scale_leaves_the_answers(encoder: Model, rng: np.random.Generator) -> None:
    """Scales between 1/8 and 8 on every edge, with and without constants to divide: equal to float rounding (1e-4)."""
    x = {"x": rng.normal(0, 1, (2, 5, 32)).astype(np.float32)}
    work = encoder.clone()
    editor = Editor(work)
    for edge in edges_of(work):
        edge.apply(np.exp(rng.uniform(-2, 2, edge.channels)), editor)
    clean(work)
    np.testing.assert_allclose(answers(work, x), answers(encoder, x), rtol=1e-4, atol=1e-4)
    assert sum(node.op_type == "Mul" for node in work.graph) == 2  # the gate, and one for the edge without makers


def test_shared_constants_are_not_scaled_for_others(build, rng: np.random.Generator) -> None:  # type: ignore[no-untyped-def]
    """A weight that another product reads too keeps its numbers there."""
    weight = rng.normal(0, 0.2, (16, 16)).astype(np.float32)
    nodes = [
        NODE("MatMul", ["x", "w"], ["a"], "one"),
        NODE("Relu", ["a"], ["r"], "relu"),
        NODE("MatMul", ["r", "w"], ["y"], "two"),
    ]
    model = build(nodes, {"w": weight}, {"x": ["n", 16]})
    x = {"x": rng.normal(0, 1, (3, 16)).astype(np.float32)}
    work = model.clone()
    editor = Editor(work)
    for edge in edges_of(work):
        edge.apply(np.exp(rng.uniform(-2, 2, 16)), editor)
    np.testing.assert_allclose(answers(work, x), answers(model, x), rtol=1e-4, atol=1e-5)


def test_equalized_layers_have_like_ranges(build, rng: np.random.Generator) -> None:  # type: ignore[no-untyped-def]
    """Conv, Relu, depthwise Conv, Relu, Conv: same answers, and every channel's two ranges within 2 %; a Clip to 6
    between two layers keeps them apart."""
    weights = {
        "w1": rng.normal(0, 0.3, (8, 4, 3, 3)) * rng.lognormal(0, 2, (8, 1, 1, 1)),
        "b1": rng.normal(0, 0.3, 8),
        "w2": rng.normal(0, 0.3, (8, 1, 3, 3)) * rng.lognormal(0, 2, (8, 1, 1, 1)),
        "w3": rng.normal(0, 0.3, (6, 8, 1, 1)),
    }
    arrays = {name: array.astype(np.float32) for name, array in weights.items()}
    nodes = [
        NODE("Conv", ["x", "w1", "b1"], ["a"], "one"),
        NODE("Relu", ["a"], ["r"], "relu"),
        NODE("Conv", ["r", "w2"], ["b"], "two", group=8),
        NODE("Relu", ["b"], ["s"], "relu2"),
        NODE("Conv", ["s", "w3"], ["y"], "three"),
    ]
    model = build(nodes, arrays, {"x": ["n", 4, 9, 9]})
    x = {"x": rng.normal(0, 1, (2, 4, 9, 9)).astype(np.float32)}
    work = model.clone()
    assert equalize(work, [node for node in work.graph if node.op_type == "Conv"], Editor(work)) == 2
    np.testing.assert_allclose(answers(work, x), answers(model, x), rtol=1e-3, atol=1e-4)
    for edge in edges_of(work):
        np.testing.assert_allclose(pair_scale(edge), 1, rtol=0.02)
    nodes[1] = NODE("Clip", ["a", "low", "high"], ["r"], "relu6")
    clipped = build(nodes, {**arrays, "low": np.float32(0), "high": np.float32(6)}, {"x": ["n", 4, 9, 9]})
    assert equalize(clipped, [node for node in clipped.graph if node.op_type == "Conv"], Editor(clipped)) == 1


def test_smoothing_pays_with_outlier_channels(encoder: Model, rng, quantize: Apply, sqnr) -> None:  # type: ignore[no-untyped-def]
    """A normalization with channels of very different size: at least 3 dB more of the output are kept, on samples that
    calibration has not seen."""
    values = rng.normal(0, 1, (64, 6, 32)).astype(np.float32)
    seen, unseen = {"x": values[:48]}, {"x": values[48:]}
    options = {"scheme": "static", "calibration": "minmax", "rounding": "nearest", "bias_correction": False}
    plain = quantize(encoder, seen, smooth_quant=False, **options)
    smooth = quantize(encoder, seen, **options)
    assert smooth.changes["smooth_quant"] >= 1
    assert sqnr(encoder, smooth.model, unseen) > sqnr(encoder, plain.model, unseen) + 3


def test_channels_that_are_seldom_loud_are_not_cut_off(build, rng, quantize: Apply, sqnr) -> None:  # type: ignore[no-untyped-def]
    """Channels of which few samples show anything: what is silent in those that a scale is made from is loud in others,
    and unseen inputs do not get worse by smoothing."""
    weights = {"first": np.eye(64), "second": rng.normal(0, 0.2, (64, 16))}
    nodes = [
        NODE("MatMul", ["x", "first"], ["a"], "a"),
        NODE("Relu", ["a"], ["h"], "relu"),
        NODE("MatMul", ["h", "second"], ["y"], "second"),
    ]
    model = build(nodes, {name: array.astype(np.float32) for name, array in weights.items()}, {"x": ["n", 64]})
    loud = rng.random((564, 64)) < 0.02
    samples = np.where(loud, rng.uniform(0.5, 1.5, loud.shape), rng.normal(0, 0.02, loud.shape)).astype(np.float32)
    seen, unseen = {"x": samples[:64]}, {"x": samples[64:]}
    options = {"scheme": "static", "calibration": "minmax", "rounding": "nearest", "bias_correction": False}
    plain, smooth = (quantize(model, seen, smooth_quant=on, **options).model for on in (False, True))
    assert sqnr(model, smooth, unseen) > sqnr(model, plain, unseen) - 1


def test_nothing_is_smoothed_without_data(encoder: Model, rng, quantize: Apply) -> None:  # type: ignore[no-untyped-def]
    """Outliers of made-up inputs are no one's."""
    values = {"x": rng.normal(0, 1, (8, 6, 32)).astype(np.float32)}
    assert "smooth_quant" not in quantize(encoder, values, provided=False, scheme="static").changes
