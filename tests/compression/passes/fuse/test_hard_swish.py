"""Hard swish and hard sigmoid are recognized in every form that exporters write."""

from __future__ import annotations

from typing import Any

import pytest
from modelpress_compression.passes.fuse.config import FuseConfig
from onnx import helper


def _chain(form: str) -> list[Any]:
    start = [
        helper.make_node("Add", ["x", "three"], ["a"]),
        helper.make_node("Clip", ["a", "zero", "six"], ["c"], name="clip"),
    ]
    ends = {
        "product, then / 6": [("Mul", ["x", "c"], "m"), ("Div", ["m", "six1"], "y")],
        "product, then * 1/6": [("Mul", ["c", "x"], "m"), ("Mul", ["m", "sixth"], "y")],
        "/ 6, then product": [("Div", ["c", "six1"], "d"), ("Mul", ["x", "d"], "y")],
        "gate": [("Div", ["c", "six1"], "y")],
        "other divisor": [("Mul", ["x", "c"], "m"), ("Div", ["m", "three"], "y")],
    }
    return start + [helper.make_node(op, inputs, [target]) for op, inputs, target in ends[form]]


_WEIGHTS = {"three": [3.0], "zero": 0.0, "six": 6.0, "six1": [6.0], "sixth": 1 / 6}


@pytest.mark.parametrize("form", ["product, then / 6", "product, then * 1/6", "/ 6, then product"])
@pytest.mark.parametrize(("opset", "wanted"), [(12, ["HardSigmoid", "Mul"]), (17, ["HardSwish"])])
def test_hard_swish(build: Any, fuse: Any, ops: Any, form: str, opset: int, wanted: list[str]) -> None:
    """HardSwish from opset 14 on; before, HardSigmoid and Mul."""
    result = fuse(build(_chain(form), _WEIGHTS, opset=opset))
    assert ops(result) == wanted
    assert result.changes["hard_swish"] >= 1
    names = [node.name for node in result.model.nodes()]
    assert len(set(names)) == len(names)


def test_hard_sigmoid(build: Any, fuse: Any, ops: Any) -> None:
    """The gate alone."""
    assert ops(fuse(build(_chain("gate"), _WEIGHTS))) == ["HardSigmoid"]


def test_other_divisor_stays(build: Any, fuse: Any, ops: Any) -> None:
    """x * clip(x + 3, 0, 6) / 3 is something else."""
    result = fuse(build(_chain("other divisor"), _WEIGHTS))
    assert ops(result) == ["Add", "Clip", "Mul", "Div"]
    assert [skip.node for skip in result.skipped] == ["clip"]


def test_switched_off(build: Any, fuse: Any, ops: Any) -> None:
    """`activations: false` leaves the chain alone."""
    assert "Clip" in ops(fuse(build(_chain("gate"), _WEIGHTS), FuseConfig(activations=False)))


def test_between_convolutions(build: Any, fuse: Any, ops: Any, rng: Any) -> None:
    """Conv, scale, hard swish, scale, Conv: the scales go into the weights on both sides."""
    nodes = [helper.make_node("Conv", ["in", "w"], ["h"]), helper.make_node("Mul", ["h", "k"], ["x0"])]
    chain = _chain("product, then / 6")
    for node in chain:
        node.input[:] = ["x0" if name == "x" else name for name in node.input]
        node.output[:] = ["s" if name == "y" else name for name in node.output]
    nodes += [*chain, helper.make_node("Mul", ["s", "k"], ["t"]), helper.make_node("Conv", ["t", "w2"], ["y"])]
    nodes[0].input[0] = "x"
    weights = _WEIGHTS | {"w": rng.standard_normal((4, 3, 3, 3)), "w2": rng.standard_normal((2, 4, 1, 1)), "k": [1.7]}
    assert ops(fuse(build(nodes, weights, opset=12))) == ["Conv", "HardSigmoid", "Mul", "Conv"]
