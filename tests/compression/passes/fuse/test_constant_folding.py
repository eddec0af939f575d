"""What depends on constants alone is computed once, unless the file would grow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from modelpress_compression.passes.fuse.config import FuseConfig
from onnx import TensorProto, helper, numpy_helper


def test_weight_in_pieces_becomes_one(build: Any, fuse: Any, ops: Any, rng: Any) -> None:
    """Slices put together in another order, as exporters write LSTM gates: one initializer, the old one gone."""
    nodes = [
        helper.make_node("Slice", ["w", "s0", "s1", "axis"], ["a"]),
        helper.make_node("Slice", ["w", "s1", "s2", "axis"], ["b"]),
        helper.make_node("Concat", ["b", "a"], ["c"], axis=0),
        helper.make_node("Transpose", ["c"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    bounds = {name: np.array([value], np.int64) for name, value in (("s0", 0), ("s1", 40), ("s2", 64), ("axis", 0))}
    model = build(nodes, {"w": rng.standard_normal((64, 64)), **bounds}, shape=("n", 64))
    result = fuse(model)
    assert ops(result) == ["MatMul"]
    assert result.changes == {"constant_folding": 4}
    assert result.model.weight_bytes() == 64 * 64 * 4


@pytest.mark.parametrize("elements", [1 << 15, 1 << 29])
def test_bomb_is_not_folded(build: Any, fuse: Any, ops: Any, elements: int) -> None:
    """A ConstantOfShape of 128 KiB, or of 2 GiB that the graph hardly touches, stays as it is."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["big"], value=numpy_helper.from_array(np.ones(1, np.float32))),
        helper.make_node("Slice", ["big", "zero", "one"], ["part"]),
        helper.make_node("Mul", ["x", "part"], ["y"]),
    ]
    weights = {name: np.array([v], np.int64) for name, v in (("shape", elements), ("zero", 0), ("one", 1))}
    model = build(nodes, weights)
    if elements > 1 << 20:
        from modelpress_compression.passes.fuse.constant_folding import fold_constants
        from modelpress_compression.passes.fuse.rewriting import Scope

        clone = model.clone()
        fold_constants(Scope(clone))
        assert next(node.op_type for node in clone.nodes()) == "ConstantOfShape"
        return
    assert ops(fuse(model)) == ["ConstantOfShape", "Slice", "Mul"]


def test_expansion_is_not_folded(build: Any, fuse: Any, ops: Any, rng: Any) -> None:
    """Expand of one row to a thousand."""
    nodes = [helper.make_node("Expand", ["row", "shape"], ["big"]), helper.make_node("Add", ["x", "big"], ["y"])]
    weights = {"row": rng.standard_normal((1, 64)), "shape": np.array([1000, 64], np.int64)}
    assert ops(fuse(build(nodes, weights, shape=("n", 1000, 64)))) == ["Expand", "Add"]


def test_small_growth_is_folded(build: Any, fuse: Any, ops: Any) -> None:
    """Shapes and ranges are worth their bytes."""
    nodes = [
        helper.make_node("Range", ["a", "b", "c"], ["r"]),
        helper.make_node("Cast", ["r"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "f"], ["y"]),
    ]
    weights = {"a": np.int64(0), "b": np.int64(8), "c": np.int64(1)}
    assert ops(fuse(build(nodes, weights))) == ["Add"]


def test_quantized_weight_stays_quantized(build: Any, fuse: Any, ops: Any) -> None:
    """DequantizeLinear of a constant is what makes the file small."""
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    weights = {"q": np.ones((64, 64), np.int8), "scale": 0.1, "zero": np.int8(0)}
    assert ops(fuse(build(nodes, weights, shape=("n", 64)))) == ["DequantizeLinear", "MatMul"]


def test_if_with_constant_condition(build: Any, fuse: Any, ops: Any) -> None:
    """The branch that is taken comes in the If's place."""

    def branch(op: str) -> Any:
        return helper.make_graph(
            [helper.make_node(op, ["x"], [op])], op, [], [helper.make_tensor_value_info(op, TensorProto.FLOAT, None)]
        )

    node = helper.make_node("If", ["condition"], ["y"], then_branch=branch("Relu"), else_branch=branch("Tanh"))
    assert ops(fuse(build([node], {"condition": np.array(False)}))) == ["Tanh"]


def test_constant_nodes_of_a_branch(build: Any, fuse: Any, ops: Any, rng: Any) -> None:
    """Constant nodes inside of an If become initializers outside of it, where other passes find them."""

    def branch(name: str) -> Any:
        weight = numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), name)
        nodes = [
            helper.make_node("Constant", [], [f"{name}_w"], value=weight),
            helper.make_node("Transpose", [f"{name}_w"], [f"{name}_t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", f"{name}_t"], [f"{name}_o"]),
        ]
        output = helper.make_tensor_value_info(f"{name}_o", TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [output])

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Less", ["total", "zero"], ["negative"]),
        helper.make_node("If", ["negative"], ["y"], then_branch=branch("a"), else_branch=branch("b")),
    ]
    result = fuse(build(nodes, {"zero": 0.0}, shape=("n", 8)))
    assert sorted(ops(result)) == ["If", "Less", "MatMul", "MatMul", "ReduceSum"]
    assert len([v for v in result.model.graph.initializers.values() if v.shape is not None and len(v.shape) == 2]) == 2


def test_excluded_nodes_stay(build: Any, fuse: Any, ops: Any, rng: Any) -> None:
    """And so does what depends on them."""
    nodes = [
        helper.make_node("Exp", ["w"], ["e"], name="keep"),
        helper.make_node("Log", ["e"], ["l"]),
        helper.make_node("MatMul", ["x", "l"], ["y"]),
    ]
    model = build(nodes, {"w": rng.standard_normal((8, 8))}, shape=("n", 8))
    assert ops(fuse(model, FuseConfig(exclude=("keep",)))) == ["Exp", "Log", "MatMul"]
    assert ops(fuse(model)) == ["MatMul"]


def test_what_folding_cannot_follow_stays(build: Any, fuse: Any, ops: Any) -> None:
    """A sequence whose length an input decides; what stands beside it is folded all the same."""
    nodes = [
        helper.make_node("Neg", ["one"], ["minus"]),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ReduceMin", ["shape"], ["size"], keepdims=0),
        helper.make_node("SplitToSequence", ["x", "size"], ["parts"], axis=0),
        helper.make_node("ConcatFromSequence", ["parts"], ["whole"], axis=0),
        helper.make_node("Mul", ["whole", "minus"], ["y"]),
    ]
    result = fuse(build(nodes, {"one": np.ones(4, np.float32)}, shape=("n", 4)))
    assert ops(result) == ["Shape", "ReduceMin", "SplitToSequence", "ConcatFromSequence", "Mul"]


def test_outputs_keep_their_written_shapes(build: Any, fuse: Any) -> None:
    """Folding a sequence away tells more about the output than the file says: callers see what was written."""
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("SequenceConstruct", ["same", "x"], ["parts"]),
        helper.make_node("ConcatFromSequence", ["parts"], ["y"], axis=0),
    ]
    model = build(nodes, {}, shape=(2, 4))
    result = fuse(model)
    assert result.changes
    assert result.model.outputs == model.outputs
