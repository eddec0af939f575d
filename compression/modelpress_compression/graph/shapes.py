"""The concrete shape of every value of a graph, for given extents of the dynamic dimensions.

First by ONNX shape inference with those extents bound, and by rules for the com.microsoft operators that it does not
know. What it cannot tell (a Reshape to a computed shape, an operator without rule) is found by running the model once
with all values as outputs. What neither finds stays unknown: nothing is guessed.

A recipe asks often, and of the same graph: what was found is remembered by what inference sees of it, which is all but
large weights. Extents that depend on data are those of one run in any case.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from types import MappingProxyType

import numpy as np
import onnx
import onnx_ir
from onnx_ir.passes.common import InlinePass

from modelpress_compression.graph.read import int_attribute, ints_attribute, string_attribute
from modelpress_compression.graph.values import plausible_values
from modelpress_compression.graph.watch.shapes import TAKEN_BRANCH, observe_shapes
from modelpress_compression.inputs import Feeds, InputData
from modelpress_compression.model import Model, forget_maps

Shape = tuple[int, ...]
# Shape inference reads the values of small tensors only: axes, pads, target shapes.
SMALL_TENSOR_BYTES = 1024
# Each operator without a schema may cost a round; beyond this it is cheaper to run the model.
MAX_INFERENCE_ROUNDS = 8
# Values of all nodes are held at once while the model is run for their shapes.
MAX_RUN_BYTES = 4 * 1024**3  # 4 GiB

# Graphs whose shapes are remembered.
REMEMBERED = 8

# Output 0 has the shape of input 0.
_SAME_SHAPE = frozenset((
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "FastGelu",
    "BiasGelu", "QuickGelu", "Gelu", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QuantizeLinear",
    "DequantizeLinear", "RotaryEmbedding", "LayerNormalization", "GroupNorm", "SkipGroupNorm", "BiasAdd",
))  # fmt: skip
_MATRIX_PRODUCTS = frozenset((
    "FusedMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "TransposeMatMul", "FusedMatMulActivation",
))  # fmt: skip
# Operators of other types than their first input's: those of a zero point, of a scale, of a table.
_TYPED_BY: Mapping[str, int] = MappingProxyType(
    {
        "QuantizeLinear": 2,
        "DequantizeLinear": 1,
        "EmbedLayerNormalization": 2,
        "MatMulIntegerToFloat": 2,
        "QAttention": 3,
    }
)


def static_shapes(model: Model, input_shapes: Mapping[str, Shape] | None = None) -> onnx_ir.Model:
    """A copy of the graph, functions inlined, whose values carry concrete shapes wherever they can be known.

    `input_shapes`: shapes of inputs by name; an input that is not named has every dynamic dimension at 1, or at what a
    named input gives a dimension of the same name.
    """
    bound = bind_inputs(model, input_shapes or {})
    ir = model.ir.clone()
    if ir.functions:
        ir = InlinePass()(ir).model
    _forget_shapes(ir, bound)
    light = without_weights(ir)
    key = hashlib.sha256(onnx_ir.to_proto(light).SerializeToString(deterministic=True)).digest()
    known = _REMEMBERED.pop(key, None)
    if known is not None:
        _recall(known, ir)
    else:
        _infer(ir, light)
        if any(not _is_known(value) for node in ir.graph.all_nodes() for value in node.outputs):
            _observe(ir, model, bound)
        known = [_known(node) for node in ir.graph.all_nodes()]
    _REMEMBERED[key] = known  # the last to be forgotten
    if len(_REMEMBERED) > REMEMBERED:
        _REMEMBERED.popitem(last=False)
    return ir


@dataclass(frozen=True)
class _Known:
    """Of a node: what its outputs are, as far as it is known, and which branch a run took."""

    outputs: tuple[tuple[Shape | None, onnx_ir.TypeProtocol | None], ...]
    branch: str | None


_REMEMBERED: OrderedDict[bytes, list[_Known]] = OrderedDict()


def _known(node: onnx_ir.Node) -> _Known:
    return _Known(tuple((shape_of(value), value.type) for value in node.outputs), node.meta.get(TAKEN_BRANCH))


def _recall(known: Iterable[_Known], ir: onnx_ir.Model) -> None:
    for node, found in zip(ir.graph.all_nodes(), known, strict=True):
        if found.branch is not None:
            node.meta[TAKEN_BRANCH] = found.branch
        for value, (shape, type_) in zip(node.outputs, found.outputs, strict=True):
            value.shape, value.type = None if shape is None else onnx_ir.Shape(shape), type_


def infer_shapes(ir: onnx_ir.Model) -> None:
    """Shapes and types in place, symbolic ones included, as far as ONNX can tell.

    A known shape is never replaced by a vaguer one, nor a sequence by the tensors that it holds. Operators that ONNX
    does not know leave gaps. Outputs get no names that inference invents, since users see them.
    """
    inferred = inferred_copy(without_weights(ir))
    if inferred is None:
        return
    values = values_of(ir)
    symbols, seen = _symbols(values), _symbols((*ir.graph.inputs, *ir.graph.outputs))
    outputs = set(ir.graph.outputs)
    forgets = any(isinstance(found.type, onnx_ir.SequenceType) for found in values_of(inferred))
    for value, found in zip(values, values_of(inferred), strict=True):
        before, now = value.shape, found.shape
        if now is not None and value in outputs:
            now = onnx_ir.Shape(_without_invented(now, seen))
        elif forgets and now is not None:
            now = onnx_ir.Shape(_without_invented(now, symbols))
        value.type = found.type or value.type
        if value in outputs and isinstance(value.type, onnx_ir.SequenceType | onnx_ir.OptionalType):
            continue  # nobody reads the shape of its tensors, and the file would grow
        if before is None or now is None or len(now) != len(before):
            value.shape = now or before
        else:
            value.shape = onnx_ir.Shape([_sharper(old, new) for old, new in zip(before, now, strict=True)])


def _symbols(values: Iterable[onnx_ir.Value]) -> set[str | None]:
    return {dim.value for value in values for dim in value.shape or () if isinstance(dim, onnx_ir.SymbolicDim)}


def _without_invented(
    shape: onnx_ir.Shape, symbols: Collection[str | None]
) -> Iterator[int | onnx_ir.SymbolicDim | None]:
    """Inference gives all tensors of a sequence one shape with names of its own, yet their extents may differ:
    onnxruntime would take equal names for equal sizes, and put one tensor into the memory of another."""
    for dim in shape:
        yield None if isinstance(dim, onnx_ir.SymbolicDim) and dim.value not in symbols else dim


def _sharper(old: int | onnx_ir.SymbolicDim, new: int | onnx_ir.SymbolicDim) -> int | onnx_ir.SymbolicDim:
    if isinstance(new, int):
        return new
    return old if isinstance(old, int) or old.value is not None else new


def values_of(ir: onnx_ir.Model) -> list[onnx_ir.Value]:
    """Inputs and nodes' outputs, graph by graph."""
    return [
        value
        for graph in _graphs(ir)
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs))
    ]


