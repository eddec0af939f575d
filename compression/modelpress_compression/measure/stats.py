"""Figures of a model, read from its graph: parameters, bytes, multiply-accumulates, operators, layers.

A parameter is an element of a constant tensor that computes: floating point, or the integers that stand for it in a
quantized model. Not counted are

- scales, zero points and group indices of quantization;
- 32 and 64 bit integers and bools (shapes, axes, indices), unless a quantized operator takes them as its bias;
- single numbers in elementwise operators (the 0.5 and 1.41 of a GELU, an epsilon, the bounds of Clip).

A tensor that several nodes share counts once, for one of them. In a quantized weight the parameters are the numbers
that it stands for, not its bytes nor what fills up its last block, and elements equal to its zero point are the zeros.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir

from modelpress_compression.encodings.operands import is_quantization_parameter, is_stored_weight
from modelpress_compression.encodings.read import stored_weights
from modelpress_compression.graph.macs import count_macs
from modelpress_compression.graph.read import label
from modelpress_compression.graph.shapes import Shape
from modelpress_compression.model import GIVEN_NAME, Model

_STANDARD_DOMAINS = ("", "ai.onnx")
# Between a stored weight and the operator that works with it.
_CONVERSIONS = frozenset((
    "DequantizeLinear", "QuantizeLinear", "Cast", "Transpose", "Identity", "Reshape", "Slice", "Split", "Concat",
    "Unsqueeze", "Squeeze",
))  # fmt: skip
_MAX_HOPS = 8
# Operators for which a single number is a weight, not a constant of a formula.
_LAYERS = frozenset((
    "Conv", "ConvTranspose", "Gemm", "MatMul", "PRelu", "BatchNormalization", "LayerNormalization",
    "InstanceNormalization", "GroupNormalization", "LSTM", "GRU", "RNN", "FusedConv", "FusedGemm", "QLinearConv",
    "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
))  # fmt: skip
_SHAPES_AND_BOUNDS = {
    "Reshape": (1,), "Slice": (1, 2, 3, 4), "Unsqueeze": (1,), "Squeeze": (1,), "Expand": (1,), "Pad": (1, 2, 3),
    "Resize": (1, 2, 3), "Tile": (1,), "Clip": (1, 2), "Split": (1,), "TopK": (1,), "OneHot": (1, 2),
    "Range": (0, 1, 2), "ConstantOfShape": (0,), "Upsample": (1,),
}  # fmt: skip


@dataclass(frozen=True)
class LayerStats:
    """A node that owns weights. `bytes` includes its scales and zero points; `macs` None: not known."""

    name: str
    op_type: str
    parameters: int
    bytes: int
    macs: int | None


@dataclass(frozen=True)
class ModelStats:
    """Figures of a whole model. `ops`: how often each operator occurs, subgraphs included; `layers` in graph order."""

    parameters: int
    nonzero_parameters: int
    macs: int | None
    weight_bytes: int
    opset: int
    ops: Mapping[str, int]
    layers: tuple[LayerStats, ...]


@dataclass
class _Layer:
    node: onnx_ir.Node
    parameters: int = 0
    bytes: int = 0


@dataclass
class _Quantized:
    """A constant of a quantized weight: `parameters` is 0 for its scales and the like."""

    users: list[onnx_ir.Node] = field(default_factory=list)
    parameters: int = 0
    nonzero: int = 0


@dataclass
class _Tally:
    live_nodes: frozenset[int]
    quantized: Mapping[onnx_ir.Value, _Quantized]
    parameters: int = 0
    nonzero: int = 0
    layers: dict[int, _Layer] = field(default_factory=dict)


def model_stats(model: Model, input_shapes: Mapping[str, Shape] | None = None) -> ModelStats:
    """Figures of `model`. MACs are those of one run with every dynamic dimension at 1, or at the given input shapes.

    `graph.shapes.sample_shapes(data)` gives the shapes of one real sample. Weights are read one at a time.
    """
    macs = count_macs(model, input_shapes)
    tally = _Tally(frozenset(id(node) for node in model.nodes()), _quantized(model))
    seen: set[int] = set()
    for value, tensor in _constants(model):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            _count(tally, value, tensor)
    layers = tuple(
        LayerStats(
            name=layer_name(layer.node),
            op_type=layer.node.op_type,
            parameters=layer.parameters,
            bytes=layer.bytes,
            macs=_layer_macs(layer.node, macs.by_output),
        )
        for layer in _in_graph_order(model, tally.layers)
        if layer.parameters
    )
    ops = Counter(operator_name(node) for node in model.nodes())
    return ModelStats(
        parameters=tally.parameters,
        nonzero_parameters=tally.nonzero,
        macs=macs.total,
        weight_bytes=model.weight_bytes(),
        opset=model.opset,
        ops=dict(sorted(ops.items())),
        layers=layers,
    )


def operator_name(node: onnx_ir.Node) -> str:
    """`Conv`, or `com.microsoft.FusedConv` for operators beyond the ONNX standard."""
    return node.op_type if node.domain in _STANDARD_DOMAINS else f"{node.domain}.{node.op_type}"


def _constants(model: Model) -> Iterator[tuple[onnx_ir.Value, onnx_ir.TensorProtocol]]:
    """Initializers and the outputs of Constant nodes, with their tensors."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value
    for node in model.nodes():
        if node.op_type == "Constant" and node.outputs:
            attribute = node.attributes.get("value")
            if attribute is not None and attribute.type == onnx_ir.AttributeType.TENSOR:
                yield node.outputs[0], attribute.as_tensor()


