"""BatchNormalization goes into the weights before it, and stays where that would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from modelpress_compression.passes.base import PassResult
from modelpress_compression.passes.fuse.config import FuseConfig
from onnx import TensorProto, helper

Ops = Callable[[PassResult], list[str]]


def _statistics(channels: int, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "g": rng.standard_normal(channels),
        "b": rng.standard_normal(channels),
        "m": rng.standard_normal(channels),
        "v": rng.random(channels) + 0.1,
    }


def _batchnorm(source: str = "c", target: str = "y") -> Any:
    return helper.make_node("BatchNormalization", [source, "g", "b", "m", "v"], [target], name="bn", epsilon=1e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("group", "opset"), [(1, 11), (1, 17), (3, 17), (1, 22)])
def test_conv_takes_the_batchnorm(
    build: Any, fuse: Any, ops: Any, rng: Any, bias: bool, group: int, opset: int
) -> None:
    """Grouped or not, with bias or without: one Conv is left, and computes the same."""
    conv = helper.make_node("Conv", ["x", "w", *(["cb"] if bias else [])], ["c"], name="conv", group=group)
    weights = {"w": rng.standard_normal((6, 3 // group, 3, 3)), **_statistics(6, rng)}
    weights |= {"cb": rng.standard_normal(6)} if bias else {}
    result = fuse(build([conv, _batchnorm()], weights, opset=opset))
    assert ops(result) == ["Conv"]
    assert result.changes["conv_batchnorm"] == 1
    assert next(result.model.nodes()).name == "conv"


@pytest.mark.parametrize("group", [1, 3])
def test_transposed_conv_takes_the_batchnorm(build: Any, fuse: Any, ops: Ops, rng: Any, group: int) -> None:
    """Output channels of ConvTranspose lie on axis 1 of the weight, group by group."""
    conv = helper.make_node("ConvTranspose", ["x", "w"], ["c"], group=group, strides=[2, 2])
    result = fuse(build([conv, _batchnorm()], {"w": rng.standard_normal((3, 6 // group, 3, 3)), **_statistics(6, rng)}))
    assert ops(result) == ["ConvTranspose"]


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_takes_the_batchnorm(build: Any, fuse: Any, ops: Ops, rng: Any, transposed: int) -> None:
    """alpha, beta and transB are respected."""
    shape = (6, 4) if transposed else (4, 6)
    gemm = helper.make_node("Gemm", ["x", "w", "cb"], ["c"], transB=transposed, alpha=0.5, beta=2.0)
    weights = {"w": rng.standard_normal(shape), "cb": rng.standard_normal(6), **_statistics(6, rng)}
    assert ops(fuse(build([gemm, _batchnorm()], weights, shape=("n", 4)))) == ["Gemm"]


def test_matmul_and_add_take_the_batchnorm(build: Any, fuse: Any, ops: Ops, rng: Any) -> None:
    """MatMul, Add, BatchNormalization become MatMul, Add."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "cb"], ["c"]), _batchnorm()]
    weights = {"w": rng.standard_normal((4, 6)), "cb": rng.standard_normal(6), **_statistics(6, rng)}
    assert ops(fuse(build(nodes, weights, shape=("n", 4)))) == ["MatMul", "Add"]


def test_shared_weight_stays(build: Any, fuse: Any, ops: Ops, rng: Any) -> None:
    """Changing a shared weight would change its other user."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        _batchnorm(target="z"),
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("Conv", ["s", "w"], ["d"]),
        helper.make_node("Add", ["z", "d"], ["y"]),
    ]
    result = fuse(build(nodes, {"w": rng.standard_normal((6, 3, 3, 3)), **_statistics(6, rng)}))
    assert "BatchNormalization" in ops(result)
    assert any("shared" in skip.reason and skip.node == "bn" for skip in result.skipped)


def test_output_used_elsewhere_stays(build: Any, fuse: Any, ops: Ops, rng: Any) -> None:
    """The value before the normalization is somebody else's input, or an output of the graph."""
    conv = helper.make_node("Conv", ["x", "w"], ["c"])
    weights = {"w": rng.standard_normal((6, 3, 3, 3)), **_statistics(6, rng)}
    used = [conv, _batchnorm(target="z"), helper.make_node("Add", ["c", "z"], ["y"])]
    for model in (build(used, weights), build([conv, _batchnorm()], weights, output=("y", "c"))):
        result = fuse(model)
        assert "BatchNormalization" in ops(result)
        assert any("used elsewhere" in skip.reason for skip in result.skipped)


def test_weight_that_is_an_input_stays(build: Any, fuse: Any, ops: Ops, rng: Any) -> None:
    """A default that a caller may override is not a constant."""
    extra = [helper.make_tensor_value_info("w", TensorProto.FLOAT, [6, 3, 3, 3])]
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), _batchnorm()]
    result = fuse(build(nodes, {"w": rng.standard_normal((6, 3, 3, 3)), **_statistics(6, rng)}, extra=extra))
    assert "BatchNormalization" in ops(result)
    assert any("not constant" in skip.reason for skip in result.skipped)


def test_batchnorm_without_conv_says_why(build: Any, fuse: Any, rng: Any) -> None:
    """Behind a Relu there is no weight to take it."""
    result = fuse(build([helper.make_node("Relu", ["x"], ["c"]), _batchnorm()], _statistics(3, rng)))
    assert [skip.node for skip in result.skipped] == ["bn"]
    assert "Relu" in result.skipped[0].reason


def test_excluded_nodes_stay(build: Any, fuse: Any, ops: Ops, rng: Any) -> None:
    """Neither an excluded BatchNormalization nor the partner of an excluded Conv is merged."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="conv_1"), _batchnorm()]
    model = build(nodes, {"w": rng.standard_normal((6, 3, 3, 3)), **_statistics(6, rng)})
    for pattern in ("bn", "conv_*"):
        assert ops(fuse(model, FuseConfig(exclude=(pattern,)))) == ["Conv", "BatchNormalization"]


def test_inside_a_subgraph(build: Any, fuse: Any, ops: Ops, rng: Any) -> None:
    """Weights of an If branch lie outside of it; the merge happens all the same."""
    branch = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["c"]), _batchnorm(target="t")],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Conv", ["x", "w2"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], then_branch=branch, else_branch=other),
    ]
    weights = {"w": rng.standard_normal((6, 3, 3, 3)), "w2": rng.standard_normal((6, 3, 3, 3)), "zero": 0.0}
    result = fuse(build(nodes, weights | _statistics(6, rng)))
    assert result.changes["conv_batchnorm"] == 1
    assert "BatchNormalization" not in ops(result)
