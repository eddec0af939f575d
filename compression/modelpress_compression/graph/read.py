"""Questions that passes ask about an onnx_ir graph: is this value constant, who alone uses it, which attribute has it.

All of them cost no more than the number of uses of one value, so that walks over a graph stay linear.
"""

from __future__ import annotations

from typing import Any, Final, TypeGuard

import numpy as np
import onnx_ir

from modelpress_compression.inputs import Array

# The domain of the operators that onnxruntime has beside the standard's.
MICROSOFT: Final = "com.microsoft"
# Attributes by which Constant holds plain numbers, and the element types that these have.
_NUMBERS: Final = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}


def is_op(node: onnx_ir.Node | None, *op_types: str, domain: str = "") -> TypeGuard[onnx_ir.Node]:
    """Whether the node is one of these operators; `domain` "" is ONNX itself, also written "ai.onnx"."""
    if node is None or node.op_type not in op_types:
        return False
    return (node.domain or "") == domain or (domain == "" and node.domain == "ai.onnx")


def constant_tensor(value: onnx_ir.Value | None) -> onnx_ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node's output; None if the value can differ between runs.

    An initializer that is a graph input as well is a default that a caller may override: not constant.
    """
    if value is None:
        return None
    producer = value.producer()
    if producer is None:
        return value.const_value if value.is_initializer() and not value.is_graph_input() else None
    if not is_op(producer, "Constant"):
        return None
    # Exactly one attribute holds the value, whatever its form; strings and sparse tensors are no numbers.
    name, attribute = next(iter(producer.attributes.items()), ("", None))
    if attribute is None or attribute.is_ref():
        return None
    if name == "value":
        return attribute.as_tensor()
    dtype = _NUMBERS.get(name)
    return None if dtype is None else onnx_ir.Tensor(np.asarray(attribute.value, dtype), name=value.name)


def constant_array(value: onnx_ir.Value | None) -> Array | None:
    """The numbers of a constant value as an array of its own shape and type (memory-mapped if in a file)."""
    tensor = constant_tensor(value)
    return None if tensor is None or tensor.dtype.is_string() else np.asarray(tensor.numpy())


def is_constant(value: onnx_ir.Value | None) -> bool:
    """As `constant_array`, without touching the data."""
    return constant_tensor(value) is not None


def input_of(node: onnx_ir.Node, index: int) -> onnx_ir.Value | None:
    """The input, or None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def other_operand(node: onnx_ir.Node, value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    """Of a node of two operands the one beside `value`."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def graph_of(node: onnx_ir.Node) -> onnx_ir.Graph:
    """The graph that holds the node."""
    graph = node.graph
    if not isinstance(graph, onnx_ir.Graph):
        raise TypeError(f"Node {node.name!r} lies in no graph.")
    return graph


def required(node: onnx_ir.Node, index: int) -> onnx_ir.Value:
    """An input that the operator cannot be without."""
    value = input_of(node, index)
    if value is None:
        raise ValueError(f"Node {node.name!r} ({node.op_type}) has no input {index}.")
    return value


def attribute(node: onnx_ir.Node, name: str, default: Any) -> Any:
    """The attribute's value, or the operator's default."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def constant_scalar(value: onnx_ir.Value | None) -> float | None:
    """The number of a constant with exactly one element, whatever its rank."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size != 1 or tensor.dtype.is_string():
        return None
    return float(tensor.numpy().reshape(-1)[0])


def only_consumer(value: onnx_ir.Value) -> onnx_ir.Node | None:
    """The node that alone uses the value; None if there are several uses or none, or if it is a graph's output."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return next(iter(uses)).node


def rank(value: onnx_ir.Value | None) -> int | None:
    """How many axes the value has, where that is known."""
    return None if value is None or value.shape is None else len(value.shape)


def extent(value: onnx_ir.Value | None, axis: int) -> int | None:
    """How many indices the axis has, where that is known to be a number; whether the value is constant or not."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def is_overwritten(value: onnx_ir.Value) -> bool:
    """Whether onnxruntime writes into the constant when it runs: new statistics over the old, under training_mode. It
    must stand for nothing else then."""
    return any(
        is_op(user, "BatchNormalization") and index >= 3 and int_attribute(user, "training_mode", 0) != 0
        for user, index in value.uses()
    )


def int_attribute(node: onnx_ir.Node, name: str, default: int) -> int:
    """An INT attribute or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def float_attribute(node: onnx_ir.Node, name: str, default: float) -> float:
    """A FLOAT attribute or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def string_attribute(node: onnx_ir.Node, name: str, default: str) -> str:
    """A STRING attribute or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def ints_attribute(node: onnx_ir.Node, name: str) -> tuple[int, ...] | None:
    """An INTS attribute, or None where it is not given."""
    attribute = node.attributes.get(name)
    return None if attribute is None else tuple(attribute.as_ints())


def axes_of(node: onnx_ir.Node) -> tuple[int, ...] | None:
    """Axes of Squeeze, Unsqueeze or Reduce*: an attribute up to opset 12 or 17, then the second input."""
    if (axes := ints_attribute(node, "axes")) is not None:
        return axes
    if (array := constant_array(input_of(node, 1))) is not None:
        return tuple(int(axis) for axis in array.reshape(-1))
    return None


def label(node: onnx_ir.Node) -> str:
    """The node's name, or that of its first output where it has none: what people can find in a viewer."""
    return node.name or next((output.name for output in node.outputs if output.name), "") or node.op_type
