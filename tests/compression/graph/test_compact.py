"""What is written into files: the same numbers in fewer bytes."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import pytest
from modelpress_compression.graph.compact import compacted, stored_bytes
from modelpress_compression.loaders import load
from modelpress_compression.model import GIVEN_NAME, Model
from modelpress_compression.runtime import open_session, run, session_of
from onnx import helper

RNG = np.random.default_rng(3)
EXACT = RNG.standard_normal((64, 64)).astype(np.float16).astype(np.float32)


def _model(channel_model, weight, **extra) -> Model:  # type: ignore[no-untyped-def]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "product"), helper.make_node("Relu", ["h"], ["y"], "relu")]
    return channel_model(nodes, {"w": weight, **extra}, ["n", 64], ["n", 64])


@pytest.mark.parametrize(
    ("weight", "most_bytes"),
    [
        (EXACT, 2 * EXACT.size + 600),
        (EXACT.astype(ml_dtypes.bfloat16).astype(np.float32) * np.float32(2.0**40), 2 * EXACT.size + 600),
        (np.full((64, 64), 0.3, np.float32), 700),
        (RNG.standard_normal((64, 64)).astype(np.float32), 4 * EXACT.size + 600),
    ],
)
def test_numbers_stay_the_same(channel_model, outputs_of, loaded_operators, tmp_path: Path, weight, most_bytes) -> None:  # type: ignore[no-untyped-def]
    """Bit for bit, in fewer bytes where that can be; onnxruntime runs the product alone."""
    model = _model(channel_model, weight)
    small = compacted(model)
    small.save(tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size <= most_bytes
    x = RNG.standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_array_equal(outputs_of(small, x), outputs_of(model, x))
    assert loaded_operators(small) == loaded_operators(model)
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), weight)


def test_weights_may_stay(channel_model) -> None:  # type: ignore[no-untyped-def]
    """Of a model that is given back as it was, the types of its weights are kept."""
    model = compacted(_model(channel_model, EXACT), weights=False)
    assert [node.op_type for node in model.graph] == ["MatMul", "Relu"]


def test_names_of_values_that_passes_made_are_short(channel_model, outputs_of) -> None:  # type: ignore[no-untyped-def]
    """New ones meet none that is there; those of users, of outputs, of constants and of nodes stay."""
    nodes = [
        helper.make_node("Relu", ["x"], ["v0"], "relu"),
        helper.make_node("Neg", ["v0"], ["long_Neg"], "long/Neg"),
        helper.make_node("MatMul", ["long_Neg", "w"], ["own"], "product"),
        helper.make_node("Abs", ["own"], ["y"], "y/Abs"),
    ]
    model = channel_model(nodes, {"w": EXACT}, ["n", 64], ["n", 64])
    small = compacted(model, weights=False)
    assert [node.outputs[0].name for node in small.graph] == ["v0", "v1", "own", "y"]
    assert [node.name for node in small.graph] == ["relu", "long/Neg", "product", "y/Abs"]
    assert list(small.graph.initializers) == ["w"]
    assert model.graph.node(1).outputs[0].name == "long_Neg"
    x = RNG.standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_array_equal(outputs_of(small, x), outputs_of(model, x))


def test_equal_small_constants_become_one(channel_model, outputs_of) -> None:  # type: ignore[no-untyped-def]
    """Two biases of the same numbers are written once; outputs keep their shapes, values between lose theirs."""
    bias = RNG.standard_normal(64).astype(np.float32)
    nodes = [helper.make_node("Add", ["x", "b"], ["h"], "one"), helper.make_node("Mul", ["h", "c"], ["y"], "two")]
    model = channel_model(nodes, {"b": bias, "c": bias}, ["n", 64], ["n", 64])
    small = compacted(model)
    assert list(small.graph.initializers) == ["b"]
    assert small.graph.node(0).outputs[0].shape is None
    assert list(small.outputs[0].shape) == list(model.outputs[0].shape)
    x = RNG.standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_array_equal(outputs_of(small, x), outputs_of(model, x))


def test_what_is_given_back_is_no_larger_than_it_was(tmp_path: Path) -> None:
    """Shapes that the loader found, of outputs of branches and loops, of a constant that is an output too, are not
    written; the model still runs and gives the same."""
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(operator, ["h"], ["z"])], name, [], [helper.make_tensor_value_info("z", 1, None)]
        )
        for name, operator in (("then", "Tanh"), ("else", "Relu"))
    }
    body = helper.make_graph(
        [helper.make_node("MatMul", ["before", "w"], ["after"]), helper.make_node("Identity", ["after"], ["row"])],
        "body",
        [helper.make_tensor_value_info("before", 1, ["n", 64]), helper.make_tensor_value_info("given", 1, [64])],
        [helper.make_tensor_value_info(name, 1, None) for name in ("after", "row")],
    )
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("If", ["c"], ["b"], **branches),
            helper.make_node("Scan", ["b", "x"], ["y", "rows"], body=body, num_scan_inputs=1),
        ],
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", 64]), helper.make_tensor_value_info("c", 9, [])],
        [helper.make_tensor_value_info("y", 1, ["n", 64]), helper.make_tensor_value_info("w", 1, [64, 64])],
        [onnx.numpy_helper.from_array(EXACT, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(proto, tmp_path / "given.onnx")
    model = load(tmp_path / "given.onnx")
    compacted(model, weights=False).save(tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").stat().st_size <= (tmp_path / "given.onnx").stat().st_size
    onnx.checker.check_model(tmp_path / "back.onnx", full_check=True)
    feeds = {"x": RNG.standard_normal((3, 64)).astype(np.float32), "c": np.array(True)}
    given, back = (run(open_session(tmp_path / name), feeds) for name in ("given.onnx", "back.onnx"))
    np.testing.assert_array_equal(given["y"], back["y"])


def test_stored_bytes() -> None:
    """Of uniform numbers one counts, of those that 16 bits hold half, of others all."""
    assert stored_bytes(np.zeros((64, 64), np.float32)) == 4
    assert stored_bytes(EXACT) == 2 * EXACT.size
    assert stored_bytes(RNG.standard_normal(1000).astype(np.float32)) == 4000


def test_names_that_the_loader_made_are_not_written(channel_model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Nodes without a name have none in the file either: a name takes 15 bytes and more of each."""
    model = _model(channel_model, EXACT)
    for node in model.nodes():
        node.meta[GIVEN_NAME] = node.name
    compacted(model, weights=False).save(tmp_path / "small.onnx")
    assert [node.name for node in onnx.load(tmp_path / "small.onnx").graph.node] == ["", ""]


