"""Multiply-accumulates of a graph: those of convolutions, matrix products, recurrent cells and attention.

The convention is that of the usual counters for torch: one multiply with its addition is one MAC; elementwise
operators, normalizations, activations, pooling and Fourier transforms count nothing. A node whose shapes are not
known, or an operator that is not known, makes the whole unknown (None): nothing is estimated.

With [M, K] x [K, N] a matrix product is M * K * N; a convolution is (elements of the output) * (elements of one
filter), where a filter [in_channels / group, kH, kW] is one row of the weight. If counts its larger branch, or, where
the other cannot be known, the one that a run takes; Loop its body times a constant trip count, Scan its body times the
scanned length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir

from modelpress_compression.graph.read import MICROSOFT, constant_array, input_of, int_attribute, string_attribute
from modelpress_compression.graph.shapes import Shape, shape_of, static_shapes
from modelpress_compression.graph.subgraphs import subgraphs
from modelpress_compression.graph.watch.shapes import TAKEN_BRANCH
from modelpress_compression.model import Model

Rule = Callable[[onnx_ir.Node, Sequence[Shape | None], Sequence[Shape | None]], int | None]
_STANDARD_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training")


@dataclass(frozen=True)
class Macs:
    """`total` for one run, None where any part is unknown. `by_output[name]`: of the node that makes this value; a
    value of a subgraph counts one execution of it."""

    total: int | None
    by_output: Mapping[str, int | None]


def count_macs(model: Model, input_shapes: Mapping[str, Shape] | None = None) -> Macs:
    """MACs with every dynamic dimension at 1, or at what `input_shapes` (by input name) says."""
    by_output: dict[str, int | None] = {}
    ir = static_shapes(model, input_shapes)
    return Macs(_of_graph(ir.graph, by_output), by_output)


def _of_graph(graph: onnx_ir.Graph, by_output: dict[str, int | None]) -> int | None:
    counts = [_of_node(node, by_output) for node in graph]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _of_node(node: onnx_ir.Node, by_output: dict[str, int | None]) -> int | None:
    bodies = {name: _of_graph(body, by_output) for name, body in subgraphs(node).items()}
    if bodies:
        return _of_control_flow(node, bodies)
    rule = RULES.get(node.op_type)
    if rule is None:
        return 0 if node.domain in _STANDARD_DOMAINS or node.op_type in _NOTHING else None
    count = rule(node, [shape_of(value) for value in node.inputs], [shape_of(value) for value in node.outputs])
    if node.outputs and node.outputs[0].name:
        by_output[node.outputs[0].name] = count
    return count


def _of_control_flow(node: onnx_ir.Node, bodies: Mapping[str, int | None]) -> int | None:
    counts = [count for count in bodies.values() if count is not None]
    if node.op_type == "If":
        return max(counts) if len(counts) == len(bodies) else bodies.get(node.meta.get(TAKEN_BRANCH, ""))
    if len(counts) < len(bodies):
        return None
    trips = _trip_count(node) if any(counts) else 0
    return None if trips is None else trips * sum(counts)


def _trip_count(node: onnx_ir.Node) -> int | None:
    if node.op_type == "Loop":
        trips = constant_array(node.inputs[0])
        return None if trips is None else int(trips.item())
    # Only the present form of Scan, over the first axis.
    if node.op_type != "Scan" or "scan_input_axes" in node.attributes:
        return None
    scanned = shape_of(node.inputs[-int_attribute(node, "num_scan_inputs", 1)])
    return scanned[0] if scanned else None


def _convolution(weight: int) -> Rule:
    """Conv and its kin; `weight`: which input is the weight [M, C / group, kernel...]."""

    def rule(_: onnx_ir.Node, inputs: Sequence[Shape | None], outputs: Sequence[Shape | None]) -> int | None:
        kernel, output = inputs[weight], outputs[0]
        return None if kernel is None or output is None else math.prod(output) * math.prod(kernel[1:])

    return rule


def _transposed_convolution(_: onnx_ir.Node, inputs: Sequence[Shape | None], __: Sequence[Shape | None]) -> int | None:
    """Weight [C, M / group, kernel...]: every input element is multiplied by its row."""
    data, kernel = inputs[0], inputs[1]
    return None if data is None or kernel is None else math.prod(data) * math.prod(kernel[1:])


def _matrix_product(left: int, right: int) -> Rule:
    """MatMul and its kin, NumPy's batching; `left`, `right`: which inputs the factors are."""

    def rule(node: onnx_ir.Node, inputs: Sequence[Shape | None], _: Sequence[Shape | None]) -> int | None:
        a, b = inputs[left], inputs[right]
        if not a or not b or int_attribute(node, "transBatchA", 0) or int_attribute(node, "transBatchB", 0):
            return None
        inner_first = int_attribute(node, "transA", 0) and len(a) > 1
        rows = (a[-1] if inner_first else a[-2]) if len(a) > 1 else 1
        columns = (b[-2] if int_attribute(node, "transB", 0) else b[-1]) if len(b) > 1 else 1
        try:
            batch = np.broadcast_shapes(a[:-2], b[:-2])
        except ValueError:
            return None
        return math.prod(batch) * rows * columns * (a[-2] if inner_first else a[-1])

    return rule


def _n_bit_product(node: onnx_ir.Node, inputs: Sequence[Shape | None], _: Sequence[Shape | None]) -> int | None:
    """MatMulNBits: A [..., K] times a packed [K, N]."""
    return None if inputs[0] is None else math.prod(inputs[0]) * int_attribute(node, "N", 0)


