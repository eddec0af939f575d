"""Grids are noted while a scheme writes, and learned levels come back for the same grid alone."""

from __future__ import annotations

import numpy as np
import onnx_ir
from modelpress_compression.passes.quantize.reconstruction.grids import GridRecorder, LearnedRounder
from modelpress_compression.passes.quantize.rounding.rounder import NearestRounder, nearest

LOW, HIGH = np.asarray(-7.0), np.asarray(7.0)


def node(name: str) -> onnx_ir.Node:
    return onnx_ir.node("MatMul", [onnx_ir.Value(name="x"), onnx_ir.Value(name=name)])


def test_what_was_recorded_is_learned_for() -> None:
    """One grid for each scale; its learned levels are given for it, and the base's for another grid or weight."""
    rng = np.random.default_rng(0)
    weight, scale = rng.normal(size=(4, 3)).astype(np.float32), np.full((1, 3), 0.25, np.float32)
    recorder = GridRecorder(NearestRounder())
    for _ in range(2):
        levels = recorder.rounding(node("w"))(weight, scale, LOW, HIGH)
        np.testing.assert_array_equal(levels, nearest(weight, scale, LOW, HIGH))
    recorder.rounding(node("w"))(weight, 2 * scale, LOW, HIGH)
    first, second = recorder.grids["w"]
    np.testing.assert_array_equal(first.real(first.levels), levels * scale)
    assert second.equals(2 * scale, LOW, HIGH)

    learned = first.levels + 1
    rounder = LearnedRounder(NearestRounder(), {"w": (first, learned)})
    np.testing.assert_array_equal(rounder.rounding(node("w"))(weight, scale, LOW, HIGH), learned)
    other = rounder.rounding(node("w"))(weight, 2 * scale, LOW, HIGH)
    np.testing.assert_array_equal(other, nearest(weight, 2 * scale, LOW, HIGH))
    assert rounder.rounding(node("other")) is nearest
