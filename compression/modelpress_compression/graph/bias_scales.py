"""Scales of biases that are added to accumulators of integer products: each is that of the input times the weight's.

    DequantizeLinear(b, s)      s[c] = x_scale * w_scale[c]

A file that holds the factors anyway need not hold s: `share` writes the product as a node, which onnxruntime computes
when it loads the model, before it looks for integer products. `write_out` puts the numbers back: all who read weights
want their scales as constants.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.read import constant_array, constant_tensor, graph_of, input_of, is_op
from modelpress_compression.model import Model

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm")
_BIAS = 2
# Of a node with one output in a file, without names; and of a constant, without its name and numbers.
_NODE_BYTES, _CONSTANT_BYTES = 24, 14


def share(editor: Editor, graph: onnx_ir.Graph) -> None:
    """Makes scales into products where that takes fewer bytes and gives the same numbers; in place."""
    for node in list(graph):
        scale = _scale_of_bias(node)
        factors = _factors(node)
        if scale is None or factors is None or not _is_shorter(scale, factors):
            continue
        product = _product(*factors)
        if product is not None and np.array_equal(np.asarray(constant_array(scale)), product):
            node.replace_input_with(1, editor.emit(node, "Mul", factors, node.name or "bias")[0])
            del graph.initializers[scale.name or ""]


def write_out(model: Model) -> None:
    """Makes products that are scales of 32-bit integers into constants again; in place."""
    found = [
        (node, product) for graph in model.graphs() for node in graph if (product := _shared_scale(node)) is not None
    ]
    if not found:
        return
    editor = Editor(model)
    for node, product in found:
        node.replace_input_with(1, editor.constant(graph_of(node), product, f"{node.name}_scale"))
    clean(model)


def _shared_scale(node: onnx_ir.Node) -> NDArray[np.float32] | None:
    """The numbers of a scale that is a product; None: it is none."""
    scale = input_of(node, 1) if _dequantizes_int32(node) else None
    maker = None if scale is None else scale.producer()
    return _product(*maker.inputs) if maker is not None and is_op(maker, "Mul") else None


def _product(one: onnx_ir.Value | None, other: onnx_ir.Value | None) -> NDArray[np.float32] | None:
    """Of two constants in float32, one of which is a single number: hostile shapes would blow up."""
    numbers = [constant_array(one), constant_array(other)]
    first, second = (None if array is None or array.dtype != np.float32 else array for array in numbers)
    if first is None or second is None or 1 not in (first.size, second.size):
        return None
    return np.asarray(np.multiply(first, second), np.float32)


def _dequantizes_int32(node: onnx_ir.Node) -> bool:
    tensor = constant_tensor(input_of(node, 0)) if is_op(node, "DequantizeLinear") else None
    return tensor is not None and tensor.dtype == onnx_ir.DataType.INT32


def _scale_of_bias(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """An initializer with a number for each channel, of float32, that is read here alone."""
    scale = input_of(node, 1) if _dequantizes_int32(node) else None
    tensor = constant_tensor(scale)
    if scale is None or tensor is None or tensor.dtype != onnx_ir.DataType.FLOAT or len(tensor.shape) != 1:
        return None
    return scale if scale.is_initializer() and len(scale.uses()) == 1 and not scale.is_graph_output() else None


def _factors(node: onnx_ir.Node) -> tuple[onnx_ir.Value, onnx_ir.Value] | None:
    """The scales of input and weight of the one product that the node makes the bias of."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0][1] != _BIAS or not is_op(uses[0][0], *_PRODUCTS):
        return None
    found = [factor for factor in map(_scale_behind, uses[0][0].inputs[:_BIAS]) if factor is not None]
    return (found[0], found[1]) if len(found) == _BIAS else None


def _scale_behind(value: onnx_ir.Value | None) -> onnx_ir.Value | None:
    node = None if value is None else value.producer()
    scale = input_of(node, 1) if node is not None and is_op(node, "DequantizeLinear") else None
    return scale if scale is not None and scale.is_initializer() else None


def _is_shorter(scale: onnx_ir.Value, factors: tuple[onnx_ir.Value, onnx_ir.Value]) -> bool:
    tensor = constant_tensor(scale)
    names = sum(len(factor.name or "") for factor in factors)
    return tensor is not None and _NODE_BYTES + names < _CONSTANT_BYTES + 2 * len(scale.name or "") + tensor.nbytes
