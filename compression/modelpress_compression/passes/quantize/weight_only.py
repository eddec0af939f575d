"""Weights in 4 or 8 bits, activations as they were: `scheme: weight_only`.

    MatMul(A, W), Gemm(A, W, C)  ->  com.microsoft MatMulNBits(A, Wq, scales, zero points, bias), in blocks along K
    Gather(W, index)             ->  com.microsoft GatherBlockQuantized(Wq, index, scales, zero points): embeddings
    every other weight           ->  arithmetic that onnxruntime folds into float32 when it loads the model (folded.py)

MatMulNBits runs with accuracy_level 4: onnxruntime quantizes each block of the activations to 8 bits while it runs and
multiplies integers. At one thread with AVX512-VNNI that takes, of float32's time,

    K x N        rows   4 bits, block 32 / 128   8 bits, block 32 / 128   the same without accuracy_level 4
    384 x 1536   1      .49 / .37                .48 / .41                1.3 / 20 (8 bits)
    384 x 1536   128    .93 / .71                .84 / .67                1.1 / 2
    2048 x 2048  1      .32 / .22                .28 / .23                1.2 / 60
    2048 x 2048  128    .74 / .59                .68 / .57                1.1 / 2
    120 x 480    400    1.3 / 1.2                1.2 / 1.1
    96 x 6625    400    1.7 / 1.5                1.2 / 1.3

so that products over few inputs take the third form. Each weight is stored once, in the graph that owns it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.analysis.graph import is_op
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, is_excluded
from modelpress_compression.passes.quantize.blocks import Blocks, block_size, quantize_blocks
from modelpress_compression.passes.quantize.dynamic import is_candidate
from modelpress_compression.passes.quantize.edit import (
    MICROSOFT,
    Editor,
    attribute,
    constant_of,
    graph_of,
    input_of,
    is_constant,
    label,
    required,
)
from modelpress_compression.passes.quantize.folded import MIN_4_BIT_COLUMNS, columns_of, in_4_bits, in_8_bits
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.rounding import Numbers, Rounder, Rounding, nearest
from modelpress_compression.passes.quantize.weights import WeightStore, is_finite, why_not_matrix
from modelpress_compression.techniques import QuantizeConfig

# Inputs of a product from which on integers in blocks are no slower than float32, however many rows there are.
MIN_BLOCKED_INPUTS = 256
# Fewer weights than this are not worth the nodes and the scales.
MIN_WEIGHT_ELEMENTS = 512
_INT8_COMPUTE = 4  # accuracy_level
# Exporters write the gates of an LSTM in another order by such operators, inside an If even.
_REARRANGING = ("Slice", "Concat", "Unsqueeze", "Squeeze", "Transpose", "Reshape", "Identity")
_MAX_REARRANGED = 64  # values that are followed
# Operator and input -> the axes of the weight that have a scale each.
_SCALED_AXES: Mapping[tuple[str, str, int], tuple[int, ...]] = MappingProxyType(
    {
        ("", "Conv", 1): (0,),
        ("", "ConvTranspose", 1): (1,),
        ("", "MatMul", 0): (-2,),
        ("", "MatMul", 1): (-1,),
        ("", "Gemm", 0): (0,),
        ("", "Gemm", 1): (1,),
        ("", "LSTM", 1): (0, 1),
        ("", "LSTM", 2): (0, 1),
        ("", "GRU", 1): (0, 1),
        ("", "GRU", 2): (0, 1),
        ("", "RNN", 1): (0, 1),
        ("", "RNN", 2): (0, 1),
        ("", "Gather", 0): (0,),
        (MICROSOFT, "Attention", 1): (1,),
        (MICROSOFT, "FusedConv", 1): (0,),
        (MICROSOFT, "FusedGemm", 1): (1,),
    }
)


def store_weights(model: Model, config: QuantizeConfig, context: Context, rounder: Rounder, findings: Findings) -> None:
    """Rewrites every weight of the model's graphs in place. Raises TimeLimitError."""
    writer = _Writer(Editor(model), config, rounder)
    weights, stored = list(_weights(model)), 0
    for number, (graph, weight) in enumerate(weights):
        context.check_time()
        users = list({id(user): user for user, _ in _uses(weight)}.values())
        if not users:
            continue
        if reason := _why_not(weight, config):
            findings.skip(users[0], reason)
            continue
        writer.store(graph, weight)
        stored += 1
        findings.changes.update(node.op_type for node in users)
        context.progress((number + 1) / len(weights), f"stored {number + 1} of {len(weights)} weights")
    if config.weights == "int4" and writer.in_8_bits:
        findings.warnings.append(
            f"{writer.in_8_bits} of {stored} weights, those of short or odd rows (depthwise convolutions, stems), were "
            f"stored in 8 bits instead of 4."
        )


