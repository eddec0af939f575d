"""ONNX files: what is loaded, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from modelpress_compression.errors import (
    InvalidInputsError,
    ModelNotRunnableError,
    RejectedModelError,
    UnsupportedFormatError,
    UnsupportedOperatorError,
)
from modelpress_compression.loaders import load
from modelpress_compression.loaders.onnx_check import MAX_NODES
from modelpress_compression.model import Provenance
from modelpress_compression.runtime import explain, run, session_of
from onnx import TensorProto, helper, numpy_helper
from oracles.plain_run import run_onnx

RELU = helper.make_node("Relu", ["x"], ["y"])


def function(name: str, *calls: str) -> onnx.FunctionProto:
    """x -> calls one after the other -> y, in the domain 'own'."""
    values = ["x", *(f"v{index}" for index in range(len(calls) - 1)), "y"]
    nodes = [
        helper.make_node(call, [values[index]], [values[index + 1]], domain="" if call == "Relu" else "own")
        for index, call in enumerate(calls)
    ]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["x"], ["y"], nodes, opsets)


def calling(name: str) -> list[onnx.NodeProto]:
    return [helper.make_node(name, ["x"], ["y"], domain="own")]


def test_inputs_outputs_and_provenance(tmp_path: Path, make: SimpleNamespace) -> None:
    """Specs are the graph's; the provenance can be another's."""
    path = make.write_onnx(make.onnx_model([RELU]), tmp_path / "m.onnx")
    model = load(path)
    assert [str(spec) for spec in (*model.inputs, *model.outputs)] == ["x:float32[N,4]", "y:float32[N,4]"]
    assert model.provenance.format == "onnx"
    other = Provenance("state_dict", "ab" * 32, 5)
    assert load(path, provenance=other).provenance == other


def test_hints_name_and_fix_dimensions(tmp_path: Path, make: SimpleNamespace) -> None:
    """A word renames a dynamic dimension everywhere, a number fixes it."""
    path = make.write_onnx(make.onnx_model([RELU]), tmp_path / "m.onnx")
    assert [str(spec) for spec in load(path, ["x:float32[batch,4]"]).outputs] == ["y:float32[batch,4]"]
    assert [str(spec) for spec in load(path, ["x:float32[2,4]"]).inputs] == ["x:float32[2,4]"]


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        ("x:float32[batch,5]", "dimension 4 is fixed"),
        ("x:int64[batch,4]", "type is float32"),
        ("x:float32[batch,4,4]", "2 dimensions"),
    ],
)
def test_hints_that_contradict_the_graph(tmp_path: Path, make: SimpleNamespace, hint: str, said: str) -> None:
    """The error says what the model takes."""
    path = make.write_onnx(make.onnx_model([RELU]), tmp_path / "m.onnx")
    with pytest.raises(InvalidInputsError, match=said):
        load(path, [hint])


@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_cut_short(tmp_path: Path, make: SimpleNamespace, kept: float) -> None:
    """A part of a file is damaged."""
    raw = make.onnx_model([RELU]).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(raw[: int(len(raw) * kept)])
    with pytest.raises((UnsupportedFormatError, ModelNotRunnableError)):
        load(tmp_path / "m.onnx")


def test_no_nodes(tmp_path: Path, make: SimpleNamespace) -> None:
    """A graph without nodes is no model."""
    path = make.write_onnx(make.onnx_model([], outputs={"x": ["N", 4]}), tmp_path / "m.onnx")
    with pytest.raises(ModelNotRunnableError, match="no nodes"):
        load(path)


@pytest.mark.parametrize(("domain", "op"), [("", "Frobnicate"), ("acme", "Relu")])
def test_unknown_operators(tmp_path: Path, make: SimpleNamespace, domain: str, op: str) -> None:
    """Node, operator and domain stand in the message and in the metadata."""
    node = helper.make_node(op, ["x"], ["y"], name="strange_1", domain=domain)
    path = make.write_onnx(make.onnx_model([node], domains={"acme": 1}), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedOperatorError, match=f"'strange_1'.*'{op}'") as caught:
        load(path)
    assert caught.value.metadata["op_type"] == op
    assert caught.value.metadata["node"] == "strange_1"


def test_an_operator_unknown_to_onnxruntime(tmp_path: Path, make: SimpleNamespace) -> None:
    """A domain of onnxruntime's with an operator that it does not have."""
    node = helper.make_node("NoSuchKernel", ["x"], ["y"], name="k", domain="com.microsoft")
    path = make.write_onnx(make.onnx_model([node], domains={"com.microsoft": 1}), tmp_path / "m.onnx")
    with pytest.raises((UnsupportedOperatorError, ModelNotRunnableError), match="NoSuchKernel"):
        load(path)


