"""What every loaded graph is like."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from modelpress_compression.errors import ModelNotRunnableError
from modelpress_compression.loaders import load
from modelpress_compression.model import MAX_IR_VERSION, MAX_OPSET
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from oracles.plain_run import run_onnx


def constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))


def test_constants_become_initializers(tmp_path: Path, make: SimpleNamespace) -> None:
    """In the main graph and in the branches of an If."""
    weight = np.arange(4, dtype=np.float32)
    branches = {
        name: helper.make_graph(
            [constant(f"{name}_w", weight * factor), helper.make_node("Mul", ["x", f"{name}_w"], [f"{name}_y"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, ["N", 4])],
        )
        for name, factor in (("then_branch", 2), ("else_branch", 3))
    }
    nodes = [
        constant("shift", weight),
        helper.make_node("Add", ["x", "shift"], ["shifted"]),
        helper.make_node("ReduceSum", ["shifted"], ["total"], keepdims=0),
        constant("zero", np.float32(0)),
        helper.make_node("Greater", ["total", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], **branches),
    ]
    path = make.write_onnx(make.onnx_model(nodes), tmp_path / "m.onnx")
    model = load(path)
    assert not [node for node in model.nodes() if node.op_type == "Constant"]
    assert sum(len(graph.initializers) for graph in model.graphs()) == 4
    x = np.full((1, 4), 2, np.float32)
    np.testing.assert_array_equal(run_onnx(model, [{"x": x}, {"x": -3 * x}])[1]["y"], -6 * weight[None] * 3)


def test_nodes_get_names_that_stay(tmp_path: Path, make: SimpleNamespace) -> None:
    """Unnamed and doubly named nodes get unique names, the same ones every time; others keep theirs."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"], name="mine"),
        helper.make_node("Relu", ["b"], ["c"], name="mine"),
        helper.make_node("Relu", ["c"], ["y"], name="Relu_0"),
    ]
    path = make.write_onnx(make.onnx_model(nodes), tmp_path / "m.onnx")
    names = [node.name for node in load(path).nodes()]
    assert names == ["Relu_1", "mine", "mine_0", "Relu_0"]
    assert names == [node.name for node in load(path).nodes()]


def test_initializers_are_no_inputs(tmp_path: Path, make: SimpleNamespace) -> None:
    """As files of IR version 3 list them; the version is raised."""
    weight = numpy_helper.from_array(np.ones(4, np.float32), "w")
    proto = make.onnx_model(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        initializers=[weight],
        inputs={"x": ["N", 4], "w": [4]},
        ir_version=3,
        opset=13,
    )
    model = load(make.write_onnx(proto, tmp_path / "m.onnx"))
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert model.ir.ir_version == 8


def test_shapes_are_inferred(tmp_path: Path, make: SimpleNamespace) -> None:
    """Through a Flatten with a dynamic batch."""
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Flatten", ["a"], ["y"])]
    proto = make.onnx_model(nodes, inputs={"x": ["N", 2, 3]}, outputs={"y": ["N", "k"]})
    model = load(make.write_onnx(proto, tmp_path / "m.onnx"))
    assert [str(spec) for spec in model.outputs] == ["y:float32[N,6]"]


@pytest.mark.parametrize("opset", [9, 11, 12])
def test_old_operator_sets_are_raised(tmp_path: Path, make: SimpleNamespace, opset: int) -> None:
    """To 17, with the same numbers; Squeeze's axes move from an attribute to an input on the way."""
    nodes = [
        helper.make_node("Unsqueeze", ["x"], ["a"], axes=[0]),
        helper.make_node("Squeeze", ["a"], ["b"], axes=[0]),
        helper.make_node("Softmax", ["b"], ["y"], axis=1),
    ]
    path = make.write_onnx(make.onnx_model(nodes, opset=opset, ir_version=4), tmp_path / "m.onnx")
    model = load(path)
    assert model.opset == 17
    assert not model.warnings
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    wanted = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    np.testing.assert_allclose(run_onnx(model, [{"x": x}])[0]["y"], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(("operator", "opset"), [("Upsample", 9), ("Resize", 10)])
@pytest.mark.parametrize("factors", [(2.0, 2.0), (1.5, 2.5)])
def test_images_are_enlarged_as_before(  # type: ignore[no-untyped-def]
    tmp_path: Path, make: SimpleNamespace, operator, opset, mode, factors
) -> None:
    """Newer operator sets find coordinates otherwise by default; outputs are those of the file, equal to 1e-6."""
    path = make.write_onnx(
        make.onnx_model(
            [helper.make_node(operator, ["x", "scales"], ["y"], mode=mode)],
            inputs={"x": [1, 2, "h", "w"]},
            outputs={"y": [1, 2, "h2", "w2"]},
            initializers=[numpy_helper.from_array(np.asarray([1, 1, *factors], np.float32), "scales")],
            opset=opset,
            ir_version=4,
        ),
        tmp_path / "m.onnx",
    )
    model = load(path)
    assert model.opset == 17
    x = {"x": np.random.default_rng(0).standard_normal((1, 2, 5, 7)).astype(np.float32)}
    (expected,) = InferenceSession(path).run(None, x)
    np.testing.assert_allclose(run_onnx(model, [x])[0]["y"], expected, atol=1e-6)


def test_files_newer_than_onnxruntime(tmp_path: Path, make: SimpleNamespace) -> None:
    """What onnx writes by default is lowered where its operators allow."""
    relu = helper.make_node("Relu", ["x"], ["y"])
    newest = onnx.defs.onnx_opset_version()
    assert newest > MAX_OPSET
    path = make.write_onnx(make.onnx_model([relu], opset=newest, ir_version=14), tmp_path / "m.onnx")
    model = load(path)
    assert model.opset == MAX_OPSET
    assert model.ir.ir_version == MAX_IR_VERSION


def test_operators_newer_than_onnxruntime(tmp_path: Path, make: SimpleNamespace) -> None:
    """An operator that came after what onnxruntime loads is named in the error."""
    newest = onnx.defs.onnx_opset_version()
    schemas = [
        schema
        for schema in onnx.defs.get_all_schemas()
        if schema.domain == "" and schema.since_version > MAX_OPSET and schema.min_input == schema.max_input == 1
    ]
    if not schemas:
        pytest.skip("this version of onnx has no unary operator that new")
    node = helper.make_node(schemas[0].name, ["x"], ["y"])
    path = make.write_onnx(make.onnx_model([node], opset=newest, ir_version=14), tmp_path / "m.onnx")
    with pytest.raises(ModelNotRunnableError, match=rf"{schemas[0].name}.*opset_version={MAX_OPSET}"):
        load(path)


def test_an_operator_set_that_cannot_be_raised_stays(tmp_path: Path, make: SimpleNamespace) -> None:
    """Upsample ended with opset 9; whatever the converter makes of it, the model runs as before."""
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "s")
    proto = make.onnx_model(
        [helper.make_node("Upsample", ["x", "s"], ["y"], mode="nearest")],
        initializers=[scales],
        inputs={"x": ["N", 1, 2, 2]},
        outputs={"y": ["N", 1, 4, 4]},
        opset=9,
        ir_version=4,
    )
    model = load(make.write_onnx(proto, tmp_path / "m.onnx"))
    assert model.opset >= 13 or "could not be raised" in model.warnings[0]
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    np.testing.assert_array_equal(run_onnx(model, [{"x": x}])[0]["y"], x.repeat(2, 2).repeat(2, 3))