def test_statistics_that_onnxruntime_writes_over_stand_alone(channel_model, outputs_of) -> None:  # type: ignore[no-untyped-def]
    """Under training_mode it puts new variances into the constant that holds the old ones: as one constant with equal
    scales, these would change from run to run. Bit for bit in three runs."""
    ones = np.ones(64, np.float32)
    inputs = ["x", "scale", "bias", "mean", "variance"]
    nodes = [helper.make_node("BatchNormalization", inputs, ["y", "m", "v"], "norm", training_mode=1)]
    weights = {"scale": ones, "bias": 0 * ones, "mean": 0 * ones, "variance": ones}
    model = channel_model(nodes, weights, ["n", 64], ["n", 64])
    x = 3 * RNG.standard_normal((5, 64)).astype(np.float32)
    with session_of(compacted(model)) as session:
        runs = [next(iter(run(session, {"x": x}).values())) for _ in range(3)]
    for got in runs:
        np.testing.assert_array_equal(got, outputs_of(model, x))


def test_what_exporters_write_for_debugging_is_left_out(channel_model) -> None:  # type: ignore[no-untyped-def]
    """Of nodes and values; the whole model's metadata is the user's."""
    model = _model(channel_model, EXACT)
    node = next(iter(model.graph))
    node.metadata_props["pkg.torch.onnx.stack_trace"] = "File '/home/me/model.py'"
    node.outputs[0].metadata_props["pkg.onnxscript.optimizer"] = "folded"
    model.ir.metadata_props["classes"] = "cat,dog"
    proto = onnx_ir.to_proto(compacted(model).ir)
    assert not any(one.metadata_props for one in (*proto.graph.node, *proto.graph.value_info))
    assert {one.key: one.value for one in proto.metadata_props} == {"classes": "cat,dog"}
    assert node.metadata_props
