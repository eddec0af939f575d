"""What onnxruntime cannot put into 8 bits between two layers: rewritten where it can be, else 8 bits keep away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from modelpress_compression.passes.base import PassResult
from onnx import helper

NODE = helper.make_node
Quantize = Callable[..., PassResult]

_TWICE = np.asarray([2, 2], np.float32)
_SIZES = np.asarray([20, 20], np.int64)
_ONES = np.asarray([1, 1, 1, 1], np.int64)
_LAST = np.asarray([2, 3], np.int64)
# Each stands between two convolutions: operator, inputs behind the first, attributes, constants.
Between = tuple[str, list[str], dict[str, Any], dict[str, Any]]
REWRITTEN: dict[str, Between] = {
    "dilations of one": ("AveragePool", [], {"kernel_shape": [2, 2], "dilations": [1, 1]}, {}),
    "padding that counts": (
        "AveragePool",
        [],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 0, 0], "ceil_mode": 1, "count_include_pad": 1},
        {},
    ),
    "no padding that counts": (
        "AveragePool",
        [],
        {"kernel_shape": [3, 3], "strides": [3, 3], "auto_pad": "VALID", "ceil_mode": 1, "count_include_pad": 1},
        {},
    ),
    "scales along two axes": ("Resize", ["", "s"], {"axes": [3, 2]}, {"s": _TWICE}),
    "linear scales along one axis": ("Resize", ["", "s"], {"axes": [-1], "mode": "linear"}, {"s": _TWICE[:1]}),
    "sizes along the last axes": ("Resize", ["", "", "s"], {"axes": [2, 3]}, {"s": _SIZES}),
    "scales that are empty": (
        "Resize",
        ["e", "e", "s"],
        {"axes": [2, 3], "mode": "cubic"},
        {"s": _SIZES, "e": np.zeros(0, np.float32)},
    ),
    "pads along two axes": ("Pad", ["p", "", "axes"], {"mode": "reflect"}, {"p": _ONES, "axes": _LAST}),
}
BARRED: dict[str, Between] = {
    "dilations": ("AveragePool", [], {"kernel_shape": [2, 2], "dilations": [2, 1]}, {}),
    "windows that begin in padding that counts": (
        "AveragePool",
        [],
        {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 1, 1], "ceil_mode": 1, "count_include_pad": 1},
        {},
    ),
    "aspect ratio": (
        "Resize",
        ["", "", "s"],
        {"axes": [2, 3], "keep_aspect_ratio_policy": "not_smaller"},
        {"s": np.asarray([14, 21], np.int64)},
    ),
    "sizes in another order": ("Resize", ["", "", "s"], {"axes": [3, 2]}, {"s": _SIZES}),
}


def _model(build, between: Between, before: tuple[str, ...], rng):  # type: ignore[no-untyped-def]
    kind, inputs, attributes, constants = between
    nodes, read = [NODE("Conv", ["x", "w1"], ["c1"], "first")], "c1"
    for number, operator in enumerate(before):
        nodes.append(NODE(operator, [read], [f"b{number}"], **({"axis": 1} if operator == "Softmax" else {})))
        read = f"b{number}"
    nodes += [NODE(kind, [read, *inputs], ["m"], "between", **attributes), NODE("Conv", ["m", "w2"], ["y"], "second")]
    weights = {
        name: rng.normal(0, 0.1, (16, extent, 3, 3)).astype(np.float32) for name, extent in (("w1", 8), ("w2", 16))
    }
    return build(nodes, {**weights, **constants}, {"x": ["n", 8, 12, 12]}, opset=19)


@pytest.mark.parametrize("before", [(), ("Relu",), ("Sigmoid", "Identity")])
@pytest.mark.parametrize("kind", [*REWRITTEN, *BARRED])
def test_what_stands_between_layers_lets_them_be_in_8_bits(kind, before, build, quantize, sqnr, rng) -> None:  # type: ignore[no-untyped-def]
    """The result runs, and is right; a layer that stays in float32 for what follows has the reason."""
    model = _model(build, {**REWRITTEN, **BARRED}[kind], before, rng)
    x = {"x": rng.normal(0, 1, (6, 8, 12, 12)).astype(np.float32)}
    result: PassResult = quantize(model, x, scheme="static")
    assert sqnr(model, result.model, x) > 25
    reasons = {skip.node: skip.reason for skip in result.skipped}
    # Behind a Sigmoid that is in float32 an AveragePool reads no 8 bits.
    kept = kind in BARRED and not (before[:1] == ("Sigmoid",) and BARRED[kind][0] == "AveragePool")
    assert set(reasons) == ({"first"} if kept else set())
    assert all(BARRED[kind][0] in reason for reason in reasons.values())
    assert result.changes["Conv"] == 2 - len(reasons)


def test_pooling_under_ceil_mode_is_in_8_bits(build, quantize, sqnr, rng, loaded_operators) -> None:  # type: ignore[no-untyped-def]
    """Where padding does not count, onnxruntime's kernel computes the same."""
    pooling = ("AveragePool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, {})
    model = _model(build, pooling, (), rng)
    x = {"x": rng.normal(0, 1, (6, 8, 12, 12)).astype(np.float32)}
    result: PassResult = quantize(model, x, scheme="static")
    assert "QLinearAveragePool" in loaded_operators(result.model)
    assert sqnr(model, result.model, x) > 25