def _quantized(model: Model) -> dict[onnx_ir.Value, _Quantized]:
    """All constants that quantized weights are made of."""
    found: dict[onnx_ir.Value, _Quantized] = {}
    for node in model.nodes():
        for stored in stored_weights(node):
            # A Mul or Reshape is but the last step of the arithmetic that makes a weight.
            is_last_step = node.op_type in ("Mul", "Reshape")
            users = [user for user, _ in node.outputs[0].uses()] if is_last_step else []
            for value in (stored.values, *stored.parameters):
                found.setdefault(value, _Quantized()).users += users or [node]
            entry = found[stored.values]
            entry.parameters, entry.nonzero = stored.weight.levels.size, stored.weight.nonzero()
    return found


def _count(tally: _Tally, value: onnx_ir.Value, tensor: onnx_ir.TensorProtocol) -> None:
    # Nodes that a rewrite has cut off may still be listed as users.
    uses = [(user, place) for user, place in value.uses() if id(user) in tally.live_nodes]
    if not uses:
        return
    quantized = tally.quantized.get(value)
    users = quantized.users if quantized is not None else [user for user, _ in uses]
    # Of several users always the same one, in whatever order the graph lists them.
    owner = min((layer_of(user) for user in users), key=lambda node: node.name or "")
    layer = tally.layers.setdefault(id(owner), _Layer(owner))
    layer.bytes += tensor.nbytes
    if quantized is not None:
        size, nonzero = quantized.parameters, quantized.nonzero
    elif any(_is_weight(user, place, tensor) for user, place in uses):
        size, nonzero = tensor.size, int(np.count_nonzero(tensor.numpy()))
    else:
        return
    tally.parameters += size
    tally.nonzero += nonzero
    layer.parameters += size


def layer_name(node: onnx_ir.Node) -> str:
    """The node's name, as loading gave it where the file has none: so it is the same before and after compression."""
    return node.name or str(node.meta.get(GIVEN_NAME) or "") or label(node)


def layer_of(node: onnx_ir.Node) -> onnx_ir.Node:
    """The node that works with what `node` hands on, conversions skipped."""
    for _ in range(_MAX_HOPS):
        if node.op_type not in _CONVERSIONS:
            break
        following = next((user for output in node.outputs for user, _ in output.uses()), None)
        if following is None:
            break
        node = following
    return node


def _is_weight(node: onnx_ir.Node, position: int, tensor: onnx_ir.TensorProtocol) -> bool:
    if is_quantization_parameter(node, position) or position in _SHAPES_AND_BOUNDS.get(node.op_type, ()):
        return False
    if tensor.size <= 1 and layer_of(node).op_type not in _LAYERS:
        return False
    if tensor.dtype.is_floating_point():
        return True
    return tensor.dtype.is_integer() and (tensor.dtype.bitwidth <= 8 or is_stored_weight(node, position))


def _layer_macs(node: onnx_ir.Node, by_output: Mapping[str, int | None]) -> int | None:
    name = node.outputs[0].name if node.outputs else None
    return by_output.get(name, 0) if name is not None else None


def _in_graph_order(model: Model, layers: Mapping[int, _Layer]) -> Iterator[_Layer]:
    return (layers[id(node)] for node in model.nodes() if id(node) in layers)
