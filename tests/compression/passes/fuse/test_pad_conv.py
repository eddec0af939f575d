"""Zero padding before Conv becomes the Conv's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper


def _nodes(amounts: list[int], value: float | None = None, **attributes: Any) -> tuple[list[Any], dict[str, Any]]:
    inputs = ["x", "pads", *(["value"] if value is not None else [])]
    mode = attributes.pop("mode", "constant")
    nodes = [
        helper.make_node("Pad", inputs, ["p"], name="pad", mode=mode),
        helper.make_node("Conv", ["p", "w"], ["y"], name="conv", **attributes),
    ]
    weights: dict[str, Any] = {
        "pads": np.array(amounts, np.int64),
        "w": np.random.default_rng(1).standard_normal((4, 3, 3, 3)),
    }
    return nodes, weights | ({} if value is None else {"value": np.float32(value)})


@pytest.mark.parametrize("attributes", [{}, {"pads": [1, 0, 1, 0]}, {"auto_pad": "VALID"}, {"strides": [2, 2]}])
@pytest.mark.parametrize("value", [None, 0.0])
def test_zeros_are_merged(build: Any, fuse: Any, ops: Any, attributes: dict[str, Any], value: float | None) -> None:
    """Amounts add up; asymmetric ones as well."""
    result = fuse(build(*_nodes([0, 0, 1, 2, 0, 0, 3, 0], value, **attributes)))
    assert ops(result) == ["Conv"]
    assert result.changes["pad_conv"] == 1


@pytest.mark.parametrize(
    ("pads", "value", "attributes"),
    [
        ([0, 0, 1, 1, 0, 0, 1, 1], 0.5, {}),
        ([0, 0, 1, 1, 0, 0, 1, 1], None, {"mode": "reflect"}),
        ([0, 0, 1, 1, 0, 0, 1, 1], None, {"auto_pad": "SAME_LOWER"}),
        ([0, 0, -1, 1, 0, 0, 1, 1], None, {}),
    ],
)
def test_other_paddings_stay(
    build: Any, fuse: Any, ops: Any, pads: list[int], value: float | None, attributes: dict[str, Any]
) -> None:
    """Other values, modes, automatic padding and crops have no counterpart; the reason is told."""
    result = fuse(build(*_nodes(pads, value, **attributes)))
    assert ops(result) == ["Pad", "Conv"]
    assert [skip.node for skip in result.skipped] == [
        next(n.name or n.outputs[0].name for n in result.model.nodes() if n.op_type == "Conv")
    ]


def test_pads_as_attribute(build: Any, fuse: Any, ops: Any) -> None:
    """Up to opset 10 the amounts are an attribute."""
    nodes = [
        helper.make_node("Pad", ["x"], ["p"], pads=[0, 0, 1, 1, 0, 0, 1, 1]),
        helper.make_node("Conv", ["p", "w"], ["y"]),
    ]
    assert ops(fuse(build(nodes, {"w": np.random.default_rng(1).standard_normal((4, 3, 3, 3))}, opset=10))) == ["Conv"]
