"""The table of operands against the operators' own definitions."""

from __future__ import annotations

import onnx_ir
import pytest
from modelpress_compression.encodings.operands import (
    _OPERANDS,
    arranged,
    computes_in_integers,
    is_quantization_parameter,
    is_quantized,
    is_stored_weight,
    operand,
    quantized_weights,
)
from modelpress_compression.graph.read import MICROSOFT
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

SCHEMAS = {
    (schema.name, schema.domain): [item.name.lower() for item in schema.inputs]
    for schema in sorted(get_all_operator_schema(), key=lambda schema: schema.since_version)
    if schema.domain in ("", MICROSOFT)
}


def node_of(op_type: str, count: int, domain: str = "") -> onnx_ir.Node:
    return onnx_ir.node(op_type, [onnx_ir.val(f"v{index}") for index in range(count)], domain=domain)


@pytest.mark.parametrize("op_type", sorted(set(_OPERANDS) - {"QLinearConcat"}))
def test_the_table_says_what_the_operators_say(op_type: str) -> None:
    """As many inputs, with scales, zero points and biases where onnxruntime has them, in both domains."""
    found = [(domain, inputs) for (name, domain), inputs in SCHEMAS.items() if name == op_type]
    assert found
    for domain, inputs in found:
        node = node_of(op_type, len(inputs), domain)
        assert len(_OPERANDS[op_type]) == len(inputs)
        for position, name in enumerate(inputs):
            is_parameter = any(word in name for word in ("scale", "zero_point", "g_idx"))
            assert is_quantization_parameter(node, position) is is_parameter, name
            own = _OPERANDS[op_type][position]
            assert operand(node, own) is node.inputs[position]
            for word, suffix in (("scale", "_scale"), ("zero_point", "_zero")):
                assert own.endswith(suffix) is (word in name), name
            if name == "bias":
                assert own == "bias"
                assert is_stored_weight(node, position)


def test_parts_of_a_concatenation_have_parameters() -> None:
    """Each part has a scale and a zero point behind it, however many there are."""
    node = node_of("QLinearConcat", 8, MICROSOFT)
    assert [position for position in range(8) if not is_quantization_parameter(node, position)] == [2, 5]


def test_inputs_are_arranged_by_name() -> None:
    """Operands come in the operator's order, absent ones as None, none at the end."""
    x, w, bias = (onnx_ir.val(name) for name in ("x", "w", "bias"))
    assert arranged("MatMulNBits", bias=bias, w=w, x=x) == [x, w, None, None, None, bias]
    assert arranged("MatMulInteger", x=x, w=w, w_scale=bias) == [x, w]


def test_kinds_of_operators() -> None:
    """Integer products have no gradient; what makes floats of integers has; a Conv is none of them."""
    assert computes_in_integers(node_of("QGemm", 9, MICROSOFT))
    assert computes_in_integers(node_of("DynamicQuantizeLinear", 1))
    for op_type in ("DequantizeLinear", "MatMulNBits", "GatherBlockQuantized", "QuantizeLinear"):
        assert is_quantized(node_of(op_type, 3))
        assert not computes_in_integers(node_of(op_type, 3))
    assert not is_quantized(node_of("Conv", 3))


def test_weights_are_constants() -> None:
    """An LSTM has two; a factor that is computed, or the default of an input, is an activation."""
    node = node_of("DynamicQuantizeLSTM", 12, MICROSOFT)
    assert not quantized_weights(node)
    for position in (1, 2):
        constant = onnx_ir.val(f"c{position}", const_value=onnx_ir.tensor([[1]], dtype=onnx_ir.DataType.INT8))
        onnx_ir.Graph([], [], nodes=[], initializers=[constant])
        node.replace_input_with(position, constant)
    assert list(quantized_weights(node)) == ["w", "r"]
