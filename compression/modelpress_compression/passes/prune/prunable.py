"""Which weights are pruned: the weights of operators that multiply and sum, each once, however many nodes share it.

    Conv, ConvTranspose, Gemm, MatMul (the constant operand), FusedConv, FusedGemm, FusedMatMul     one weight
    LSTM, GRU, RNN                                  input weights W and recurrent weights R
    com.microsoft.Attention                         the packed projection of queries, keys and values

Left alone, with a reason: biases and the parameters of normalizations (few, and every one matters), embeddings (rows
are looked up, not multiplied), weights that are quantized already (zeros belong before the rounding), weights that are
computed, and whatever the user excludes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir

from modelpress_compression.encodings.operands import quantized_weights
from modelpress_compression.encodings.read import stored_weights
from modelpress_compression.graph.read import MICROSOFT, constant_tensor, is_op, label
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Skip, is_excluded

# (domain, operator) -> inputs that are weights
_WEIGHTS: Mapping[tuple[str, str], tuple[int, ...]] = MappingProxyType(
    {
        ("", "Conv"): (1,),
        ("", "ConvTranspose"): (1,),
        ("", "Gemm"): (1,),
        ("", "MatMul"): (1, 0),
        ("", "LSTM"): (1, 2),
        ("", "GRU"): (1, 2),
        ("", "RNN"): (1, 2),
        (MICROSOFT, "Attention"): (1,),
        (MICROSOFT, "FusedConv"): (1,),
        (MICROSOFT, "FusedGemm"): (1,),
        (MICROSOFT, "FusedMatMul"): (1, 0),
    }
)
_QUANTIZED = "The weight is quantized already; prune before quantizing."
_FLOATS = (
    onnx_ir.DataType.FLOAT,
    onnx_ir.DataType.FLOAT16,
    onnx_ir.DataType.DOUBLE,
    onnx_ir.DataType.BFLOAT16,
)


@dataclass(frozen=True)
class PrunableWeight:
    """A constant that nodes multiply by. `node`, `position`: its first user, and which of that node's inputs it is."""

    value: onnx_ir.Value
    node: onnx_ir.Node
    position: int

    @property
    def name(self) -> str:
        return self.value.name or label(self.node)

    @property
    def tensor(self) -> onnx_ir.TensorProtocol:
        tensor = constant_tensor(self.value)
        if tensor is None:
            raise TypeError(f"weight {self.name!r} is not constant")
        return tensor


def find_prunable(model: Model, exclude: tuple[str, ...]) -> tuple[list[PrunableWeight], list[Skip]]:
    """The weights to prune in the graph's order, and why others are left alone."""
    found: list[PrunableWeight] = []
    skipped: list[Skip] = []
    seen: set[int] = set()
    for node in model.nodes():
        skipped += _embedding(node, seen) + _quantized(node)
        for position in _positions(node):
            value = node.inputs[position]
            if value is None or id(value) in seen:
                continue
            seen.add(id(value))
            reason = _why_not(node, value, exclude)
            if reason is None:
                found.append(PrunableWeight(value, node, position))
            elif reason:
                skipped.append(Skip(value.name or label(node), reason))
    return found, skipped + _vectors(model, {id(weight.value) for weight in found})


def _positions(node: onnx_ir.Node) -> tuple[int, ...]:
    domain = "" if node.domain == "ai.onnx" else node.domain
    positions = tuple(p for p in _WEIGHTS.get((domain, node.op_type), ()) if p < len(node.inputs))
    if node.op_type in ("MatMul", "FusedMatMul"):
        # Products of activations have no weight; of two operands one at most is.
        return tuple(p for p in positions if constant_tensor(node.inputs[p]) is not None)[:1] or positions[:1]
    return positions


def _why_not(node: onnx_ir.Node, value: onnx_ir.Value, exclude: tuple[str, ...]) -> str | None:  # noqa: PLR0911 - a return for each reason
    """The reason; "" where there is nothing to speak of: a product of activations."""
    users = value.consumers()
    if is_excluded(value.name, exclude) or any(is_excluded(user.name, exclude) for user in users):
        return "Excluded by the recipe."
    tensor = constant_tensor(value)
    if tensor is None:
        producer = value.producer()
        if producer is not None and stored_weights(producer):
            return _QUANTIZED
        if node.op_type in ("MatMul", "FusedMatMul") and not _from_constant(producer):
            return ""
        return f"The weight of {node.op_type} is computed by the graph; run fuse first to fold it."
    if tensor.dtype not in _FLOATS:
        return f"The weight is of type {tensor.dtype.name}; only float weights are pruned."
    if len(tensor.shape) < 2:
        return "The weight has one axis only."
    others = [user.op_type for user in users if not any(i is value for i in _weight_inputs(user))]
    if others or value.is_graph_output():
        return f"The weight is used by {', '.join(sorted(set(others))) or 'an output'} as well."
    return None


def _from_constant(producer: onnx_ir.Node | None) -> bool:
    return producer is not None and any(constant_tensor(value) is not None for value in producer.inputs[:1])


def _weight_inputs(node: onnx_ir.Node) -> list[onnx_ir.Value | None]:
    return [node.inputs[position] for position in _positions(node)]


def _embedding(node: onnx_ir.Node, seen: set[int]) -> list[Skip]:
    table = node.inputs[0] if is_op(node, "Gather") and node.inputs else None
    tensor = constant_tensor(table)
    if table is None or tensor is None or tensor.dtype not in _FLOATS or len(tensor.shape) < 2 or id(table) in seen:
        return []
    seen.add(id(table))
    return [Skip(table.name or label(node), "An embedding: its rows are looked up, not multiplied.")]


def _quantized(node: onnx_ir.Node) -> list[Skip]:
    # Behind a DequantizeLinear the product's own weight tells.
    found = [] if is_op(node, "DequantizeLinear", domain=node.domain) else quantized_weights(node)
    return [Skip(label(node), _QUANTIZED)] if found else []


def _vectors(model: Model, pruned: set[int]) -> list[Skip]:
    """One line for all biases and normalization parameters: there are hundreds."""
    count = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = constant_tensor(value)
            if tensor is not None and id(value) not in pruned and tensor.dtype in _FLOATS and len(tensor.shape) == 1:
                count += tensor.size > 1
    left = f"{count} biases and parameters of normalizations"
    return [Skip(left, "They are few, and each one matters.")] if count else []