def _uses(weight: onnx_ir.Value) -> list[tuple[onnx_ir.Node, int]]:
    """The nodes that multiply by the weight, and at which input; operators that only rearrange it may lie between."""
    found: list[tuple[onnx_ir.Node, int]] = []
    frontier, seen = [weight], {id(weight)}
    while frontier:
        for node, index in frontier.pop().uses():
            if (node.domain, node.op_type, index) in _SCALED_AXES:
                found.append((node, index))
            elif is_op(node, *_REARRANGING) and len(seen) < _MAX_REARRANGED:
                new = [output for output in node.outputs if id(output) not in seen]
                seen.update(id(output) for output in new)
                frontier += new
    return found


def _weights(model: Model) -> Iterator[tuple[onnx_ir.Graph, onnx_ir.Value]]:
    """Float32 constants of more than one axis, and the graph that owns each."""
    for graph in model.graphs():
        values = [*graph.initializers.values(), *(node.outputs[0] for node in graph if is_op(node, "Constant"))]
        for value in values:
            if not is_constant(value) or value.is_graph_output():
                continue
            tensor = onnx_ir.convenience.get_const_tensor(value)
            if tensor is not None and tensor.dtype == onnx_ir.DataType.FLOAT and len(tensor.shape) > 1:
                yield graph, value


def _why_not(weight: onnx_ir.Value, config: QuantizeConfig) -> str | None:
    """Why a weight stays as it is; None: it can be stored in fewer bits."""
    tensor = onnx_ir.convenience.get_const_tensor(weight)
    if any(is_excluded(node.name, config.exclude) for node, _ in _uses(weight)):
        return "excluded by the recipe"
    if tensor is None or tensor.size < MIN_WEIGHT_ELEMENTS:
        return f"its {tensor.size if tensor is not None else 0} weights are too few to pay for their scales"
    return None if is_finite(tensor) else "its weight holds infinite or NaN values"


def _is_blocked(node: onnx_ir.Node, index: int) -> bool:
    """Whether it becomes a MatMulNBits."""
    if not is_op(node, "MatMul", "Gemm") or index != 1 or why_not_matrix(node):
        return False
    tensor = onnx_ir.convenience.get_const_tensor(required(node, 1))
    if tensor is None or len(tensor.shape) != 2:
        return False
    inputs, outputs = _extents(node, tensor)
    return inputs >= MIN_BLOCKED_INPUTS and _bias_fits(node, outputs)


def _extents(node: onnx_ir.Node, tensor: onnx_ir.TensorProtocol) -> tuple[int, int]:
    """Inputs K and outputs N of a MatMul or Gemm."""
    first, second = (int(extent) for extent in tensor.shape.numpy())
    return (second, first) if _is_transposed(node) else (first, second)


def _is_transposed(node: onnx_ir.Node) -> bool:
    return node.op_type == "Gemm" and bool(attribute(node, "transB", 0))


def _bias_fits(node: onnx_ir.Node, outputs: int) -> bool:
    bias = input_of(node, 2) if node.op_type == "Gemm" else None
    array = constant_of(bias)
    return bias is None or (
        array is not None and array.size in (1, outputs) and array.shape[-1:] in ((), (array.size,))
    )


def _is_embedding(node: onnx_ir.Node, index: int) -> bool:
    """Whether it becomes a GatherBlockQuantized."""
    return is_op(node, "Gather") and index == 0 and is_candidate(node)