def test_loading_twice_changes_nothing(tmp_path: Path, make: SimpleNamespace) -> None:
    """A saved normalized model loads as itself."""
    nodes = [constant("c", np.ones(4, np.float32)), helper.make_node("Add", ["x", "c"], ["y"])]
    model = load(make.write_onnx(make.onnx_model(nodes), tmp_path / "m.onnx"))
    again = load(model.save(tmp_path / "n.onnx")[0])
    assert [node.name for node in again.nodes()] == [node.name for node in model.nodes()]
    assert again.inputs == model.inputs
    assert again.outputs == model.outputs


def test_dimensions_without_a_name(tmp_path: Path, make: SimpleNamespace) -> None:
    """`?` is how some exporters write "unknown", not a dimension called so."""
    proto = make.onnx_model(
        [helper.make_node("Relu", ["x"], ["y"])], inputs={"x": ["?", "n"]}, outputs={"y": ["?", "n"]}
    )
    model = load(make.write_onnx(proto, tmp_path / "m.onnx"))
    assert model.inputs[0].shape == (None, "n")


def test_unsorted_graphs_are_sorted(tmp_path: Path) -> None:
    """A node that stands before its input's producer, as some tools write it: onnxruntime takes that, and so do we."""
    nodes = [helper.make_node("Neg", ["a"], ["y"]), helper.make_node("Abs", ["x"], ["a"])]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "unsorted", infos[:1], infos[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "unsorted.onnx").write_bytes(proto.SerializeToString())
    model = load(tmp_path / "unsorted.onnx")
    assert [node.op_type for node in model.nodes()] == ["Abs", "Neg"]
    value = run_onnx(model, [{"x": np.full((1, 4), -2, np.float32)}])[0]["y"]
    np.testing.assert_array_equal(value, np.full((1, 4), -2, np.float32))


def test_negative_dimensions_are_unknown(tmp_path: Path, make: SimpleNamespace) -> None:
    """-1, which some exporters write for "any", is no extent; such a model of an old operator set loads too."""
    proto = make.onnx_model(
        [helper.make_node("Relu", ["x"], ["y"])], inputs={"x": [-1, 3]}, outputs={"y": [-1, 3]}, opset=11
    )
    model = load(make.write_onnx(proto, tmp_path / "m.onnx"))
    assert model.inputs[0].shape == (None, 3)


def test_strided_views_become_reshapes(tmp_path: Path, make: SimpleNamespace) -> None:
    """A Gather of 0, 1, 2, ... from a flat view is a Reshape; one in another order stays."""
    places = np.arange(8).reshape(2, 1, 4)
    nodes = [
        constant("flat", np.array([-1])),
        constant("places", places),
        constant("turned", places[:, :, ::-1].copy()),
        helper.make_node("Reshape", ["x", "flat"], ["row"]),
        helper.make_node("Gather", ["row", "places"], ["view"]),
        helper.make_node("Gather", ["row", "turned"], ["back"]),
        helper.make_node("Sub", ["view", "back"], ["y"]),
    ]
    model = load(
        make.write_onnx(make.onnx_model(nodes, inputs={"x": [2, 4]}, outputs={"y": [2, 1, 4]}), tmp_path / "m.onnx")
    )
    assert [node.op_type for node in model.nodes()].count("Reshape") == 2
    assert [node.op_type for node in model.nodes()].count("Gather") == 1
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(run_onnx(model, [{"x": x}])[0]["y"], (x - x[:, ::-1])[:, None])
