"""Arithmetic in float32 for models that compute in other floats; inputs and outputs keep their types.

    x T -> Cast -> float32 ... float32 -> Cast -> y T          T: float16, bfloat16 or float64
    weight of 16 bits: stays as it is, a Cast behind it        nothing in the file grows
    weight of 64 bits: becomes float32

8-bit kernels read and write float32, and onnxruntime has no arithmetic in bfloat16 for CPU. From 16 bits nothing is
lost; from 64 bits what float32 cannot hold, a relative 6e-8 for each number.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir
from onnx_ir import DataType

from modelpress_compression.graph.edit import Editor, Spot
from modelpress_compression.graph.read import constant_tensor
from modelpress_compression.graph.shapes import values_of
from modelpress_compression.model import Model

NARROW = (DataType.FLOAT16, DataType.BFLOAT16)
OTHER_FLOATS = (*NARROW, DataType.DOUBLE)
# Operators whose arithmetic is worth other kernels.
_LINEAR = frozenset(("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Attention", "FusedMatMul"))
# Attributes that name an element type.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype")
# Smaller ones, and vectors (biases, scales), are not worth a Cast: plain numbers they can be folded into their layer.
_MIN_ELEMENTS = 256


def computes_in(model: Model, dtypes: Collection[DataType]) -> bool:
    """Whether a linear operator reads one of these types."""
    return any(
        node.op_type in _LINEAR and any(value is not None and value.dtype in dtypes for value in node.inputs)
        for node in model.nodes()
    )


def compute_in_float32(model: Model, dtypes: Collection[DataType] = OTHER_FLOATS) -> bool:
    """Changes a model that belongs to the caller; whether it could be done. If not, nothing has changed.

    It cannot where an output is a sequence or optional of such a type, or where a tree or another operator of
    `ai.onnx.ml` reads one, whose own numbers are of that type too.
    """
    if any(_holds(value, dtypes) for value in model.graph.outputs) or any(
        node.domain == "ai.onnx.ml" and any(value is not None and value.dtype in dtypes for value in node.inputs)
        for node in model.nodes()
    ):
        return False
    editor = Editor(model)
    inputs = [value for value in model.graph.inputs if value.dtype in dtypes]
    outputs = [value for value in model.graph.outputs if value.dtype in dtypes and value.producer() is not None]
    constants = [
        (graph, value)
        for graph in model.graphs()
        for value in list(graph.initializers.values())
        if value.dtype in dtypes and not value.is_graph_input()
    ]
    kept = {value: value.dtype for value in outputs if value.dtype is not None}
    given = set(inputs)
    for value in values_of(model.ir):
        if value not in given and value.type is not None and value.dtype in dtypes:
            value.type = _float32(value.type)
    for node in model.nodes():
        _retype(node, dtypes)
    for value in inputs:
        _widen(editor, model.graph, value)
    for graph, value in constants:
        _widen_constant(editor, graph, value)
    for value, dtype in kept.items():
        _narrow_output(editor, model.graph, value, dtype)
    _drop_idle_casts(model)
    return True


def _holds(value: onnx_ir.Value, dtypes: Collection[DataType]) -> bool:
    return isinstance(value.type, onnx_ir.SequenceType | onnx_ir.OptionalType) and value.dtype in dtypes


def _float32(value_type: onnx_ir.TypeProtocol) -> onnx_ir.TypeProtocol:
    """The same kind of type; a new one, since the model's copies share theirs."""
    if isinstance(value_type, onnx_ir.SequenceType):
        return onnx_ir.SequenceType(_float32(value_type.elem_type))
    if isinstance(value_type, onnx_ir.OptionalType):
        return onnx_ir.OptionalType(_float32(value_type.elem_type))
    return onnx_ir.TensorType(DataType.FLOAT)


def _retype(node: onnx_ir.Node, dtypes: Collection[DataType]) -> None:
    """Attributes that name one of the types, or hold a tensor of it."""
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == onnx_ir.AttributeType.INT and name in _TYPE_ATTRIBUTES:
            if attribute.value in [dtype.value for dtype in dtypes]:
                node.attributes[name] = onnx_ir.AttrInt64(name, DataType.FLOAT.value)
        elif attribute.type == onnx_ir.AttributeType.TENSOR and attribute.as_tensor().dtype in dtypes:
            node.attributes[name] = onnx_ir.AttrTensor(name, _in_float32(attribute.as_tensor()))


def _in_float32(tensor: onnx_ir.TensorProtocol) -> onnx_ir.TensorProtocol:
    return onnx_ir.Tensor(np.asarray(tensor.numpy()).astype(np.float32), name=tensor.name)


def _widen(editor: Editor, graph: onnx_ir.Graph, value: onnx_ir.Value) -> None:
    """A Cast between the value and all that reads it."""
    uses = list(value.uses())
    if not uses:
        return
    real = Spot(editor, graph[0], value.name or "value").real(value)
    real.type, real.shape = onnx_ir.TensorType(DataType.FLOAT), value.shape
    for use in uses:
        use.node.replace_input_with(use.idx, real)


def _widen_constant(editor: Editor, graph: onnx_ir.Graph, value: onnx_ir.Value) -> None:
    tensor = value.const_value
    if tensor is None or value.is_graph_output() or _stays_narrow(tensor):
        _widen(editor, graph, value)
        return
    value.const_value, value.type = _in_float32(tensor), onnx_ir.TensorType(DataType.FLOAT)


def _stays_narrow(tensor: onnx_ir.TensorProtocol) -> bool:
    return tensor.dtype in NARROW and len(tensor.shape) > 1 and tensor.size >= _MIN_ELEMENTS


def _narrow_output(editor: Editor, graph: onnx_ir.Graph, value: onnx_ir.Value, dtype: DataType) -> None:
    """A Cast back, whose output takes the graph output's name."""
    name = value.name or "output"
    cast = editor.make("Cast", [value], name, attributes={"to": dtype.value})
    graph.append(cast)
    for position, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[position] = cast.outputs[0]
    value.name = editor.name(f"{name}_float32")
    made = cast.outputs[0]
    made.name, made.type, made.shape = name, onnx_ir.TensorType(dtype), value.shape


def _drop_idle_casts(model: Model) -> None:
    """Between what were two types before."""
    for node in list(model.nodes()):
        source = node.inputs[0] if node.op_type == "Cast" and not node.domain else None
        idle = source is not None and source.dtype == node.outputs[0].dtype == DataType.FLOAT
        if source is not None and idle and constant_tensor(source) is None:
            Editor.bypass(node, source)
