"""Writes weights in few bits into a graph, and the operators that read them so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import (
    MICROSOFT,
    attribute,
    constant_tensor,
    graph_of,
    input_of,
    is_op,
    label,
    required,
)
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.rounding.rounder import Numbers, Rounder, Rounding, nearest
from modelpress_compression.passes.quantize.weight_only.blocks import Blocks, block_size, quantize_blocks
from modelpress_compression.passes.quantize.weight_only.folded import (
    MIN_4_BIT_COLUMNS,
    columns_of,
    in_4_bits,
    in_8_bits,
)
from modelpress_compression.passes.quantize.weight_only.uses import (
    axes_of,
    extents_of,
    is_blocked,
    is_embedding,
    is_transposed,
)
from modelpress_compression.passes.quantize.weights import WeightStore

_INT8_COMPUTE = 4  # accuracy_level


@dataclass
class WeightWriter:
    """Puts weights into graphs that belong to the caller. `folded`: all in the form that runs as float32 does."""

    editor: Editor
    config: QuantizeConfig
    rounder: Rounder
    folded: bool = False
    in_8_bits: int = 0  # weights so far that are not in 4 bits

    def store(self, graph: onnx_ir.Graph, weight: onnx_ir.Value) -> None:
        """One weight, for all who use it; its graph takes the new constants."""
        uses = list(weight.uses())
        if not self.folded and all(is_blocked(*use) for use in uses):
            self._products(graph, weight, [use.node for use in uses])
        elif not self.folded and all(is_embedding(*use) for use in uses):
            self._embeddings(graph, weight, [use.node for use in uses])
        else:
            self._folded(graph, weight, next((use for use in uses if axes_of(*use) is not None), None))

    def _products(self, graph: onnx_ir.Graph, weight: onnx_ir.Value, nodes: Sequence[onnx_ir.Node]) -> None:
        bits = 4 if self.config.weights == "int4" else 8
        stored: dict[tuple[bool, float], tuple[Sequence[onnx_ir.Value | None], int]] = {}
        for node in nodes:
            transposed, alpha = is_transposed(node), float(attribute(node, "alpha", 1.0))
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
        tensor = constant_tensor(required(node, 1))
        if tensor is None:
            raise TypeError(f"the weight of {label(node)!r} is not constant")
        inputs, outputs = extents_of(node, tensor)
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
        axes = (axes_of(*use) if use is not None else None) or (0,)
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


def _turned(rounding: Rounding) -> Rounding:
    """The same for the transposed weight."""

    def turned(weight: Numbers, scale: Numbers, low: Numbers, high: Numbers) -> Numbers:
        return rounding(weight.T, scale.T, low.T, high.T).T

    return turned
