"""Transposes between layouts, as TensorFlow's exports have them around each Conv."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from modelpress_compression.inputs import InputData
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.fuse.fuse import Fuse
from onnx import helper

NODE = helper.make_node
RNG = np.random.default_rng(5)
TO_FRONT, TO_BACK = [0, 3, 1, 2], [0, 2, 3, 1]
KERNELS = {f"k{number}": (RNG.standard_normal((8, 8, 3, 3)) / 8).astype(np.float32) for number in (1, 2, 3)}
CHANNELS = RNG.uniform(0.5, 2, 8).astype(np.float32)


@pytest.fixture
def fused(channel_model, outputs_of, tmp_path):  # type: ignore[no-untyped-def]
    """Fuses a model of these nodes on NHWC images of 8 channels; checks its answers; gives operators and changes."""

    def apply(nodes, weights, channels: int = 8):  # type: ignore[no-untyped-def]
        model = channel_model(nodes, weights, ["n", 9, 7, 8], ["n", "h", "w", channels])
        x = RNG.standard_normal((3, 9, 7, 8)).astype(np.float32)
        result = Fuse(FuseConfig())(model, Context(InputData(model.inputs, {"x": x}), tmp_path))
        np.testing.assert_allclose(outputs_of(result.model, x), outputs_of(model, x), rtol=1e-4, atol=1e-5)
        return Counter(node.op_type for node in result.model.graph), result.changes

    return apply


def _conv(source: str, target: str, number: int) -> list:  # type: ignore[type-arg]
    """Conv in NCHW between two Transposes."""
    return [
        NODE("Transpose", [source], [f"front{number}"], f"front{number}", perm=TO_FRONT),
        NODE("Conv", [f"front{number}", f"k{number}"], [f"conv{number}"], f"conv{number}", pads=[1] * 4),
        NODE("Transpose", [f"conv{number}"], [target], f"back{number}", perm=TO_BACK),
    ]


def test_constants_behind_a_transpose_merge_into_the_conv(fused) -> None:  # type: ignore[no-untyped-def]
    """Batch normalization in NHWC, as Mul and Add, and Relu between two Convs: two Transposes are left of four."""
    nodes = [
        *_conv("x", "a", 1),
        NODE("Mul", ["a", "s"], ["b"], "scale"),
        NODE("Add", ["b", "t"], ["c"], "shift"),
        NODE("Relu", ["c"], ["d"], "relu"),
        *_conv("d", "y", 2),
    ]
    operators, changes = fused(nodes, {**KERNELS, "s": CHANNELS, "t": CHANNELS})
    assert operators == {"Transpose": 2, "Conv": 2, "Relu": 1}
    assert changes["conv_affine"] == 2


def test_constants_in_front_of_a_transpose(fused) -> None:  # type: ignore[no-untyped-def]
    """A normalization of the input in NHWC becomes part of the Conv behind the Transpose."""
    nodes = [NODE("Mul", ["x", "s"], ["a"], "scale"), *_conv("a", "y", 1)]
    operators, _ = fused(nodes, {**KERNELS, "s": CHANNELS})
    assert operators == {"Transpose": 2, "Conv": 1}


def test_a_residual_connection(fused) -> None:  # type: ignore[no-untyped-def]
    """Both branches of a sum are in NHWC; the activation in front of it is read twice."""
    nodes = [
        *_conv("x", "a", 1),
        NODE("Relu", ["a"], ["b"], "first"),
        *_conv("b", "c", 2),
        NODE("Add", ["c", "b"], ["d"], "sum"),
        NODE("Relu", ["d"], ["e"], "second"),
        *_conv("e", "y", 3),
    ]
    operators, _ = fused(nodes, KERNELS)
    assert operators == {"Transpose": 2, "Conv": 3, "Relu": 2, "Add": 1}


def test_a_value_that_is_read_in_nhwc_keeps_its_transpose(fused) -> None:  # type: ignore[no-untyped-def]
    """Softmax over the channels needs them last: one Transpose is written for it, and no more than there were."""
    nodes = [
        *_conv("x", "a", 1),
        NODE("Relu", ["a"], ["b"], "relu"),
        *_conv("b", "c", 2),
        NODE("Softmax", ["b"], ["d"], "softmax", axis=-1),
        NODE("Add", ["c", "d"], ["y"], "sum"),
    ]
    operators, _ = fused(nodes, KERNELS)
    assert operators["Transpose"] <= 3
    assert operators["Conv"] == 2


@pytest.mark.parametrize("constant", [np.float32(0.5), CHANNELS, RNG.standard_normal((9, 7, 8)), CHANNELS[None, None]])
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div"])
def test_constants_of_all_shapes_turn(fused, constant, op_type) -> None:  # type: ignore[no-untyped-def]
    """One number, one for each channel, one for each place; as the first operand and as the second."""
    nodes = [
        NODE("Transpose", ["x"], ["a"], "front", perm=[0, 2, 3, 1]),
        NODE(op_type, ["turned", "a"], ["b"], "left"),
        NODE("Transpose", ["b"], ["c"], "back", perm=[0, 3, 1, 2]),
        NODE(op_type, ["c", "s"], ["y"], "right"),
    ]
    whole = np.broadcast_to(np.asarray(constant, np.float32), (9, 7, 8)) + np.float32(4)
    weights = {"turned": whole.transpose(1, 2, 0) if np.ndim(constant) == 3 else np.float32(4), "s": constant}
    operators, _ = fused(nodes, weights)
    assert "Transpose" not in operators


def test_other_orders_of_axes_stay(fused) -> None:  # type: ignore[no-untyped-def]
    """Two Transposes that do not undo each other are not taken for a pair."""
    nodes = [
        NODE("Transpose", ["x"], ["a"], "front", perm=[0, 2, 1, 3]),
        NODE("Relu", ["a"], ["b"], "relu"),
        NODE("Transpose", ["b"], ["c"], "back", perm=[0, 1, 3, 2]),
        NODE("Transpose", ["c"], ["d"], "more", perm=[0, 3, 1, 2]),
        NODE("Exp", ["d"], ["y"], "exp"),
    ]
    operators, _ = fused(nodes, {}, channels=7)
    assert operators["Relu"] == operators["Exp"] == 1
