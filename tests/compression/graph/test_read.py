"""What is constant, and what is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir
import pytest
from modelpress_compression.graph.read import constant_array, constant_scalar, constant_tensor, is_constant
from modelpress_compression.model import Model

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def test_defaults_of_inputs_are_not_constant(model_from_text: Callable[..., Model]) -> None:
    """A caller may override an initializer that is an input as well; others are constant."""
    text = f"{HEAD} g (float[2] x, float[2] w) => (float[2] y) {{ a = Add(x, w)  y = Mul(a, b) }}"
    model = model_from_text(text, {"w": np.float32([1, 2]), "b": np.float32([3, 4])})
    default, bias = model.graph[0].inputs[1], model.graph[1].inputs[1]
    assert default is not None
    assert default.const_value is not None
    assert constant_tensor(default) is None
    assert not is_constant(default)
    np.testing.assert_array_equal(constant_array(bias), np.float32([3, 4]), strict=True)


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("value = int8[2] {1, 2}", np.int8([1, 2])),
        ("value_float = 0.5", np.float32(0.5)),
        ("value_floats = [0.5, 1.5]", np.float32([0.5, 1.5])),
        ("value_int = 3", np.int64(3)),
        ("value_ints = [3, 4]", np.int64([3, 4])),
    ],
)
def test_every_form_of_constant_node_is_read(
    model_from_text: Callable[..., Model], attribute: str, expected: np.ndarray
) -> None:
    """With its shape and element type."""
    model = model_from_text(f"{HEAD} g () => (float y) {{ c = Constant <{attribute}> ()  y = Cast <to = 1> (c) }}")
    np.testing.assert_array_equal(constant_array(model.graph[0].outputs[0]), np.asarray(expected), strict=True)


def test_strings_are_no_numbers(model_from_text: Callable[..., Model]) -> None:
    """In neither form."""
    text = f'{HEAD} g () => (string y) {{ c = Constant <value_string = "a"> ()  y = Identity(c) }}'
    model = model_from_text(text)
    assert constant_array(model.graph[0].outputs[0]) is None
    tensor = onnx_ir.from_proto(onnx.helper.make_tensor("s", onnx.TensorProto.STRING, [1], [b"1"]))
    value = onnx_ir.Value(name="s", const_value=tensor)
    model.graph.register_initializer(value)
    assert constant_array(value) is None
    assert constant_scalar(value) is None


def test_computed_values_are_not_constant(model_from_text: Callable[..., Model]) -> None:
    """Not even those that are computed from constants; nor is what is left out."""
    model = model_from_text(f"{HEAD} g () => (float[2] y) {{ y = Neg(w) }}", {"w": np.float32([1, 2])})
    assert constant_tensor(model.graph[0].outputs[0]) is None
    assert constant_tensor(None) is None
