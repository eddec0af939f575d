"""Who uses a constant weight, the form in which it can be stored for them, and the weight written so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.encodings import folded, n_bits
from modelpress_compression.encodings.weight import QuantizedWeight, StoredWeight
from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import (
    MICROSOFT,
    attribute,
    constant_array,
    constant_tensor,
    graph_of,
    input_of,
    is_op,
    required,
)
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.eligible import is_embedding, why_not_matrix
from modelpress_compression.passes.quantize.rounding.rounder import Numbers, Rounder, Rounding, nearest
from modelpress_compression.passes.quantize.weight_only.blocks import block_size, quantize_blocks, usable_scale
from modelpress_compression.passes.quantize.weights import MIN_4_BIT_COLUMNS, WeightStore

# Weights that share a scale where one for a channel is too coarse.
STORED_BLOCK = 32
# Blocks take an eighth more, and are taken by themselves where they make a quarter of the error or less (6 dB). Rows
# without outliers are not among them: of 5,000 normal weights the largest is 1.8 times that of 32.
_UNEVEN = 4.0
# Inputs of a product from which on integers in blocks are no slower than float32, however many rows there are.
MIN_BLOCKED_INPUTS = 256
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
        ("", "Einsum", 0): (0,),
        ("", "Einsum", 1): (0,),
        ("", "DeformConv", 1): (0,),
        (MICROSOFT, "Attention", 1): (1,),
        (MICROSOFT, "EmbedLayerNormalization", 2): (0,),
        (MICROSOFT, "EmbedLayerNormalization", 3): (0,),
        (MICROSOFT, "FusedMatMul", 1): (-1,),
        (MICROSOFT, "MoE", 2): (0, 1),
        (MICROSOFT, "MoE", 4): (0, 1),
        (MICROSOFT, "MoE", 6): (0, 1),
        (MICROSOFT, "FusedConv", 1): (0,),
        (MICROSOFT, "FusedGemm", 1): (1,),
    }
)


@dataclass
class WeightWriter:
    """Puts weights into graphs that belong to the caller. `folded`: all in the form that runs as float32 does.
    `blocks`: whether 8 bits may be in blocks there, which OpenVINO 2026 takes for products of another shape."""

    editor: Editor
    config: QuantizeConfig
    rounder: Rounder
    folded: bool = False
    blocks: bool = True
    in_8_bits: int = 0  # weights so far that are in 8 bits
    in_4_bits: int = 0
    in_blocks: int = 0  # of those in 8 bits

    def store_half(self, graph: onnx_ir.Graph, weight: onnx_ir.Value) -> None:
        """One weight in float16, for all who use it."""
        _replace_by(folded.write_half(self.editor, graph, WeightStore.array(weight), weight.name or "weight"), weight)

    def store_16_bits(self, graph: onnx_ir.Graph, weight: onnx_ir.Value) -> bool:
        """One weight in 16 bits with a scale a channel, for all who use it; whether these are nearer to it than
        float16 is. Else nothing is done."""
        levels = _in_16_bits(WeightStore.array(weight), _scaled_axes(_direct_use(weight)))
        if levels is not None:
            self._write(graph, weight, levels)
        return levels is not None

    def store_blocks(self, graph: onnx_ir.Graph, weight: onnx_ir.Value) -> None:
        """One weight in 8 bits with a scale for `STORED_BLOCK` weights, for all who use it; as `store` where its rows
        do not divide into such blocks."""
        blocks = _in_blocks(WeightStore.array(weight)) if self.blocks else None
        if blocks is None:
            self.store(graph, weight)
        else:
            self._write(graph, weight, blocks)

    def store(self, graph: onnx_ir.Graph, weight: onnx_ir.Value) -> None:
        """One weight, for all who use it; its graph takes the new constants."""
        uses = list(weight.uses())
        if not self.folded and all(_is_blocked(*use) for use in uses):
            self._products(graph, weight, [use.node for use in uses])
        elif not self.folded and all(_is_embedding(*use) for use in uses):
            self._embeddings(graph, weight, [use.node for use in uses])
        else:
            self._folded(graph, weight, _direct_use(weight))

    def _products(self, graph: onnx_ir.Graph, weight: onnx_ir.Value, nodes: Sequence[onnx_ir.Node]) -> None:
        stored: dict[tuple[bool, float], StoredWeight] = {}
        for node in nodes:
            transposed, alpha = _is_transposed(node), float(attribute(node, "alpha", 1.0))
            if (transposed, alpha) not in stored:
                blocks = self._blocks(node, WeightStore.array(weight))
                blocks = replace(blocks, scale=blocks.scale * np.float32(alpha))
                stored[transposed, alpha] = n_bits.store_matrix(self.editor, graph, blocks, weight.name or "weight")
            bias = input_of(node, 2) if node.op_type == "Gemm" else None
            if bias is not None:
                bias = self._bias(node, bias, len(stored[transposed, alpha].weight.levels))
            self._replace(node, n_bits.write_product(self.editor, node, stored[transposed, alpha], bias))

    def _blocks(self, node: onnx_ir.Node, array: NDArray[np.float32]) -> QuantizedWeight:
        """The weight of a product, [N, K]."""
        bits = {"int4": 4, "int2": 2}.get(self.config.weights, 8)
        rounding = self.rounder.rounding(node)
        if not _is_transposed(node):
            array, rounding = array.T, _turned(rounding)
        return quantize_blocks(array, bits, block_size(array.shape[1], bits, self.config.block_size), rounding)

    def _bias(self, node: onnx_ir.Node, bias: onnx_ir.Value, outputs: int) -> onnx_ir.Value:
        array = WeightStore.array(bias)
        beta = np.float32(attribute(node, "beta", 1.0))
        if beta == 1 and array.shape == (outputs,):
            return bias
        numbers = np.broadcast_to(array.reshape(-1) * beta, (outputs,))
        return self.editor.constant(graph_of(node), numbers, f"{bias.name}_scaled")

    def _embeddings(self, graph: onnx_ir.Graph, weight: onnx_ir.Value, nodes: Sequence[onnx_ir.Node]) -> None:
        blocks = self._table(WeightStore.array(weight))
        self._count(blocks.bits)
        stored = n_bits.store_table(self.editor, graph, blocks, weight.name or "weight")
        for node in nodes:
            self._replace(node, n_bits.write_lookup(self.editor, node, stored))

    def _table(self, array: NDArray[np.float32]) -> QuantizedWeight:
        # Levels share bytes, and rows begin with a new one.
        wanted = {"int4": (4,), "int2": (2, 4)}.get(self.config.weights, ())
        bits = next((bits for bits in wanted if array.shape[1] * bits % 8 == 0), 8)
        return quantize_blocks(array, bits, self.config.block_size)

    def _folded(self, graph: onnx_ir.Graph, weight: onnx_ir.Value, use: tuple[onnx_ir.Node, int] | None) -> None:
        """`use`: one that reads the weight as it is, if there is one."""
        quantized = self._rows(WeightStore.array(weight), use)
        self._count(quantized.bits)
        self._write(graph, weight, quantized)

    def _write(self, graph: onnx_ir.Graph, weight: onnx_ir.Value, quantized: QuantizedWeight) -> None:
        """Puts the levels in the place of the weight, for all who use it."""
        shape, name = WeightStore.array(weight).shape, weight.name or "weight"
        if quantized.bits == 4:
            real = folded.write_4_bits(self.editor, graph, quantized, shape, name)
        else:
            blocked = quantized.levels.shape != shape
            self.in_blocks += blocked
            real = folded.write_levels(self.editor, graph, quantized, name, shape if blocked else None)
        _replace_by(real, weight)

    def _rows(self, array: NDArray[np.float32], use: tuple[onnx_ir.Node, int] | None) -> QuantizedWeight:
        """4 bits in blocks [rows, columns]; where rows are short 8 bits, as `_in_channels` has them."""
        axes = _scaled_axes(use)
        rounds = use is not None and use[1] == 1 and is_op(use[0], "Conv", "MatMul", "Gemm")
        rounding = self.rounder.rounding(use[0]) if use is not None and rounds else nearest
        columns = _columns(array.shape, axes)
        if self.config.is_narrow and columns >= MIN_4_BIT_COLUMNS:
            size = block_size(columns, 4, self.config.block_size)
            return quantize_blocks(array.reshape(-1, columns), 4, size, _reshaped(rounding, array.shape))
        return _in_channels(array, axes if self.config.per_channel else (), rounding, self.blocks)

    def quantized(self, weight: onnx_ir.Value) -> tuple[NDArray[np.float32], QuantizedWeight]:
        """The numbers that a weight has once `store` has stored it, in its own shape, and what is stored."""
        uses, array = list(weight.uses()), WeightStore.array(weight)
        if not self.folded and all(_is_blocked(*use) for use in uses):
            blocks = self._blocks(uses[0].node, array)
            values = blocks.dequantize()
            return (values if _is_transposed(uses[0].node) else values.T), blocks
        if not self.folded and all(_is_embedding(*use) for use in uses):
            blocks = self._table(array)
        else:
            blocks = self._rows(array, _direct_use(weight))
        return blocks.dequantize().reshape(array.shape), blocks

    def _count(self, bits: int) -> None:
        self.in_8_bits += bits == 8
        self.in_4_bits += bits == 4

    def _replace(self, node: onnx_ir.Node, result: onnx_ir.Value) -> None:
        self.editor.hand_over(node.outputs[0], result)
        graph_of(node).remove(node, safe=True)


def _replace_by(real: onnx_ir.Value, weight: onnx_ir.Value) -> None:
    """Gives all who use a weight what stands for it."""
    real.type, real.shape = weight.type, weight.shape
    onnx_ir.convenience.replace_all_uses_with(weight, real)


def rounded_to_8_bits(weight: onnx_ir.Value, config: QuantizeConfig, blocks: bool = True) -> NDArray[np.float32]:
    """The numbers that a weight has once it is stored in 8 bits. `blocks`: as in `WeightWriter`."""
    axes = _scaled_axes(_direct_use(weight)) if config.per_channel else ()
    array = WeightStore.array(weight)
    return _in_channels(array, axes, nearest, blocks).dequantize().reshape(array.shape)


def rounded_in_blocks(weight: onnx_ir.Value, config: QuantizeConfig) -> NDArray[np.float32]:
    """The numbers that a weight has once `store_blocks` has stored it."""
    array = WeightStore.array(weight)
    blocks = _in_blocks(array)
    return rounded_to_8_bits(weight, config) if blocks is None else blocks.dequantize().reshape(array.shape)


def _in_channels(
    weight: NDArray[np.float32], axes: tuple[int, ...], rounding: Rounding, blocks: bool
) -> QuantizedWeight:
    """As `_in_8_bits`; where `blocks` may be, rows in which few weights are far larger than the rest are in them.

    Roundings that weigh one weight's error against another's see whole channels.
    """
    parts = _as_blocks(weight) if blocks and axes and rounding is nearest else None
    if parts is not None and _is_uneven(_largest(weight, axes), _largest(parts, (0, 1))):
        return _in_8_bits(parts, (0, 1), nearest)
    return _in_8_bits(weight, axes, rounding)


def _is_uneven(by_channel: NDArray[np.float32], by_block: NDArray[np.float32]) -> bool:
    """Whether blocks of these largest magnitudes err at most 1 / `_UNEVEN` times as much as channels of those: a level
    errs by a twelfth of its scale squared."""
    return float(np.square(by_channel).mean()) >= _UNEVEN * float(np.square(by_block).mean()) > 0


def _in_blocks(weight: NDArray[np.float32]) -> QuantizedWeight | None:
    """[rows, blocks, `STORED_BLOCK`] with a scale for each block; None: rows do not divide into more than one."""
    blocks = _as_blocks(weight)
    return None if blocks is None else _in_8_bits(blocks, (0, 1), nearest)


def _as_blocks(weight: NDArray[np.float32]) -> NDArray[np.float32] | None:
    columns = _columns(weight.shape, (0,))
    if columns <= STORED_BLOCK or columns % STORED_BLOCK:
        return None
    return weight.reshape(len(weight), -1, STORED_BLOCK)


def _direct_use(weight: onnx_ir.Value) -> tuple[onnx_ir.Node, int] | None:
    """A node that multiplies by the weight as it is, and at which input; None: there is none."""
    return next((use for use in weight.uses() if _axes_of(*use) is not None), None)


def _scaled_axes(use: tuple[onnx_ir.Node, int] | None) -> tuple[int, ...]:
    """Axes with a scale each. A weight that is rearranged has its rows on the first axis mostly; any axis will do."""
    return (_axes_of(*use) if use is not None else None) or (0,)


def uses_of(weight: onnx_ir.Value) -> list[tuple[onnx_ir.Node, int]]:
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


def _is_blocked(node: onnx_ir.Node, index: int) -> bool:
    """Whether it becomes a MatMulNBits."""
    if not is_op(node, "MatMul", "Gemm") or index != 1 or why_not_matrix(node):
        return False
    tensor = constant_tensor(required(node, 1))
    if tensor is None or len(tensor.shape) != 2:
        return False
    inputs, outputs = _extents_of(node, tensor)
    return inputs >= MIN_BLOCKED_INPUTS and _bias_fits(node, outputs)


def _extents_of(node: onnx_ir.Node, tensor: onnx_ir.TensorProtocol) -> tuple[int, int]:
    """Inputs K and outputs N of a MatMul or Gemm with this weight."""
    first, second = (int(extent) for extent in tensor.shape.numpy())
    return (second, first) if _is_transposed(node) else (first, second)


def _is_transposed(node: onnx_ir.Node) -> bool:
    """Whether the weight is [N, K]."""
    return node.op_type == "Gemm" and bool(attribute(node, "transB", 0))


def _bias_fits(node: onnx_ir.Node, outputs: int) -> bool:
    bias = input_of(node, 2) if node.op_type == "Gemm" else None
    array = constant_array(bias)
    return bias is None or (
        array is not None and array.size in (1, outputs) and array.shape[-1:] in ((), (array.size,))
    )


def _is_embedding(node: onnx_ir.Node, index: int) -> bool:
    """Whether it becomes a GatherBlockQuantized."""
    return is_op(node, "Gather") and index == 0 and is_embedding(node)


def _axes_of(node: onnx_ir.Node, index: int) -> tuple[int, ...] | None:
    """Axes of the weight that have a scale each; None: it is no weight there."""
    axes = _SCALED_AXES.get((node.domain, node.op_type, index))
    return (0,) if axes and index == 1 and attribute(node, "transB", 0) else axes


def _turned(rounding: Rounding) -> Rounding:
    """The same for the transposed weight."""

    def turned(weight: Numbers, scale: Numbers, low: Numbers, high: Numbers) -> Numbers:
        return rounding(weight.T, scale.T, low.T, high.T).T

    return turned


def _columns(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """Elements of a row, where a row is a slice of the leading axes: two if both have scales of their own, or one."""
    return math.prod(shape[2 if axes == (0, 1) else 1 :])


def _in_8_bits(weight: NDArray[np.float32], axes: tuple[int, ...], rounding: Rounding) -> QuantizedWeight:
    """Symmetric, with a scale for each index of `axes`, or one for everything where there are none."""
    return _symmetric(weight, axes, rounding, np.int8)


def _in_16_bits(weight: NDArray[np.float32], axes: tuple[int, ...]) -> QuantizedWeight | None:
    """The same in 16 bits; None: float16 is nearer to the weight.

    Of normal weights 16 bits keep 90 dB and float16 keeps 74: it spends five bits on exponents, which hardly differ
    within a channel. Where few weights are far larger than the rest, they do.
    """
    if not np.isfinite(weight).all():
        return None
    levels = _symmetric(weight, axes, nearest, np.int16)
    with np.errstate(over="ignore"):  # what float16 does not hold is infinite, and infinitely far
        half = weight.astype(np.float16)
    errors = (np.square(weight - near, dtype=np.float64).sum() for near in (levels.dequantize(), half))
    return levels if next(errors) <= next(errors) else None


def _symmetric(
    weight: NDArray[np.float32], axes: tuple[int, ...], rounding: Rounding, kind: type[np.int8 | np.int16]
) -> QuantizedWeight:
    bounds = np.iinfo(kind)
    scale = usable_scale(_largest(weight, axes) / np.float32(bounds.max))
    # The lowest level is left out, as of all symmetric weights here.
    levels = rounding(weight, scale, np.asarray(-float(bounds.max)), np.asarray(float(bounds.max)))
    return QuantizedWeight(np.asarray(levels, kind), scale, np.zeros((), kind), bits=bounds.bits)


def _largest(weight: NDArray[np.float32], axes: tuple[int, ...]) -> NDArray[np.float32]:
    """The largest magnitude for each index of `axes`; the other axes stay, of extent 1."""
    kept = {axis % weight.ndim for axis in axes}
    others = tuple(axis for axis in range(weight.ndim) if axis not in kept)
    return np.asarray(np.abs(weight).max(axis=others, keepdims=True))


def _reshaped(rounding: Rounding, shape: tuple[int, ...]) -> Rounding:
    """`rounding` of the weight in its own shape, for rows [N, K]."""

    def reshaped(weight: Numbers, scale: Numbers, low: Numbers, high: Numbers) -> Numbers:
        parts = (part if part.ndim == 0 else part.reshape(shape) for part in (scale, low, high))
        return rounding(weight.reshape(shape), *parts).reshape(weight.shape)

    return reshaped
