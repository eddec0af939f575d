"""Weights in 2, 4 or 8 bits, activations as they were: `scheme: weight_only`.

    MatMul(A, W), Gemm(A, W, C)  ->  com.microsoft MatMulNBits(A, Wq, scales, zero points, bias), in blocks along K
    Gather(W, index)             ->  com.microsoft GatherBlockQuantized(Wq, index, scales, zero points): embeddings
    every other weight           ->  arithmetic that onnxruntime folds when it loads the model (encodings/folded.py)

MatMulNBits runs with accuracy_level 4: onnxruntime quantizes each block of the activations to 8 bits while it runs and
multiplies integers. At one thread with AVX512-VNNI that takes, of float32's time,

    K x N        rows   4 bits, block 32 / 128   8 bits, block 32 / 128   the same without accuracy_level 4
    384 x 1536   1      0.49 / 0.37              0.48 / 0.41              1.3 / 20 (8 bits)
    384 x 1536   128    0.93 / 0.71              0.84 / 0.67              1.1 / 2
    2048 x 2048  1      0.32 / 0.22              0.28 / 0.23              1.2 / 60
    2048 x 2048  128    0.74 / 0.59              0.68 / 0.57              1.1 / 2
    120 x 480    400    1.3 / 1.2                1.2 / 1.1
    96 x 6625    400    1.7 / 1.5                1.2 / 1.3

so that products over few inputs take the third form. Each weight is stored once, in the graph that owns it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir

from modelpress_compression.encodings.operands import is_quantized
from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import constant_array, constant_tensor, is_op
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, is_excluded
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.eligible import is_finite, why_not_float16
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.rounding.rounder import Rounder
from modelpress_compression.passes.quantize.weight_only.writer import WeightWriter, uses_of

# Fewer weights than this are not worth the nodes and the scales.
MIN_WEIGHT_ELEMENTS = 512
# Smaller constants are not worth a Cast.
MIN_CONSTANT_ELEMENTS = 1024
# Rounding changes what these find by whole numbers.
_WANT_EXACT = (
    "Cast", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Floor", "Ceil", "Round", "TopK", "ArgMax",
    "ArgMin", "Mod", "Loop", "Scan", "If",
)  # fmt: skip


STORED = "stored_weights"  # in the changes: weights in fewer bits that run as float32 does


def store_weights(model: Model, config: QuantizeConfig, context: Context, rounder: Rounder, findings: Findings) -> None:
    """Rewrites every weight of the model's graphs in place. Raises TimeLimitError."""
    writer = WeightWriter(Editor(model), config, rounder)
    stored = _store(model, writer, config, context, findings)
    if config.weights == "int2" and writer.in_4_bits:
        findings.notes.append(
            f"{writer.in_4_bits} of {stored} weights are in 4 bits: only products over 256 or more inputs and "
            f"embeddings have a form in 2."
        )
    if config.is_narrow and writer.in_8_bits:
        findings.notes.append(
            f"{writer.in_8_bits} of {stored} weights are in 8 bits: rows that are short or odd (depthwise "
            f"convolutions, stems) have no form in fewer."
        )


def _store(model: Model, writer: WeightWriter, config: QuantizeConfig, context: Context, findings: Findings) -> int:
    """How many weights were stored."""
    weights, stored = list(_weights(model)), 0
    for number, (graph, weight) in enumerate(weights):
        context.check_time()
        users = list({id(user): user for user, _ in uses_of(weight)}.values())
        if not users:
            continue
        if reason := _why_not(weight, config):
            findings.skip(users[0], reason)
            continue
        writer.store(graph, weight)
        stored += 1
        findings.changes.update(node.op_type for node in users)
        context.progress((number + 1) / len(weights), f"stored {number + 1} of {len(weights)} weights")
    return stored


def storable_weights(model: Model, config: QuantizeConfig) -> Iterator[tuple[onnx_ir.Graph, onnx_ir.Value]]:
    """The weights that can be stored in fewer bits, and the graph that owns each."""
    return ((graph, weight) for graph, weight in _weights(model) if uses_of(weight) and not _why_not(weight, config))


def other_constants(model: Model, config: QuantizeConfig) -> Iterator[tuple[onnx_ir.Graph, onnx_ir.Value]]:
    """Large float32 constants that no weight is among and float16 holds well, and the graph that owns each."""
    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            tensor = None if value.is_graph_output() else constant_tensor(value)
            if tensor is None or tensor.dtype != onnx_ir.DataType.FLOAT or tensor.size < MIN_CONSTANT_ELEMENTS:
                continue
            users = value.consumers()
            exact = any(is_op(user, *_WANT_EXACT) or is_quantized(user) for user in users)
            excluded = any(is_excluded(user.name, config.exclude) for user in users)
            # What stands for a weight in fewer bits has a scale, which would lose some of them.
            scales = any(is_op(user, "Mul") and _stands_for_weight(user) for user in users)
            if users and not (uses_of(value) or exact or excluded or scales):
                array = constant_array(value)
                if array is not None and why_not_float16(np.asarray(array, np.float32)) is None:
                    yield graph, value


def _stands_for_weight(product: onnx_ir.Node) -> bool:
    """Whether its other factor is made of integers or of fewer bits."""
    makers = [value.producer() for value in product.inputs if value is not None]
    return any(is_op(maker, "Cast", "Sub", "Gather") for maker in makers)


def _weights(model: Model) -> Iterator[tuple[onnx_ir.Graph, onnx_ir.Value]]:
    """Float32 constants of more than one axis, and the graph that owns each."""
    for graph in model.graphs():
        values = [*graph.initializers.values(), *(node.outputs[0] for node in graph if is_op(node, "Constant"))]
        for value in values:
            tensor = None if value.is_graph_output() else constant_tensor(value)
            if tensor is not None and tensor.dtype == onnx_ir.DataType.FLOAT and len(tensor.shape) > 1:
                yield graph, value


def _why_not(weight: onnx_ir.Value, config: QuantizeConfig) -> str | None:
    """Why a weight stays as it is; None: it can be stored in fewer bits."""
    tensor = constant_tensor(weight)
    if any(is_excluded(node.name, config.exclude) for node, _ in uses_of(weight)):
        return "excluded by the recipe"
    if tensor is None or tensor.size < MIN_WEIGHT_ELEMENTS:
        return f"its {tensor.size if tensor is not None else 0} weights are too few to pay for their scales"
    return None if is_finite(tensor) else "its weight holds infinite or NaN values"
