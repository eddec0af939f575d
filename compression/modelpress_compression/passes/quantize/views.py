"""Weights that nodes bring into shape before they are used: `MatMul(x, Transpose(W))` multiplies by a constant.

    a chain of Identity, Transpose, Reshape, Squeeze, Unsqueeze, Flatten, Cast on a constant that only this chain reads
        becomes one constant
    Transpose(W), W [R, C] read by others as well (the table of an embedding whose transpose is the head)
        becomes a `Turned` constant, which knows its W: what is stored of one is stored of both

`hide_views` shows passes plain constants; `restore_views` puts the nodes back where the weight stayed as it was, so
that no weight is written twice, and none wider than it came.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir

from modelpress_compression.graph.edit import Editor, Spot
from modelpress_compression.graph.read import (
    axes_of,
    constant_array,
    constant_tensor,
    input_of,
    int_attribute,
    ints_attribute,
    is_op,
)
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model

_MIN_ELEMENTS = 256
_WIDENED = (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
_SHAPING = ("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast")


class Turned(onnx_ir.Tensor[Any]):
    """The transpose of another tensor [R, C], which is a constant of the model too."""

    def __init__(self, root: onnx_ir.TensorProtocol, name: str) -> None:
        super().__init__(np.asarray(root.numpy()).T, name=name)
        self.root = root


class Widened(onnx_ir.Tensor[Any]):
    """The float32 numbers of a tensor of 16 bits."""

    def __init__(self, root: onnx_ir.TensorProtocol, name: str) -> None:
        super().__init__(np.asarray(root.numpy()).astype(np.float32), name=name)
        self.root = root


def root_of(value: onnx_ir.Value) -> tuple[onnx_ir.TensorProtocol | None, bool]:
    """The tensor whose numbers a constant holds, and whether it holds them transposed."""
    tensor = constant_tensor(value)
    return (tensor.root, True) if isinstance(tensor, Turned) else (tensor, False)


def hide_views(model: Model, *, turned: bool = True) -> None:
    """Puts constants in the place of the nodes, in every graph. Linear in the number of nodes.

    `turned`: transposes of what others read as well too; without them, those nodes stay.
    """
    editor = Editor(model)
    for node in list(model.nodes()):
        source = input_of(node, 0)
        tensor = constant_tensor(source) if is_op(node, *_SHAPING) else None
        if source is None or tensor is None or tensor.size < _MIN_ELEMENTS or tensor.dtype.is_string():
            continue
        output = node.outputs[0]
        if is_op(node, "Identity") and Editor.bypass(node, source):
            continue
        made = None if output.is_graph_output() or not output.uses() else _made(node, source, tensor, turned)
        if made is None:
            continue
        graph = source.graph
        if not isinstance(graph, onnx_ir.Graph):
            continue
        name = editor.name(output.name or "view")
        made.name = name
        value = onnx_ir.Value(
            name=name, type=onnx_ir.TensorType(made.dtype), shape=onnx_ir.Shape(made.shape.numpy()), const_value=made
        )
        graph.register_initializer(value)
        output.replace_all_uses_with(value)
        if node.graph is not None:
            node.graph.remove(node, safe=True)
        if not source.uses() and source.is_initializer() and not source.is_graph_output():
            del graph.initializers[source.name or ""]


def _made(
    node: onnx_ir.Node, source: onnx_ir.Value, tensor: onnx_ir.TensorProtocol, turned: bool
) -> onnx_ir.Tensor[Any] | None:
    """The constant that a node makes; None where it has to stay."""
    name = node.outputs[0].name or "view"
    if len(source.uses()) > 1:
        plain = not isinstance(tensor, Turned) and tensor.dtype == onnx_ir.DataType.FLOAT
        turns = is_op(node, "Transpose") and len(tensor.shape) == 2 and ints_attribute(node, "perm") in (None, (1, 0))
        return Turned(tensor, name) if turned and plain and turns and _is_factor(node.outputs[0].uses()) else None
    if is_op(node, "Cast"):
        widens = tensor.dtype in _WIDENED and int_attribute(node, "to", 0) == onnx_ir.DataType.FLOAT.value
        return Widened(tensor, name) if widens else None
    if isinstance(tensor, Turned | Widened):
        return None
    array = _reshaped(node, np.asarray(tensor.numpy()))
    return None if array is None else onnx_ir.Tensor(array, dtype=tensor.dtype, name=name)


def _is_factor(uses: Iterable[tuple[onnx_ir.Node, int]]) -> bool:
    """Whether all of the uses multiply by the value, or look up its rows."""
    return all(
        (is_op(node, "MatMul", "Gemm") and index == 1)
        or (is_op(node, "Gather") and index == 0 and not int_attribute(node, "axis", 0))
        for node, index in uses
    )


def _reshaped(node: onnx_ir.Node, array: Array) -> Array | None:
    if node.op_type == "Transpose":
        return array.transpose(ints_attribute(node, "perm"))
    shape = node.outputs[0].shape
    if node.op_type == "Reshape":
        wanted = constant_array(input_of(node, 1))
        if wanted is None or int_attribute(node, "allowzero", 0):
            return None
        extents = [array.shape[axis] if extent == 0 else int(extent) for axis, extent in enumerate(wanted)]
        return array.reshape(extents)
    if node.op_type == "Squeeze" and (axes := axes_of(node)) is not None:
        return array.squeeze(axes)
    if shape is not None and shape.is_static() and int(np.prod(shape.numpy())) == array.size:
        return array.reshape(shape.numpy())
    return None


def restore_views(model: Model) -> None:
    """Puts a node in the place of every view that is used still."""
    editor = Editor(model)
    for graph in list(model.graphs()):
        holders = {id(value.const_value): value for value in graph.initializers.values() if value.uses()}
        # What is turned may read what is widened, and comes first.
        ordered = sorted(graph.initializers.items(), key=lambda item: isinstance(item[1].const_value, Widened))
        for name, value in ordered:
            tensor = value.const_value
            if not isinstance(tensor, Turned | Widened) or not value.uses() or not len(graph):
                continue
            head = Spot(editor, graph[0], name)
            if isinstance(tensor, Widened):
                root = editor.hold(graph, tensor.root, f"{name}_narrow")
                real = head.real(root)
            elif id(tensor.root) in holders:
                real = head.emit("Transpose", holders[id(tensor.root)], perm=[1, 0])
            else:
                continue
            real.type, real.shape = value.type, value.shape
            onnx_ir.convenience.replace_all_uses_with(value, real)
            del graph.initializers[name]
