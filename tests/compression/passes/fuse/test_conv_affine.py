"""Products and sums with constants around Conv go into its weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper


def _conv(source: str = "x", target: str = "c", **attributes: Any) -> Any:
    return helper.make_node("Conv", [source, "w", "b"], [target], **attributes)


def _weights(rng: np.random.Generator) -> dict[str, Any]:
    return {"w": rng.standard_normal((6, 3, 3, 3)), "b": rng.standard_normal(6)}


@pytest.mark.parametrize("op", ["Mul", "Div", "Add", "Sub"])
@pytest.mark.parametrize("shape", [(), (1,), (6, 1, 1), (1, 6, 1, 1)])
def test_constant_behind_conv(build: Any, fuse: Any, ops: Any, rng: Any, op: str, shape: tuple[int, ...]) -> None:
    """One number, or one for each output channel."""
    weights = _weights(rng) | {"k": rng.random(shape) + 0.5}
    result = fuse(build([_conv(), helper.make_node(op, ["c", "k"], ["y"])], weights))
    assert ops(result) == ["Conv"]
    assert result.changes == {"conv_affine": 1}


def test_constant_minus_conv(build: Any, fuse: Any, ops: Any, rng: Any) -> None:
    """k - (W x + b) = -W x + (k - b)."""
    assert ops(fuse(build([_conv(), helper.make_node("Sub", ["k", "c"], ["y"])], _weights(rng) | {"k": 2.0}))) == [
        "Conv"
    ]


@pytest.mark.parametrize("shape", [(6,), (6, 6), (1, 1, 6, 6), (1, 1, 1, 1, 1)])
def test_constant_along_other_axes_stays(build: Any, fuse: Any, ops: Any, rng: Any, shape: tuple[int, ...]) -> None:
    """[6] runs along the width here; five axes would add one."""
    weights = _weights(rng) | {"k": rng.random(shape) + 0.5}
    result = fuse(build([_conv(), helper.make_node("Mul", ["c", "k"], ["y"], name="scale")], weights))
    assert ops(result) == ["Conv", "Mul"]
    assert [skip.node for skip in result.skipped] == ["scale"]


def test_chain_behind_conv(build: Any, fuse: Any, ops: Any, rng: Any) -> None:
    """Mul, Add, Div in one go."""
    nodes = [
        _conv(),
        helper.make_node("Mul", ["c", "k"], ["d"]),
        helper.make_node("Add", ["l", "d"], ["e"]),
        helper.make_node("Div", ["e", "k"], ["y"]),
    ]
    assert ops(fuse(build(nodes, _weights(rng) | {"k": 2.5, "l": rng.random((6, 1, 1))}))) == ["Conv"]


@pytest.mark.parametrize("group", [1, 3])
def test_scale_before_conv(build: Any, fuse: Any, ops: Any, rng: Any, group: int) -> None:
    """Padding does not matter, since the scale of zero is zero."""
    weights = {"w": rng.standard_normal((6, 3 // group, 3, 3)), "b": rng.standard_normal(6), "k": rng.random((3, 1, 1))}
    nodes = [helper.make_node("Mul", ["x", "k"], ["s"]), _conv("s", "y", group=group, pads=[1, 1, 1, 1])]
    result = fuse(build(nodes, weights))
    assert ops(result) == ["Conv"]
    assert result.changes == {"affine_conv": 1}


@pytest.mark.parametrize("group", [1, 3])
def test_sum_before_conv_without_padding(build: Any, fuse: Any, ops: Any, rng: Any, group: int) -> None:
    """The sum goes into the bias."""
    weights = {"w": rng.standard_normal((6, 3 // group, 3, 3)), "b": rng.standard_normal(6), "k": rng.random((3, 1, 1))}
    assert ops(fuse(build([helper.make_node("Add", ["x", "k"], ["s"]), _conv("s", "y", group=group)], weights))) == [
        "Conv"
    ]


@pytest.mark.parametrize("padding", [{"pads": [1, 1, 1, 1]}, {"auto_pad": "SAME_UPPER"}])
def test_sum_before_padded_conv_stays(build: Any, fuse: Any, ops: Any, rng: Any, padding: dict[str, Any]) -> None:
    """At the border the padded zeros carry no summand."""
    nodes = [helper.make_node("Add", ["x", "k"], ["s"]), _conv("s", "y", **padding)]
    result = fuse(build(nodes, _weights(rng) | {"k": 0.7}))
    assert ops(result) == ["Add", "Conv"]
    assert "border" in result.skipped[0].reason


@pytest.mark.parametrize("shape", [(), (3, 1, 1)])
def test_scale_and_sum_before_padded_conv(build: Any, fuse: Any, ops: Any, rng: Any, shape: tuple[int, ...]) -> None:
    """c x + d = c (x + d / c): the Mul goes, the Add stays."""
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["s"]),
        helper.make_node("Add", ["s", "d"], ["t"]),
        _conv("t", "y", pads=[1, 1, 1, 1]),
    ]
    weights = _weights(rng) | {"k": rng.random(shape) + 0.5, "d": rng.random(shape)}
    assert ops(fuse(build(nodes, weights))) == ["Add", "Conv"]


def test_tiny_scale_is_not_divided_by(build: Any, fuse: Any, ops: Any, rng: Any) -> None:
    """d / c would drown x."""
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["s"]),
        helper.make_node("Add", ["s", "d"], ["t"]),
        _conv("t", "y", pads=[1, 1, 1, 1]),
    ]
    assert ops(fuse(build(nodes, _weights(rng) | {"k": 1e-6, "d": 1.0}))) == ["Mul", "Add", "Conv"]


def test_division_by_zero_stays(build: Any, fuse: Any, ops: Any, rng: Any) -> None:
    """An infinite scale would make NaN of the weights; the graph computes infinities as before."""
    nodes = [
        _conv(),
        helper.make_node("Div", ["c", "k"], ["z"]),
        helper.make_node("Sigmoid", ["z"], ["y"]),
    ]
    assert ops(fuse(build(nodes, _weights(rng) | {"k": 0.0}))) == ["Conv", "Div", "Sigmoid"]
