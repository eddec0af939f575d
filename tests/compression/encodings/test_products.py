"""Biases inside integer products: the same answers in both forms, certificates included."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelpress_compression.encodings.products import fuse_products, split_products
from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.read import MICROSOFT, is_op
from modelpress_compression.model import Model, Provenance
from modelpress_compression.passes.integers.certificate import certify
from onnx import TensorProto, helper, numpy_helper


def quantized_product(
    columns: int, *, per_channel: bool = True, zero_point: bool = True, contrib: bool = True, seed: int = 0
) -> Model:
    """x [n, 5, 12] -> 8 bits -> product with 8-bit weights [12, columns] -> + bias -> activation -> y."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.001, 0.01, columns if per_channel else ()).astype(np.float32)
    weights = {
        "w": rng.integers(-90, 91, (12, columns)).astype(np.int8),
        "sx": np.asarray(0.03, np.float32),
        "zx": np.asarray(121, np.uint8),
        "sw": scales,
        "b": rng.normal(0, 1, columns).astype(np.float32),
    } | ({"zw": np.zeros(scales.shape, np.int8)} if zero_point else {})
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "sw", *(["zw"] if zero_point else [])], ["wd"], axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["p"], name="product"),
        helper.make_node("Add", ["b", "p"], ["s"], name="sum"),
        helper.make_node("Gelu" if contrib else "Relu", ["s"], ["y"], domain=MICROSOFT if contrib else ""),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5, columns])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return Model(onnx_ir.from_proto(proto), Provenance("onnx", "0" * 64, 0))


def operators(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in model.nodes())


@settings(max_examples=15)
@given(st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_both_forms_answer_alike(outputs_of: Any, columns: int, per_channel: bool, zero_point: bool, seed: int) -> None:
    """Fused, and split again, to 1e-5 of the largest answer; the proof of saturation says the same of each."""
    model = quantized_product(columns, per_channel=per_channel, zero_point=zero_point, seed=seed)
    x = np.random.default_rng(seed).uniform(-3, 3, (4, 5, 12)).astype(np.float32)
    expected, proofs = outputs_of(model, x), [item.reason for item in certify(model)]
    fused = model.clone()
    assert fuse_products(fused, Editor(fused)) == 1
    clean(fused)
    assert operators(fused) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Gelu": 1}
    assert "product" in {node.name for node in fused.nodes() if node.op_type == "MatMulIntegerToFloat"}
    again = fused.clone()
    assert split_products(again, Editor(again)) == 1
    assert operators(again) == operators(model)
    assert "product" in {node.name for node in again.nodes() if node.op_type == "MatMul"}
    for other in (fused, again):
        np.testing.assert_allclose(outputs_of(other, x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        assert [item.reason for item in certify(other)] == proofs


def test_standard_models_stay_standard() -> None:
    """A model that no operator of onnxruntime's own is in gets none."""
    model = quantized_product(8, contrib=False)
    assert fuse_products(model, Editor(model)) == 0


@pytest.mark.parametrize(
    "change", ["two readers", "float input", "bias of the input", "one number", "signed on unsigned"]
)
def test_others_are_left_alone(change: str) -> None:
    """A product that someone else reads, one in float32, and a sum of two results have no bias to take in; onnxruntime
    has no kernel for a bias of one number, and none for signed activations on unsigned weights."""
    model = quantized_product(8)
    nodes = {node.name: node for node in model.nodes() if is_op(node, "MatMul", "Add")}
    if change == "two readers":
        nodes["sum"].replace_input_with(0, nodes["product"].outputs[0])
    elif change == "float input":
        nodes["product"].replace_input_with(0, model.graph.inputs[0])
    elif change == "bias of the input":
        nodes["sum"].replace_input_with(0, model.graph.inputs[0])
    elif change == "one number":
        model.graph.initializers["b"].const_value = onnx_ir.tensor(np.ones(1, np.float32), name="b")
    else:
        for name, dtype in (("zx", np.int8), ("w", np.uint8), ("zw", np.uint8)):
            tensor = model.graph.initializers[name].const_value
            model.graph.initializers[name].const_value = onnx_ir.tensor(tensor.numpy().astype(dtype), name=name)  # type: ignore[union-attr]
    assert fuse_products(model, Editor(model)) == 0
