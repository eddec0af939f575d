"""What the outputs of a model mean, as far as its graph tells."""

from __future__ import annotations

import re

import onnx_ir

from modelpress_compression.graph.read import required
from modelpress_compression.model import map_keys

# Through these the meaning of the last axis stays what it was.
_TRANSPARENT = frozenset((
    "Identity", "Cast", "Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid", "Reshape", "Squeeze", "Unsqueeze",
    "Flatten", "Transpose", "Dropout", "QuantizeLinear", "DequantizeLinear", "QLinearSoftmax", "QLinearSigmoid",
    "Add", "QLinearAdd", "Mul",
))  # fmt: skip
# What a classifier's last layer is.
_HEADS = frozenset((
    "Gemm", "MatMul", "Conv", "FusedGemm", "FusedMatMul", "FusedConv", "GlobalAveragePool", "QGemm",
    "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits", "QLinearConv",
    "ConvInteger",
))  # fmt: skip
_EMBEDDING_NAME = re.compile(r"embed|hidden|feature|state", re.IGNORECASE)
_NORMALIZATIONS = frozenset((
    "LayerNormalization", "SkipLayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization", "LpNormalization",
))  # fmt: skip
_MAX_HOPS = 24


# What only moves or casts scores: before it lies what they are.
_MOVING = frozenset((
    "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Dropout", "QuantizeLinear",
    "DequantizeLinear",
))  # fmt: skip
LOGITS, PROBABILITIES, LOG_PROBABILITIES, INDEPENDENT = "logits", "probabilities", "log_probabilities", "independent"
_FORMS = {
    "Softmax": PROBABILITIES,
    "LogSoftmax": LOG_PROBABILITIES,
    "Sigmoid": INDEPENDENT,
    "HardSigmoid": INDEPENDENT,
}


def classification_outputs(graph: onnx_ir.Graph) -> frozenset[str]:
    """Names of the outputs whose last axis may be class scores: what ends in a linear layer, softmax or not.

    Hidden states, which end in a normalization, and what is named as an embedding have no meaningful largest element.
    """
    return frozenset(value.name for value in graph.outputs if value.name and _is_classifier(value))


def tensor_outputs(graph: onnx_ir.Graph) -> list[onnx_ir.Value]:
    """What the outputs hold, as far as that is a computed tensor; behind ZipMap the tensor that it reads."""
    found: dict[onnx_ir.Value, None] = {}
    for output in graph.outputs:
        value = required(node, 0) if (node := output.producer()) is not None and map_keys(output) else output
        if isinstance(value.type, onnx_ir.TensorType | None) and value.producer() is not None:
            found[value] = None
    return list(found)


def score_form(value: onnx_ir.Value) -> str:
    """What class scores are: logits, probabilities, their logarithms, or probabilities independent of each other."""
    node = score_node(value)
    return LOGITS if node is None else _FORMS.get(node.op_type, LOGITS)


def score_node(value: onnx_ir.Value) -> onnx_ir.Node | None:
    """The node that computed a value, seen through those that only move it; None: it was fed."""
    current: onnx_ir.Value | None = value
    for _ in range(_MAX_HOPS):
        node = current.producer() if current is not None else None
        if node is None or node.op_type not in _MOVING:
            return node
        current = node.inputs[0]
    return None


def is_embedding(value: onnx_ir.Value) -> bool:
    """Whether the output is named as an embedding, or ends in a normalization."""
    if value.name is not None and _EMBEDDING_NAME.search(value.name):
        return True
    node = value.producer()
    return node is not None and node.op_type in _NORMALIZATIONS


def _is_classifier(value: onnx_ir.Value) -> bool:
    if value.name is None or _EMBEDDING_NAME.search(value.name):
        return False
    current: onnx_ir.Value | None = value
    for _ in range(_MAX_HOPS):
        node = current.producer() if current is not None else None
        if node is None:
            return False
        if node.op_type in _HEADS:
            return True
        if node.op_type not in _TRANSPARENT:
            return False
        # A bias may stand on either side of an Add; the computed side is the one that matters.
        current = next((item for item in node.inputs if item is not None and item.producer() is not None), None)
    return False
