"""Weights are taken out of a serialized model, and put in, and the rest stays as it is."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression import wire
from onnx import TensorProto, helper, numpy_helper

RNG = np.random.default_rng(0)
PLACE = "here"


def everywhere() -> onnx.ModelProto:
    """Weights as initializers in both forms, in a Constant, in a branch, and in a function."""
    raw = numpy_helper.from_array(RNG.normal(size=(8, 8)).astype(np.float32), "raw")
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [64], RNG.normal(size=64))
    doubles = helper.make_tensor("doubles", TensorProto.DOUBLE, [32], RNG.normal(size=32))
    whole = helper.make_tensor("whole", TensorProto.INT64, [64], range(64))
    text = helper.make_tensor("text", TensorProto.STRING, [2], ["a" * 200, "b" * 200])
    inner = numpy_helper.from_array(np.arange(100, dtype=np.int32), "inner")
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["out"])],
        "branch",
        [],
        [helper.make_tensor_value_info("out", TensorProto.INT32, [100])],
        [inner],
    )
    constant = numpy_helper.from_array(RNG.normal(size=90).astype(np.float16), "constant")
    nodes = [
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch),
    ]
    graph = helper.make_graph(
        nodes,
        "everywhere",
        [helper.make_tensor_value_info("x", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [100])],
        [raw, typed, doubles, whole, text],
    )
    made = [helper.make_node("Constant", [], ["f"], value=constant)]
    function = helper.make_function("own", "F", [], ["f"], made, [helper.make_opsetid("", 20)])
    return helper.make_model(graph, functions=[function], opset_imports=[helper.make_opsetid("", 20)])


def tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """All of `everywhere`, by name."""
    branch = model.graph.node[1].attribute[0].g
    found = {tensor.name: tensor for tensor in (*model.graph.initializer, *branch.initializer)}
    return found | {"constant": model.graph.node[0].attribute[0].t, "f": model.functions[0].node[0].attribute[0].t}


def test_weights_become_places_in_the_file() -> None:
    """Raw data, and typed data whose bytes are the same, wherever it lies; what has other bytes or is small stays."""
    model = everywhere()
    data = model.SerializeToString()
    light = onnx.ModelProto.FromString(wire.without_weights(data, PLACE, 128))
    before, after = tensors(model), tensors(light)
    for name in ("raw", "typed", "doubles", "inner", "constant", "f"):
        fields = {entry.key: entry.value for entry in after[name].external_data}
        assert fields["location"] == PLACE
        offset, length = int(fields["offset"]), int(fields["length"])
        taken = onnx.TensorProto(data_type=after[name].data_type, dims=after[name].dims)
        taken.raw_data = data[offset : offset + length]
        np.testing.assert_array_equal(numpy_helper.to_array(taken), numpy_helper.to_array(before[name]))
    assert after["whole"] == before["whole"]
    assert after["text"] == before["text"]
    kept = onnx.ModelProto.FromString(wire.without_weights(data, PLACE, 10**6))
    assert kept == model


def test_weights_are_put_back() -> None:
    """The pieces make the model again, with raw data in the place of each reference; other external data stays."""
    model = everywhere()
    light = onnx.ModelProto.FromString(model.SerializeToString())
    weights: list[bytes] = []
    for tensor in tensors(light).values():
        if tensor.data_type != TensorProto.STRING:
            weights.append(numpy_helper.to_array(tensor).tobytes())
            for name in ("raw_data", "float_data", "double_data", "int64_data"):
                tensor.ClearField(name)
            wire.refer(tensor, PLACE, len(weights) - 1, len(weights[-1]))
    elsewhere = light.graph.initializer.add(name="elsewhere", data_type=TensorProto.FLOAT, dims=[2], doc_string=PLACE)
    wire.refer(elsewhere, "other.bin", 0, 8)
    pieces = wire.with_weights(light.SerializeToString(), PLACE)
    whole = b"".join(piece if isinstance(piece, bytes) else weights[piece] for piece in pieces)
    found = onnx.ModelProto.FromString(whole)
    assert found.graph.initializer[-1] == elsewhere
    for name, tensor in tensors(model).items():
        np.testing.assert_array_equal(numpy_helper.to_array(tensors(found)[name]), numpy_helper.to_array(tensor))


@pytest.mark.parametrize("dims", [[9, 8], [-8, -8], [2**40, 2**40]])
def test_data_that_does_not_fit_the_shape_stays(dims: list[int]) -> None:
    """It is for the loader to refuse."""
    model = everywhere()
    model.graph.initializer[0].dims[:] = dims
    light = onnx.ModelProto.FromString(wire.without_weights(model.SerializeToString(), PLACE, 128))
    assert tensors(light)["raw"] == tensors(model)["raw"] or dims == [-8, -8]


@given(st.integers(0, 2**32), st.data())
def test_damaged_bytes_are_an_error_of_their_own(seed: int, data: st.DataObject) -> None:
    """Cut short or changed anywhere: bytes that protobuf judges, or DecodeError."""
    whole = bytearray(everywhere().SerializeToString())
    random = np.random.default_rng(seed)
    for place in random.integers(0, len(whole), data.draw(st.integers(0, 4))):
        whole[place] = random.integers(256)
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        light = wire.without_weights(cut, PLACE, 64)
    except DecodeError:
        return
    assert len(light) <= len(cut) + 200 * len(tensors(everywhere()))


def test_depth_and_unknown_kinds_are_bounded() -> None:
    """Graphs in graphs end at protobuf's own limit."""
    body = b"\x0a" * 200
    for _ in range(200):
        attribute = b"\x32" + wire._varint(len(body)) + body
        node = b"\x2a" + wire._varint(len(attribute)) + attribute
        body = b"\x0a" + wire._varint(len(node)) + node
    with pytest.raises(DecodeError, match="deep in each other"):
        wire.without_weights(b"\x3a" + wire._varint(len(body)) + body, PLACE, 16)
    with pytest.raises(DecodeError, match="unknown kind 3"):
        wire.without_weights(b"\x0b", PLACE, 16)