def _recurrent(gates: int) -> Rule:
    """X [T, B, I]; per step and direction `gates` products with W [H, I] and R [H, H]."""

    def rule(node: onnx_ir.Node, inputs: Sequence[Shape | None], _: Sequence[Shape | None]) -> int | None:
        data, weight = inputs[0], inputs[1]
        if data is None or weight is None or len(data) != 3 or "hidden_size" not in node.attributes:
            return None
        hidden = int_attribute(node, "hidden_size", 0)
        return data[0] * data[1] * weight[0] * gates * hidden * (data[2] + hidden)

    return rule


def _packed_attention(node: onnx_ir.Node, inputs: Sequence[Shape | None], _: Sequence[Shape | None]) -> int | None:
    """com.microsoft Attention: X [B, S, D] times the joint weight [D, Q + K + V], Q K^T, and scores times V."""
    data, weight = inputs[0], inputs[1]
    past = 8 if node.op_type == "QAttention" else 4
    if data is None or weight is None or len(data) != 3 or (len(inputs) > past and inputs[past] is not None):
        return None
    batch, length, width = data
    sizes = node.attributes.get("qkv_hidden_sizes")
    query, value = (sizes.as_ints()[0], sizes.as_ints()[2]) if sizes is not None else (weight[1] // 3, weight[1] // 3)
    return batch * length * (width * weight[1] + length * (int(query) + int(value)))


def _multi_head_attention(node: onnx_ir.Node, inputs: Sequence[Shape | None], _: Sequence[Shape | None]) -> int | None:
    """Query [B, S, Q], key [B, L, Q], value [B, L, V] (or key and value split by head, [B, heads, L, size])."""
    query, key, value = (inputs[index] if index < len(inputs) else None for index in range(3))
    given = [index for index, item in enumerate(node.inputs) if item is not None]
    if query is None or key is None or value is None or len(query) != 3 or {6, 7} & set(given):
        return None
    length = key[2] if len(key) == 4 else key[1]
    value_width = value[1] * value[3] if len(value) == 4 else value[2]
    return query[0] * query[1] * length * (query[2] + value_width)


def _attention(node: onnx_ir.Node, inputs: Sequence[Shape | None], outputs: Sequence[Shape | None]) -> int | None:
    """`Attention` is two operators: the standard one takes Q, K and V, that of com.microsoft X and the joint weight."""
    if node.domain == MICROSOFT:
        return _packed_attention(node, inputs, outputs)
    query, key, value = inputs[0], inputs[1], inputs[2]
    if query is None or key is None or value is None or input_of(node, 4) is not None:
        return None
    if len(query) == 4:
        return query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])
    heads, value_heads = int_attribute(node, "q_num_heads", 1), int_attribute(node, "kv_num_heads", 1)
    return query[0] * query[1] * key[1] * (query[2] + heads * (value[2] // value_heads))


def _einsum(node: onnx_ir.Node, inputs: Sequence[Shape | None], _: Sequence[Shape | None]) -> int | None:
    """One operand has no products; two have one for each combination of indices; more depend on the order: unknown."""
    equation = string_attribute(node, "equation", "").replace(" ", "")
    terms = equation.split("->")[0].split(",")
    if len(terms) == 1:
        return 0
    if len(terms) > 2:
        return None
    extents: dict[str, int] = {}
    for term, shape in zip(terms, inputs, strict=True):
        if shape is None:
            return None
        before, dots, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after)
        if hidden < 0 or (hidden and not dots):
            return None
        # Axes under an ellipsis are aligned from the right and broadcast.
        names = [*before, *(f"...{index}" for index in range(hidden, 0, -1)), *after]
        for name, extent in zip(names, shape, strict=True):
            extents[name] = max(extents.get(name, 1), extent)
    return math.prod(extents.values())


RULES: dict[str, Rule] = {
    "Conv": _convolution(1),
    "FusedConv": _convolution(1),
    "NhwcFusedConv": _convolution(1),
    "NhwcConv": _convolution(1),
    "ConvInteger": _convolution(1),
    "QLinearConv": _convolution(3),
    "DeformConv": _convolution(1),
    "ConvTranspose": _transposed_convolution,
    "Gemm": _matrix_product(0, 1),
    "FusedGemm": _matrix_product(0, 1),
    "QGemm": _matrix_product(0, 3),
    "MatMul": _matrix_product(0, 1),
    "FusedMatMul": _matrix_product(0, 1),
    "TransposeMatMul": _matrix_product(0, 1),
    "FusedMatMulActivation": _matrix_product(0, 1),
    "MatMulInteger": _matrix_product(0, 1),
    "MatMulIntegerToFloat": _matrix_product(0, 1),
    "DynamicQuantizeMatMul": _matrix_product(0, 1),
    "QLinearMatMul": _matrix_product(0, 3),
    "MatMulNBits": _n_bit_product,
    "LSTM": _recurrent(4),
    "DynamicQuantizeLSTM": _recurrent(4),
    "GRU": _recurrent(3),
    "RNN": _recurrent(1),
    "Attention": _attention,
    "QAttention": _packed_attention,
    "MultiHeadAttention": _multi_head_attention,
    "Einsum": _einsum,
}
# Operators of com.microsoft without multiply-accumulates by the convention above.
_NOTHING = frozenset((
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization",
    "EmbedLayerNormalization", "FastGelu", "BiasGelu", "QuickGelu", "Gelu", "BiasAdd", "BiasSplitGelu",
    "BiasSoftmax", "BiasDropout", "GroupNorm", "SkipGroupNorm", "RotaryEmbedding", "QuantizeLinear",
    "DequantizeLinear", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax",
    "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearReduceMean", "QLinearWhere",
    "NhwcMaxPool", "MaxpoolWithMask", "Pad", "Trilu", "Unique", "ExpandDims", "Range", "GatherND",
    "GatherBlockQuantized", "GridSample",
))  # fmt: skip
