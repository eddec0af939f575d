"""Products that add their bias inside the integer kernel, and the same in the standard's operators.

    DequantizeLinear(x) @ DequantizeLinear(W) + bias    <->    com.microsoft MatMulIntegerToFloat(x, W, ..., bias)

x: [..., K] in 8 bits, W: [K, N], bias: [N]. onnxruntime runs the left side as the right one, but leaves the Add beside
it: one more pass over the output of each product (3 % of a sentence encoder's time). Reference of the operator:
onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

import numpy as np
import onnx_ir

from modelpress_compression.graph.edit import Editor
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
    operands = [input_of(source, position) for position in range(3) for source in (x, weight)]
    (result,) = editor.emit(add, FUSED, [*operands, add.inputs[index]], label(node), domain=MICROSOFT)
    editor.hand_over(add.outputs[0], result)
    graph_of(add).remove(add, safe=True)
    _take_over(node, result)
    return True


def _fits(x: onnx_ir.Node, weight: onnx_ir.Node, bias: onnx_ir.Value) -> bool:
    """Whether onnxruntime has a kernel: one matrix with scales for columns, a number of the bias for each, and no
    signed activations on unsigned weights."""
    stored, zero = constant_tensor(input_of(weight, 0)), constant_tensor(input_of(x, 2))
    added = constant_tensor(bias)
    if stored is None or len(stored.shape) != 2 or added is None or tuple(added.shape) != tuple(stored.shape)[1:]:
        return False
    signed = zero is not None and zero.dtype == onnx_ir.DataType.INT8
    by_column = int_attribute(weight, "axis", 1) in (1, -1)
    return by_column and not (signed and stored.dtype == onnx_ir.DataType.UINT8)


def _split(node: onnx_ir.Node, editor: Editor) -> None:
    x, weight, x_scale, scales, x_zero, zeros, bias = (input_of(node, index) for index in range(7))
    name = label(node)
    (real,) = editor.emit(node, "DequantizeLinear", _given(x, x_scale, x_zero), f"{name}_input")
    # The axis counts only where there is a scale for each column.
    (matrix,) = editor.emit(
        node, "DequantizeLinear", _given(weight, scales, zeros), f"{name}_weight", attributes={"axis": 1}
    )
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