def bind_inputs(model: Model, input_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """A concrete shape for every input that a caller must give; see `static_shapes`."""
    extents: dict[str, int] = {}
    for spec in model.inputs:
        for dim, extent in zip(spec.shape, input_shapes.get(spec.name, ()), strict=False):
            if isinstance(dim, str):
                extents[dim] = extent
    return {
        spec.name: input_shapes[spec.name]
        if spec.name in input_shapes
        else tuple(dim if isinstance(dim, int) else extents.get(dim or "", 1) for dim in spec.shape)
        for spec in model.inputs
    }


def sample_shapes(data: InputData) -> dict[str, Shape]:
    """Input shapes of one sample (or of the model's fixed batch): for figures of one real run."""
    feed = next(iter(data.feeds(1)), {})
    return {name: tuple(array.shape) for name, array in feed.items()}


def shape_of(value: onnx_ir.Value | None) -> Shape | None:
    """The concrete shape, where it is known."""
    if value is None:
        return None
    if value.const_value is not None:
        return tuple(int(extent) for extent in value.const_value.shape.numpy())
    if value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(extent) for extent in value.shape.numpy())


def _is_known(value: onnx_ir.Value) -> bool:
    # Sequences and optionals have no shape to find.
    return not value.name or shape_of(value) is not None or not isinstance(value.type, onnx_ir.TensorType | None)


