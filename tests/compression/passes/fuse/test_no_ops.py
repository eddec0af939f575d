"""Operators that change nothing go; those that carry an output's name or change shapes stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

_END = helper.make_node("Relu", ["h"], ["y"])


@pytest.mark.parametrize(
    ("node", "weights"),
    [
        (helper.make_node("Identity", ["x"], ["h"]), {}),
        (helper.make_node("Dropout", ["x"], ["h"]), {}),
        (helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT), {}),
        (helper.make_node("Transpose", ["x"], ["h"], perm=[0, 1, 2, 3]), {}),
        (helper.make_node("Concat", ["x"], ["h"], axis=1), {}),
        (helper.make_node("Mul", ["one", "x"], ["h"]), {"one": [1.0]}),
        (helper.make_node("Div", ["x", "one"], ["h"]), {"one": 1.0}),
        (helper.make_node("Add", ["x", "zero"], ["h"]), {"zero": [[0.0]]}),
        (helper.make_node("Sub", ["x", "zero"], ["h"]), {"zero": 0.0}),
        (helper.make_node("Pow", ["x", "one"], ["h"]), {"one": 1.0}),
    ],
    ids=lambda value: getattr(value, "op_type", ""),
)
def test_no_op_is_removed(build: Any, fuse: Any, ops: Any, node: Any, weights: dict[str, Any]) -> None:
    """One of each kind."""
    result = fuse(build([node, _END], weights))
    assert ops(result) == ["Relu"]
    assert sum(result.changes.values()) == 1


@pytest.mark.parametrize(
    ("node", "weights"),
    [
        (helper.make_node("Mul", ["x", "one"], ["h"]), {"one": np.ones((1, 1, 1, 1, 1))}),
        (helper.make_node("Mul", ["x", "ones"], ["h"]), {"ones": [2.0]}),
        (helper.make_node("Sub", ["zero", "x"], ["h"]), {"zero": 0.0}),
        (helper.make_node("Div", ["one", "x"], ["h"]), {"one": 1.0}),
        (helper.make_node("Transpose", ["x"], ["h"], perm=[0, 1, 3, 2]), {}),
    ],
)
def test_others_stay(build: Any, fuse: Any, ops: Any, node: Any, weights: dict[str, Any]) -> None:
    """Those that add an axis, change values, or have the constant first where order matters."""
    assert len(ops(fuse(build([node, _END], weights)))) == 2


def test_static_reshape_is_removed(build: Any, fuse: Any, ops: Any) -> None:
    """To the shape that the value has."""
    node = helper.make_node("Reshape", ["x", "shape"], ["h"])
    assert ops(fuse(build([node, _END], {"shape": np.array([3, 4], np.int64)}, shape=(3, 4)))) == ["Relu"]


def test_output_names_survive(build: Any, fuse: Any) -> None:
    """An Identity that names an output hands the name on, or stays where its input has one already."""
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Identity", ["h"], ["y"])]
    result = fuse(build(nodes, {}))
    assert [spec.name for spec in result.model.outputs] == ["y"]
    assert len(list(result.model.nodes())) == 1
    assert len(list(fuse(build(nodes, {}, output=("h", "y"))).model.nodes())) == 2
    assert len(list(fuse(build([helper.make_node("Identity", ["x"], ["y"])], {})).model.nodes())) == 1


def test_transposes_merge(build: Any, fuse: Any, ops: Any) -> None:
    """Two become one; two that undo each other become none."""

    def nodes(second: list[int]) -> list[Any]:
        return [
            helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]),
            helper.make_node("Transpose", ["t"], ["h"], perm=second),
            _END,
        ]

    assert ops(fuse(build(nodes([0, 2, 1, 3]), {}))) == ["Transpose", "Relu"]
    assert ops(fuse(build(nodes([0, 3, 1, 2]), {}))) == ["Relu"]