def test_shapes_that_contradict_each_other(tmp_path: Path, make: SimpleNamespace) -> None:
    """What onnxruntime refuses is refused here, with its reason."""
    weight = numpy_helper.from_array(np.zeros((7, 4), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="bad")
    path = make.write_onnx(make.onnx_model([node], initializers=[weight]), tmp_path / "m.onnx")
    with pytest.raises(ModelNotRunnableError, match="onnxruntime cannot"):
        load(path)


def test_functions_are_inlined(tmp_path: Path, make: SimpleNamespace) -> None:
    """Nested functions become nodes of the graph."""
    functions = [function("Inner", "Relu"), function("Outer", "Inner", "Inner")]
    proto = make.onnx_model(calling("Outer"), functions=functions, domains={"own": 1})
    model = load(make.write_onnx(proto, tmp_path / "m.onnx"))
    assert [node.op_type for node in model.nodes()] == ["Relu", "Relu"]
    assert not model.ir.functions


def test_doubling_functions_are_refused(tmp_path: Path, make: SimpleNamespace) -> None:
    """Twenty-six functions that double each other are 67 million nodes, and are never written out."""
    functions = [function("F0", "Relu", "Relu")]
    functions += [function(f"F{index}", f"F{index - 1}", f"F{index - 1}") for index in range(1, 26)]
    proto = make.onnx_model(calling("F25"), functions=functions, domains={"own": 1})
    with pytest.raises(RejectedModelError) as caught:
        load(make.write_onnx(proto, tmp_path / "m.onnx"))
    assert caught.value.metadata["finding"] == "FUNCTION_BOMB"


@pytest.mark.parametrize("place", ["graph", "function", "branch"])
def test_too_many_nodes_are_refused(tmp_path: Path, make: SimpleNamespace, place: str) -> None:
    """A plain graph has a budget as well, wherever its nodes stand, and is refused before anything follows it."""
    many = [helper.make_node("Relu", ["x"], ["y"])] * (MAX_NODES + 1)
    functions = []
    if place == "function":
        functions, many = [helper.make_function("own", "F", ["x"], ["y"], many, [helper.make_opsetid("", 20)])], []
    if place == "branch":
        branch = helper.make_graph(many, "branch", [], [])
        many = [helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)]
    proto = make.onnx_model(many or calling("F"), functions=functions, domains={"own": 1})
    with pytest.raises(RejectedModelError, match="more than 100000 nodes") as caught:
        load(make.write_onnx(proto, tmp_path / "m.onnx"))
    assert caught.value.metadata["finding"] == "TOO_MANY_NODES"


@pytest.mark.parametrize("functions", [[("A", "A")], [("A", "B"), ("B", "A")]])
def test_recursive_functions_are_refused(
    tmp_path: Path, make: SimpleNamespace, functions: list[tuple[str, str]]
) -> None:
    """Directly or through each other."""
    protos = [function(name, call) for name, call in functions]
    proto = make.onnx_model(calling("A"), functions=protos, domains={"own": 1})
    with pytest.raises(RejectedModelError) as caught:
        load(make.write_onnx(proto, tmp_path / "m.onnx"))
    assert caught.value.metadata["finding"] == "RECURSIVE_FUNCTION"


def test_sequences_are_no_inputs(tmp_path: Path, make: SimpleNamespace) -> None:
    """Inputs must be tensors."""
    proto = make.onnx_model([helper.make_node("SequenceAt", ["s", "i"], ["y"])])
    proto.graph.input.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None))
    with pytest.raises(UnsupportedFormatError, match="sequence"):
        load(make.write_onnx(proto, tmp_path / "m.onnx"))


def test_numbers_are_kept(tmp_path: Path, make: SimpleNamespace) -> None:
    """Loading changes no output."""
    weight = numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4), "w")
    proto = make.onnx_model([helper.make_node("MatMul", ["x", "w"], ["y"])], initializers=[weight])
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    got = run_onnx(load(make.write_onnx(proto, tmp_path / "m.onnx")), [{"x": x}])[0]["y"]
    np.testing.assert_allclose(got, x @ numpy_helper.to_array(weight), rtol=1e-6, atol=1e-6)