def _forget_shapes(ir: onnx_ir.Model, bound: Mapping[str, Shape]) -> None:
    """Stored shapes are symbolic, or those of an earlier state of the graph."""
    for node in ir.graph.all_nodes():
        for value in node.outputs:
            value.shape = None
    for value in ir.graph.inputs:
        if (shape := bound.get(value.name or "")) is not None:
            value.shape = onnx_ir.Shape(shape)


def _infer(ir: onnx_ir.Model, light: onnx_ir.Model) -> None:
    """Inference, then own rules, until neither finds more. `light`: the same, `without_weights`."""
    for _ in range(MAX_INFERENCE_ROUNDS):
        inferred = inferred_copy(light)
        if inferred is None:
            return
        _take_shapes(inferred, light)
        _take_shapes(inferred, ir)
        if not (_apply_rules(light) and _apply_rules(ir)):
            return


def inferred_copy(light: onnx_ir.Model) -> onnx_ir.Model | None:
    """The same graph with the shapes and types that ONNX infers; None where inference refuses it: it may still run."""
    try:
        proto = onnx.shape_inference.infer_shapes(onnx_ir.to_proto(light), data_prop=True)
        forget_maps(proto)
        return onnx_ir.from_proto(proto)
    except (onnx.shape_inference.InferenceError, onnx_ir.serde.SerdeError, ValueError, RuntimeError):
        return None


def without_weights(ir: onnx_ir.Model) -> onnx_ir.Model:
    """A copy whose large tensors are references to a file that nobody reads: protobuf holds no 2 GiB.

    Defaults of inputs are left out, since inference takes them for constants.
    """
    light = ir.clone()
    for value in light.graph.inputs:
        light.graph.initializers.pop(value.name or "", None)
        value.const_value = None
    for graph in _graphs(light):
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.nbytes > SMALL_TENSOR_BYTES:
                value.const_value = _reference(value.const_value)
    for node in light.graph.all_nodes():
        attribute = node.attributes.get("value") if node.op_type == "Constant" else None
        if attribute is not None and attribute.type == onnx_ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.nbytes > SMALL_TENSOR_BYTES:
                node.attributes["value"] = onnx_ir.AttrTensor("value", _reference(tensor))
    return light


def _reference(tensor: onnx_ir.TensorProtocol) -> onnx_ir.ExternalTensor:
    shape = onnx_ir.Shape(tensor.shape.numpy())
    return onnx_ir.ExternalTensor("unread", 0, tensor.nbytes, tensor.dtype, shape=shape, name=tensor.name or "unread")


def _graphs(ir: onnx_ir.Model) -> Iterator[onnx_ir.Graph]:
    return chain([ir.graph], ir.graph.subgraphs())


def _take_shapes(source: onnx_ir.Model, target: onnx_ir.Model) -> None:
    """Copies what is known; both are the same graph, so their nodes come in the same order."""
    for mine, theirs in zip(target.graph.all_nodes(), source.graph.all_nodes(), strict=True):
        for value, found in zip(mine.outputs, theirs.outputs, strict=True):
            if value.shape is None and (shape := shape_of(found)) is not None:
                value.shape = onnx_ir.Shape(shape)
            if value.type is None:
                value.type = found.type


def _apply_rules(ir: onnx_ir.Model) -> bool:
    """Shapes of outputs that inference does not know; whether there were any."""
    found = False
    for node in ir.graph.all_nodes():
        output = node.outputs[0] if node.outputs else None
        if output is None or output.shape is not None or not (node.domain or node.op_type in _SAME_SHAPE):
            continue
        shape = _rule(node)
        if shape is not None:
            output.shape = onnx_ir.Shape(shape)
            if output.type is None:
                output.type = _type_of_output(node)
            found = True
    return found


def _type_of_output(node: onnx_ir.Node) -> onnx_ir.TypeProtocol | None:
    """Of an operator with a rule: the type of one of its inputs, of the first where nothing else is said."""
    position = _TYPED_BY.get(node.op_type, 0)
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None and node.op_type == "QuantizeLinear":
        return onnx_ir.TensorType(onnx_ir.DataType.UINT8)
    return value.type if value is not None else None


