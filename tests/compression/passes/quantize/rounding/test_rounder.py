"""A rounder's work on one model, remembered for its clones."""

from __future__ import annotations

import numpy as np
import onnx_ir
from modelpress_compression.passes.quantize.rounding.rounder import Numbers, RememberingRounder, Rounding, nearest

LOW, HIGH = np.asarray(-127.0), np.asarray(127.0)


class CountingRounder:
    """Rounds down, and counts how often."""

    def __init__(self) -> None:
        self.rounded = 0

    def rounding(self, node: onnx_ir.Node) -> Rounding:
        return nearest if node.name == "plain" else self._down

    def _down(self, weight: Numbers, scale: Numbers, low: Numbers, high: Numbers) -> Numbers:
        self.rounded += 1
        levels: Numbers = np.clip(np.floor(weight / scale), low, high)
        return levels


def product(name: str, weight: str) -> onnx_ir.Node:
    return onnx_ir.node("MatMul", [onnx_ir.Value(name="x"), onnx_ir.Value(name=weight)], name=name)


def test_each_scale_is_worked_out_once() -> None:
    """Clones of a node get what the first one got, exactly; another scale is another question."""
    inner = CountingRounder()
    rounder = RememberingRounder(inner, [product("one", "w")])
    weight = np.asarray([0.26, -0.26, 5.99], np.float32)
    for scale in (0.1, 0.1, 0.2):
        found = rounder.rounding(product("clone", "w"))(weight, np.asarray(scale), LOW, HIGH)
        np.testing.assert_array_equal(found, np.floor(weight / scale))
    assert inner.rounded == 2


def test_other_weights_are_rounded_to_the_nearest() -> None:
    """Those of nodes that it was not made for, or not kept for, and those that the inner rounder leaves to it."""
    one, two, plain = product("one", "w"), product("two", "v"), product("plain", "u")
    rounder = RememberingRounder(CountingRounder(), [one, two, plain])
    assert rounder.rounding(product("other", "t")) is nearest
    assert rounder.rounding(plain) is nearest
    kept = rounder.only([two])
    assert kept.rounding(one) is nearest
    assert kept.rounding(two) is rounder.rounding(two)