def test_a_value_that_nothing_makes(tmp_path: Path, make: SimpleNamespace) -> None:
    """The message names the node, and what it reads; within branches too, which may read what is around them."""
    node = helper.make_node("Add", ["x", "lost"], ["y"], name="sum")
    with pytest.raises(RejectedModelError, match=r"'sum'.*reads 'lost'"):
        load(make.write_onnx(make.onnx_model([node]), tmp_path / "m.onnx"))
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    for read, there in (("x", True), ("lost", False)):
        branch = helper.make_graph([helper.make_node("Relu", [read], ["z"], name="inner")], "b", [], [output])
        nodes = [
            helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
            helper.make_node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
            helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
        ]
        path = make.write_onnx(make.onnx_model(nodes), tmp_path / "m.onnx")
        if there:
            assert [str(spec) for spec in load(path).inputs] == ["x:float32[N,4]"]
        else:
            with pytest.raises(RejectedModelError, match=r"'inner'.*reads 'lost'"):
                load(path)


def test_an_input_of_unknown_rank(tmp_path: Path, make: SimpleNamespace) -> None:
    """It has to be said, with an example from the layer that reads it; TensorFlow's names have colons."""
    weight = numpy_helper.from_array(np.ones((4, 6), np.float32), "w")
    proto = make.onnx_model([helper.make_node("MatMul", ["x:0", "w"], ["y"])], initializers=[weight])
    for values in (proto.graph.input, proto.graph.output):
        values[0].type.tensor_type.ClearField("shape")
    proto.graph.input[0].name = "x:0"
    path = make.write_onnx(proto, tmp_path / "m.onnx")
    with pytest.raises(InvalidInputsError, match=r"how many dimensions .* --input 'x:0:float32\[batch,4\]'"):
        load(path)
    model = load(path, ["x:0:float32[batch,time,4]"])
    assert [str(spec) for spec in (*model.inputs, *model.outputs)] == [
        "x:0:float32[batch,time,4]",
        "y:float32[batch,time,6]",
    ]


def test_outputs_get_no_invented_names(tmp_path: Path, make: SimpleNamespace) -> None:
    """Dimensions without a name come back without one; those that depend on an input's have its name."""
    proto = make.onnx_model([RELU], inputs={"x": [None, 4]}, outputs={"y": [None, 4]})
    model = load(make.write_onnx(proto, tmp_path / "m.onnx"))
    assert [str(spec) for spec in (*model.inputs, *model.outputs)] == ["x:float32[?,4]", "y:float32[?,4]"]


def test_float64_without_kernels(tmp_path: Path, make: SimpleNamespace) -> None:
    """onnxruntime has no convolution in float64: float32 computes, which is said, and the types of inputs and outputs
    stay. rtol 1e-5."""
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3))
    proto = make.onnx_model(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        inputs={"x": ["N", 3, 3, 3]},
        outputs={"y": ["N", 4, 1, 1]},
        initializers=[numpy_helper.from_array(weight, "w")],
    )
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    model = load(make.write_onnx(proto, tmp_path / "m.onnx"))
    assert "computes in float64" in model.warnings[0]
    assert [str(spec) for spec in (*model.inputs, *model.outputs)] == ["x:float64[N,3,3,3]", "y:float64[N,4,1,1]"]
    x = np.random.default_rng(1).standard_normal((2, 3, 3, 3))
    with session_of(model) as session:
        np.testing.assert_allclose(run(session, {"x": x})["y"][:, :, 0, 0], np.einsum("nchw,dchw->nd", x, weight), 1e-5)


def test_float16_that_ends_the_process(tmp_path: Path, make: SimpleNamespace) -> None:
    """A product behind a Transpose of the first axis computes in float32, which is said; types stay, and a session with
    all optimizations opens. rtol 1e-2, as float16 rounds."""
    weight = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float16)
    proto = make.onnx_model(
        [helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]), helper.make_node("MatMul", ["t", "w"], ["y"])],
        inputs={"x": ["N", "T", 4]},
        outputs={"y": ["T", "N", 6]},
        initializers=[numpy_helper.from_array(weight, "w")],
    )
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    model = load(make.write_onnx(proto, tmp_path / "m.onnx"))
    assert "computes in float16" in model.warnings[0]
    assert [str(spec) for spec in (*model.inputs, *model.outputs)] == ["x:float16[N,T,4]", "y:float16[T,N,6]"]
    x = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float16)
    with session_of(model) as session:
        got = run(session, {"x": x})["y"]
    np.testing.assert_allclose(got, x.transpose(1, 0, 2).astype(np.float32) @ weight, rtol=1e-2, atol=1e-2)


def test_operators_that_lack_a_type() -> None:
    """An operator of the standard is not called unknown."""
    error = explain(RuntimeError("Could not find an implementation for DeformConv(22) node with name 'd'"))
    assert isinstance(error, UnsupportedOperatorError)
    assert "not on a CPU with the types" in error.message
