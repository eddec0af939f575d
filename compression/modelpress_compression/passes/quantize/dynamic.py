"""Weights in 8 bits, activations quantized while the model runs, by the range that they have in that run.

    MatMul(A, W)      ->  q, s, z = DynamicQuantizeLinear(A);  Cast(MatMulInteger(q, Wq, z, zw)) * (s * sw)
    Gemm(A, W, C)     ->  the same, + beta * C
    LSTM              ->  com.microsoft DynamicQuantizeLSTM
    Attention         ->  com.microsoft QAttention on DynamicQuantizeLinear(input)
    Gather(W, index)  ->  Gather(Wq, index) * Gather(sw, index): embeddings, a scale per row

A: [..., K], W: [K, N], sw: [N]. onnxruntime fuses the first form into DynamicQuantizeMatMul, or MatMulIntegerToFloat
where several products share one quantized input. Convolutions are left alone: ConvInteger takes 3 to 10 times
float32's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import onnx_ir

from modelpress_compression.encodings import folded, products
from modelpress_compression.encodings.operands import arranged
from modelpress_compression.encodings.weight import StoredWeight
from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import (
    MICROSOFT,
    attribute,
    constant_array,
    graph_of,
    input_of,
    is_constant,
    is_op,
    label,
    required,
)
from modelpress_compression.passes.base import is_excluded
from modelpress_compression.passes.integers.products import Summation, of_matrix
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.eligible import is_embedding, why_not_matrix, why_not_weight
from modelpress_compression.passes.quantize.plan import is_memory_bound
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.weights import WeightStore

_QATTENTION_ATTRIBUTES = (
    "num_heads",
    "unidirectional",
    "mask_filter_value",
    "scale",
    "do_rotary",
    "past_present_share_buffer",
)
_LSTM_ATTRIBUTES = (
    "activations",
    "activation_alpha",
    "activation_beta",
    "clip",
    "direction",
    "hidden_size",
    "input_forget",
)


def why_not(node: onnx_ir.Node) -> str | None:
    """Why a node of `REWRITES` stays as it is; None: it can be rewritten."""
    if node.op_type in ("MatMul", "Gemm"):
        few = "it has too few weights to pay for quantizing its input" if is_memory_bound(node) else None
        return why_not_matrix(node) or few
    if node.op_type == "LSTM":
        if attribute(node, "layout", 0):
            return "its layout is batch first"
        return why_not_weight(node, 1) or why_not_weight(node, 2)
    if node.op_type == "Attention":
        return _why_not_attention(node)
    return _why_not_gather(node)


def _why_not_attention(node: onnx_ir.Node) -> str | None:
    if "qkv_hidden_sizes" in node.attributes:
        return "query, key and value differ in size, which onnxruntime's QAttention does not take"
    if input_of(node, 5) is not None or input_of(node, 6) is not None:
        return "it has an attention bias, which onnxruntime's QAttention does not take"
    if not is_constant(input_of(node, 2)):
        return "it has no constant bias, which onnxruntime's QAttention needs"
    return why_not_weight(node, 1)


def _why_not_gather(node: onnx_ir.Node) -> str | None:
    if reason := why_not_weight(node, 0):
        return reason
    table = required(node, 0)
    # What a product reads is stored for both.
    if any(not (_looks_up(use.node, use.idx) or _multiplies(use.node, use.idx)) for use in table.uses()):
        return "its table has other users, so that the float32 table would have to stay"
    return None


def _looks_up(user: onnx_ir.Node, index: int) -> bool:
    return is_op(user, "Gather") and index == 0 and not attribute(user, "axis", 0)


def _multiplies(user: onnx_ir.Node, index: int) -> bool:
    return is_op(user, "MatMul", "Gemm") and index == 1 and why_not(user) is None


def is_candidate(node: onnx_ir.Node) -> bool:
    """Whether it is an operator of `REWRITES`; a Gather is one only where it looks up rows of an embedding table."""
    if node.op_type not in REWRITES or node.domain != (MICROSOFT if node.op_type == "Attention" else ""):
        return False
    return node.op_type != "Gather" or is_embedding(node)


@dataclass
class DynamicRewriter:
    """Rewrites single nodes in place; nodes of one graph that share an input share its quantized form."""

    editor: Editor
    store: WeightStore
    _inputs: dict[tuple[onnx_ir.Value, onnx_ir.Graph], products.QuantizedInput] = field(default_factory=dict)

    def rewrite(self, node: onnx_ir.Node) -> None:
        """Replaces a node for which `why_not` found nothing. Nodes must come in the order of their graph."""
        graph = graph_of(node)
        REWRITES[node.op_type](self, node)
        graph.remove(node, safe=True)

    def matrix_product(self, node: onnx_ir.Node) -> None:
        weight, x = self.store.matrix(node), self._quantized(node)
        bias = input_of(node, 2) if node.op_type == "Gemm" else None
        scaled = None if bias is None else self._scaled(node, bias)
        self.editor.hand_over(node.outputs[0], products.write(self.editor, node, x, weight, scaled))

    def _scaled(self, node: onnx_ir.Node, bias: onnx_ir.Value) -> onnx_ir.Value:
        beta = np.float32(attribute(node, "beta", 1.0))
        if beta == 1:
            return bias
        constant = constant_array(bias)
        if constant is not None:
            return self.editor.constant(graph_of(node), np.asarray(constant, np.float32) * beta, f"{bias.name}_scaled")
        factor = self.editor.constant(graph_of(node), np.asarray(beta), f"{label(node)}_beta")
        return self.editor.emit(node, "Mul", [bias, factor], f"{label(node)}_beta")[0]

    def lstm(self, node: onnx_ir.Node) -> None:
        w, r = (self._recurrent(node, index) for index in (1, 2))
        names = ("bias", "lengths", "h", "c", "p")
        rest = {"x": input_of(node, 0), **{name: input_of(node, index) for index, name in enumerate(names, 3)}}
        self._fused(node, "DynamicQuantizeLSTM", _LSTM_ATTRIBUTES, **rest, **w.operands("w"), **r.operands("r"))

    def _recurrent(self, node: onnx_ir.Node, index: int) -> StoredWeight:
        """[directions, 4 * hidden, inputs] as [directions, inputs, 4 * hidden], a scale per direction or per column."""
        source = required(node, index)
        weight = self.store.array(source)
        directions, columns, rows = weight.shape
        per_channel = self.store.config.per_channel
        slices = weight.reshape((-1, 1, rows) if per_channel else weight.shape)
        quantized = self.store.quantize(slices, Summation((2,), 0))
        levels = quantized.levels.reshape(weight.shape).transpose(0, 2, 1)
        scale = quantized.scale.reshape(directions, columns) if per_channel else quantized.scale
        key = replace(quantized, levels=levels, scale=scale, axis=None)
        return self.store.store(source, key)

    def attention(self, node: onnx_ir.Node) -> None:
        source = required(node, 1)
        axis = 1 if self.store.config.per_channel else None
        quantized = self.store.quantize(self.store.array(source), of_matrix(2, axis))
        weight = self.store.store(source, quantized)
        values, scale, zero_point = self._quantized(node)
        rest = {"bias": input_of(node, 2), "mask": input_of(node, 3), "past": input_of(node, 4)}
        x = {"x": values, "x_scale": scale, "x_zero": zero_point}
        self._fused(node, "QAttention", _QATTENTION_ATTRIBUTES, **x, **weight.operands(), **rest)

    def _fused(
        self, node: onnx_ir.Node, op_type: str, attributes: Sequence[str], **operands: onnx_ir.Value | None
    ) -> None:
        """An operator of com.microsoft in the node's place, with those of its attributes."""
        new = self.editor.make(
            op_type,
            arranged(op_type, **operands),
            label(node),
            domain=MICROSOFT,
            outputs=[f"_{index}" for index in range(len(node.outputs))],
        )
        new.attributes.update({key: node.attributes[key] for key in attributes if key in node.attributes})
        graph_of(node).insert_before(node, new)
        for old, output in zip(node.outputs, new.outputs, strict=True):
            if old.name:
                self.editor.hand_over(old, output)
            else:
                output.name = ""

    def gather(self, node: onnx_ir.Node) -> None:
        """A scale per row: the norms of embeddings differ more between words than between channels."""
        table = required(node, 0)
        product = self.store.product_of(table)
        if product is not None:
            self.store.matrix(product)
        self.editor.hand_over(node.outputs[0], folded.write_rows(self.editor, node, self.store.rows(table)))

    def _quantized(self, node: onnx_ir.Node) -> products.QuantizedInput:
        """Values, scale and zero point of the node's first input."""
        source = required(node, 0)
        key = (source, graph_of(node))
        if key not in self._inputs:
            self._inputs[key] = products.write_input(self.editor, node, source)
        return self._inputs[key]


REWRITES: Mapping[str, Callable[[DynamicRewriter, onnx_ir.Node], None]] = MappingProxyType(
    {
        "MatMul": DynamicRewriter.matrix_product,
        "Gemm": DynamicRewriter.matrix_product,
        "LSTM": DynamicRewriter.lstm,
        "Attention": DynamicRewriter.attention,
        "Gather": DynamicRewriter.gather,
    }
)


def quantize_nodes(
    nodes: Iterable[onnx_ir.Node], config: QuantizeConfig, editor: Editor, store: WeightStore, findings: Findings
) -> None:
    """Dynamic quantization of those among `nodes` that can have it."""
    rewriter = DynamicRewriter(editor, store)
    for node in list(nodes):
        if not is_candidate(node) or is_excluded(node.name, config.exclude):
            continue
        if reason := why_not(node):
            findings.skip(node, reason)
            continue
        rewriter.rewrite(node)
        findings.changes[node.op_type] += 1