def _rule(node: onnx_ir.Node) -> Shape | None:
    """Shape of output 0 of a com.microsoft operator, from those of its inputs."""
    shapes = [shape_of(value) for value in node.inputs]
    data = shapes[0]
    if data is None or node.op_type in _SAME_SHAPE:
        return data
    if node.op_type in ("MatMulNBits", "MatMulBnb4"):
        return (*data[:-1], int_attribute(node, "N", 0))
    other = shapes[1] if len(shapes) > 1 else None
    shape: Shape | None = None
    if node.op_type in _MATRIX_PRODUCTS and other:
        shape = _matrix_product(node, data, other)
    elif node.op_type == "FusedConv" and other:
        shape = _convolution(node, data, other)
    elif node.op_type == "FusedGemm" and other:
        shape = data[1 if int_attribute(node, "transA", 0) else 0], other[0 if int_attribute(node, "transB", 0) else 1]
    elif node.op_type in ("Attention", "QAttention") and other:
        sizes = node.attributes.get("qkv_hidden_sizes")
        shape = (*data[:2], int(sizes.as_ints()[2]) if sizes is not None else other[1] // 3)
    elif len(shapes) > 2 and shapes[2]:
        shape = _attended(node, data, shapes[2])
    return shape


def _attended(node: onnx_ir.Node, data: Shape, third: Shape) -> Shape | None:
    """MultiHeadAttention (input 2 is the value), EmbedLayerNormalization (input 2 is the table of words)."""
    if node.op_type == "MultiHeadAttention" and len(data) == 3:
        return (*data[:2], third[2] if len(third) == 3 else third[1] * third[3])
    if node.op_type == "EmbedLayerNormalization":
        return (*data, third[1])
    return None


def _matrix_product(node: onnx_ir.Node, left: Shape, right: Shape) -> Shape | None:
    if (
        len(left) < 2
        or len(right) < 2
        or int_attribute(node, "transBatchA", 0)
        or int_attribute(node, "transBatchB", 0)
    ):
        return None
    rows = left[-1] if int_attribute(node, "transA", 0) else left[-2]
    columns = right[-2] if int_attribute(node, "transB", 0) else right[-1]
    try:
        return (*np.broadcast_shapes(left[:-2], right[:-2]), rows, columns)
    except ValueError:
        return None


def _convolution(node: onnx_ir.Node, data: Shape, weight: Shape) -> Shape | None:
    """Extents as ONNX defines them for Conv: floor((in + pads - dilation * (kernel - 1) - 1) / stride) + 1."""
    axes = len(data) - 2
    ones = (1,) * axes
    strides, dilations = ints_attribute(node, "strides") or ones, ints_attribute(node, "dilations") or ones
    spatial: list[int] = []
    automatic = string_attribute(node, "auto_pad", "NOTSET")
    pads = ints_attribute(node, "pads") or (0,) * 2 * axes
    for axis in range(axes):
        if automatic.startswith("SAME"):
            spatial.append(-(-data[axis + 2] // strides[axis]))
            continue
        padded = data[axis + 2] + (pads[axis] + pads[axis + axes] if automatic == "NOTSET" else 0)
        spatial.append((padded - dilations[axis] * (weight[axis + 2] - 1) - 1) // strides[axis] + 1)
    return (data[0], weight[0], *spatial)


def _observe(ir: onnx_ir.Model, model: Model, bound: Mapping[str, Shape]) -> None:
    """Runs the model once for the shapes that are still unknown."""
    weight_bytes = sum(tensor.nbytes for tensor in model.tensors())
    feeds = _plausible_feeds(model, bound) if weight_bytes <= MAX_RUN_BYTES else None
    if feeds is not None and observe_shapes(replace(model, ir=ir), feeds):
        _infer(ir, without_weights(ir))


def _plausible_feeds(model: Model, bound: Mapping[str, Shape]) -> Feeds | None:
    feeds: Feeds = {}
    for spec in model.inputs:
        value = next(value for value in model.graph.inputs if value.name == spec.name)
        feeds[spec.name] = plausible_values(value, spec, bound[spec.name], np.random.default_rng(0))
    return feeds
