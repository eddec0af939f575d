"""Products of 8-bit integers: x [..., K], W [K, N], bias [N].

Dynamic, where q, s, z = DynamicQuantizeLinear(x):

    Cast(MatMulInteger(q, W, z, W's zero point)) * (s * W's scale) + bias      ConvInteger likewise
    com.microsoft DynamicQuantizeLSTM, QAttention

Products that add their bias inside the integer kernel, and the same in the standard's operators:

    DequantizeLinear(x) @ DequantizeLinear(W) + bias    <->    com.microsoft MatMulIntegerToFloat(x, W, ..., bias)

onnxruntime runs the left side as the right one, but leaves the Add beside it: one more pass over the output of each
product (3 % of a sentence encoder's time). Reference of the operators: onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir

from modelpress_compression.encodings import qdq
from modelpress_compression.encodings.folded import factor_behind
from modelpress_compression.encodings.operands import arranged, operand
from modelpress_compression.encodings.weight import StoredWeight
from modelpress_compression.graph.edit import Editor, Spot
from modelpress_compression.graph.read import (
    MICROSOFT,
    constant_array,
    constant_tensor,
    graph_of,
    input_of,
    int_attribute,
    is_constant,
    is_op,
    label,
    only_consumer,
    required,
)
from modelpress_compression.model import Model

FUSED = "MatMulIntegerToFloat"
# Values, scale and zero point, as DynamicQuantizeLinear makes them.
QuantizedInput = tuple[onnx_ir.Value, onnx_ir.Value, onnx_ir.Value]


def write_input(editor: Editor, node: onnx_ir.Node, source: onnx_ir.Value) -> QuantizedInput:
    """An activation by the range that it has in each run, before a node."""
    outputs = ("", "_scale", "_zero_point")
    values, scale, zero_point = editor.emit(
        node, "DynamicQuantizeLinear", [source], source.name or label(node), outputs=outputs
    )
    return values, scale, zero_point


def write(
    editor: Editor, node: onnx_ir.Node, x: QuantizedInput, weight: StoredWeight, bias: onnx_ir.Value | None = None
) -> onnx_ir.Value:
    """The dynamic product before a node, under its name."""
    spot, (values, scale, zero_point) = Spot(editor, node, label(node)), x
    inputs = arranged("MatMulInteger", x=values, x_zero=zero_point, **weight.operands())
    real = spot.real(spot.emit("MatMulInteger", *inputs))
    factor = Spot(editor, node, f"{spot.name}_scale").emit("Mul", scale, weight.scale)
    result = spot.emit("Mul", real, factor)
    return result if bias is None else spot.emit("Add", result, bias)


def read(node: onnx_ir.Node) -> tuple[StoredWeight, ...]:
    """The weight of a MatMulInteger or ConvInteger; its scale is 1 where none is found behind the product."""
    return tuple(_scaled(stored, factor_behind(node.outputs[0])) for stored in qdq.read(node))


def _scaled(stored: StoredWeight, factor: onnx_ir.Value | None) -> StoredWeight:
    maker = factor.producer() if factor is not None else None
    factors = list(maker.inputs) if maker is not None and is_op(maker, "Mul") else [factor]
    scale = next((value for value in factors if is_constant(value)), None)
    array, axis = constant_array(scale), stored.weight.axis
    if array is None or axis is None or array.size not in (1, stored.weight.levels.shape[axis]):
        return stored
    scales = array.reshape(()) if array.size == 1 else array.reshape(-1)
    return replace(stored, weight=replace(stored.weight, scale=scales), scale=scale)


def added_bias(node: onnx_ir.Node) -> tuple[onnx_ir.Node, int] | None:
    """The Add that alone reads a product, and the index of the float32 vector that it adds."""
    add = only_consumer(node.outputs[0])
    if not is_op(add, "Add") or add is None:
        return None
    index = 1 if add.inputs[0] is node.outputs[0] else 0
    bias = constant_array(add.inputs[index]) if is_constant(add.inputs[index]) else None
    return (add, index) if bias is not None and bias.ndim == 1 and bias.dtype == np.float32 else None


def fuse_products(model: Model, editor: Editor) -> int:
    """Fuses in place, left to right; returns how many.

    Nothing in models of the standard's operators alone: they stay so, for runtimes that know no others.
    """
    if not any(node.domain == MICROSOFT for node in model.nodes()):
        return 0
    return sum(_fuse(node, editor) for node in list(model.nodes()) if is_op(node, "MatMul"))


def split_products(model: Model, editor: Editor) -> int:
    """The inverse, for what reads or trains the standard's form; returns how many."""
    fused = [node for node in model.nodes() if is_op(node, FUSED, domain=MICROSOFT)]
    for node in fused:
        _split(node, editor)
    return len(fused)