@dataclass
class _Writer:
    """Puts weights into graphs that belong to the caller."""

    editor: Editor
    config: QuantizeConfig
    rounder: Rounder
    in_8_bits: int = 0  # weights so far that are not in 4 bits

    def store(self, graph: onnx_ir.Graph, weight: onnx_ir.Value) -> None:
        """One weight, for all who use it; its graph takes the new constants."""
        uses = list(weight.uses())
        if all(_is_blocked(*use) for use in uses):
            self._products(graph, weight, [use.node for use in uses])
        elif all(_is_embedding(*use) for use in uses):
            self._embeddings(graph, weight, [use.node for use in uses])
        else:
            self._folded(graph, weight, next((use for use in uses if _axes(*use) is not None), None))

    def _products(self, graph: onnx_ir.Graph, weight: onnx_ir.Value, nodes: Sequence[onnx_ir.Node]) -> None:
        bits = 4 if self.config.weights == "int4" else 8
        stored: dict[tuple[bool, float], tuple[Sequence[onnx_ir.Value | None], int]] = {}
        for node in nodes:
            transposed, alpha = _is_transposed(node), float(attribute(node, "alpha", 1.0))
            if (transposed, alpha) not in stored:
                array = WeightStore.array(weight)
                rounding = self.rounder.rounding(node)
                if not transposed:
                    array, rounding = array.T, _turned(rounding)
                size = block_size(array.shape[1], bits, self.config.block_size)
                blocks = quantize_blocks(array, bits, size, rounding)
                stored[transposed, alpha] = self._constants(graph, weight, blocks, blocks.by_block(), alpha), size
            self._product(node, *stored[transposed, alpha], bits)

    def _constants(
        self, graph: onnx_ir.Graph, weight: onnx_ir.Value, blocks: Blocks, levels: NDArray[np.uint8], alpha: float
    ) -> list[onnx_ir.Value | None]:
        """Levels, scales and zero points."""
        name = weight.name or "weight"
        constants: list[onnx_ir.Value | None] = [
            self.editor.constant(graph, levels, f"{name}_quantized"),
            self.editor.constant(graph, blocks.scale * np.float32(alpha), f"{name}_scale"),
        ]
        if blocks.has_zero_points:
            constants.append(self.editor.constant(graph, blocks.packed_zero_points(), f"{name}_zero_point"))
        return constants

    def _product(self, node: onnx_ir.Node, constants: Sequence[onnx_ir.Value | None], size: int, bits: int) -> None:
        tensor = onnx_ir.convenience.get_const_tensor(required(node, 1))
        if tensor is None:
            raise TypeError(f"the weight of {label(node)!r} is not constant")
        inputs, outputs = _extents(node, tensor)
        operands = [required(node, 0), *constants]
        bias = input_of(node, 2) if node.op_type == "Gemm" else None
        if bias is not None:
            operands += [None] * (5 - len(operands)) + [self._bias(node, bias, outputs)]
        attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": size}
        (result,) = self.editor.emit(
            node,
            "MatMulNBits",
            operands,
            label(node),
            domain=MICROSOFT,
            attributes={**attributes, "accuracy_level": _INT8_COMPUTE},
        )
        self._replace(node, result)

    def _bias(self, node: onnx_ir.Node, bias: onnx_ir.Value, outputs: int) -> onnx_ir.Value:
        array = WeightStore.array(bias)
        beta = np.float32(attribute(node, "beta", 1.0))
        if beta == 1 and array.shape == (outputs,):
            return bias
        numbers = np.broadcast_to(array.reshape(-1) * beta, (outputs,))
        return self.editor.constant(graph_of(node), numbers, f"{bias.name}_scaled")

    def _embeddings(self, graph: onnx_ir.Graph, weight: onnx_ir.Value, nodes: Sequence[onnx_ir.Node]) -> None:
        array = WeightStore.array(weight)
        # Two levels share a byte, and rows begin with a new one.
        bits = 4 if self.config.weights == "int4" and array.shape[1] % 2 == 0 else 8
        self.in_8_bits += bits == 8
        blocks = quantize_blocks(array, bits, self.config.block_size)
        data, *rest = self._constants(graph, weight, blocks, blocks.by_row(), 1.0)
        attributes = {"bits": bits, "block_size": self.config.block_size, "gather_axis": 0, "quantize_axis": 1}
        for node in nodes:
            operands = [data, required(node, 1), *rest]
            (result,) = self.editor.emit(
                node, "GatherBlockQuantized", operands, label(node), domain=MICROSOFT, attributes=attributes
            )
            self._replace(node, result)

    def _folded(self, graph: onnx_ir.Graph, weight: onnx_ir.Value, use: tuple[onnx_ir.Node, int] | None) -> None:
        """`use`: one that reads the weight as it is, if there is one."""
        # A weight that is rearranged has its rows on the first axis mostly; any axis will do.
        axes = (_axes(*use) if use is not None else None) or (0,)
        rounds = use is not None and use[1] == 1 and is_op(use[0], "Conv", "MatMul", "Gemm")
        rounding = self.rounder.rounding(use[0]) if use is not None and rounds else nearest
        columns = columns_of(WeightStore.array(weight).shape, axes)
        if self.config.weights == "int4" and columns >= MIN_4_BIT_COLUMNS:
            real = in_4_bits(self.editor, graph, weight, axes, self.config.block_size, rounding)
        else:
            self.in_8_bits += 1
            real = in_8_bits(self.editor, graph, weight, axes if self.config.per_channel else (), rounding)
        real.type, real.shape = weight.type, weight.shape
        onnx_ir.convenience.replace_all_uses_with(weight, real)

    def _replace(self, node: onnx_ir.Node, result: onnx_ir.Value) -> None:
        self.editor.hand_over(node.outputs[0], result)
        graph_of(node).remove(node, safe=True)


def _axes(node: onnx_ir.Node, index: int) -> tuple[int, ...] | None:
    """Axes of the weight that have a scale each; None: it is no weight there."""
    axes = _SCALED_AXES.get((node.domain, node.op_type, index))
    return (0,) if axes and index == 1 and attribute(node, "transB", 0) else axes


def _turned(rounding: Rounding) -> Rounding:
    """The same for the transposed weight."""

    def turned(weight: Numbers, scale: Numbers, low: Numbers, high: Numbers) -> Numbers:
        return rounding(weight.T, scale.T, low.T, high.T).T

    return turned