def _fuse(node: onnx_ir.Node, editor: Editor) -> bool:
    sources = [value.producer() if value is not None else None for value in node.inputs]
    found = added_bias(node)
    if found is None or not all(is_op(source, "DequantizeLinear") for source in sources):
        return False
    x, weight = sources
    add, index = found
    if x is None or weight is None or not _fits(x, weight, required(add, index)):
        return False
    inputs = arranged(FUSED, **_dequantized(x, "x"), **_dequantized(weight, "w"), bias=add.inputs[index])
    (result,) = editor.emit(add, FUSED, inputs, label(node), domain=MICROSOFT)
    editor.hand_over(add.outputs[0], result)
    graph_of(add).remove(add, safe=True)
    _take_over(node, result)
    return True


def _dequantized(node: onnx_ir.Node, name: str) -> dict[str, onnx_ir.Value | None]:
    """Inputs of a DequantizeLinear as operands of the product with what it makes."""
    return {f"{name}{suffix}": input_of(node, index) for index, suffix in enumerate(("", "_scale", "_zero"))}


def _fits(x: onnx_ir.Node, weight: onnx_ir.Node, bias: onnx_ir.Value) -> bool:
    """Whether onnxruntime has a kernel: one matrix with scales for columns, a number of the bias for each, and no
    signed activations on unsigned weights."""
    stored, zero = next(iter(qdq.read(weight)), None), constant_tensor(input_of(x, 2))
    added = constant_tensor(bias)
    if stored is None or added is None or stored.weight.levels.ndim != 2:
        return False
    if tuple(added.shape.numpy()) != stored.weight.levels.shape[1:]:
        return False
    signed = zero is not None and zero.dtype == onnx_ir.DataType.INT8
    by_column = int_attribute(weight, "axis", 1) in (1, -1)
    return by_column and not (signed and not stored.weight.signed)


def _split(node: onnx_ir.Node, editor: Editor) -> None:
    name, bias = label(node), operand(node, "bias")
    x, weight = ([operand(node, f"{side}{suffix}") for suffix in ("", "_scale", "_zero")] for side in ("x", "w"))
    (real,) = editor.emit(node, "DequantizeLinear", _given(*x), f"{name}_input")
    # The axis counts only where there is a scale for each column.
    (matrix,) = editor.emit(node, "DequantizeLinear", _given(*weight), f"{name}_weight", attributes={"axis": 1})
    (product,) = editor.emit(node, "MatMul", [real, matrix], name)
    result = product if bias is None else editor.emit(node, "Add", [product, bias], name)[0]
    editor.hand_over(node.outputs[0], result)
    _take_over(node, product)


def _take_over(old: onnx_ir.Node, value: onnx_ir.Value) -> None:
    """Removes a node, whose name goes to the one that makes the value: recipes exclude nodes by their names."""
    name, maker = old.name, value.producer()
    graph_of(old).remove(old, safe=True)
    if maker is not None:
        maker.name = name


def _given(*inputs: onnx_ir.Value | None) -> list[onnx_ir.Value | None]:
    """Without an absent one at the end."""
    return list(inputs if inputs[-1] is not None else inputs[:-1])
