"""Constant weights of nodes: finding them, and putting their 8-bit form into the graph, once for all who share them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.encodings import qdq
from modelpress_compression.encodings.weight import QuantizedWeight, StoredWeight
from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import (
    attribute,
    constant_array,
    constant_tensor,
    graph_of,
    input_of,
    is_constant,
    required,
)
from modelpress_compression.passes.integers.certificate import REDUCED
from modelpress_compression.passes.integers.products import Summation, of_node, output_axis
from modelpress_compression.passes.integers.saturation import bounds, least_squares_scale, within_limit
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.rounding.affine import quantize_weight
from modelpress_compression.passes.quantize.rounding.balance import balanced
from modelpress_compression.passes.quantize.rounding.rounder import NearestRounder, Rounder, Rounding, nearest
from modelpress_compression.target import Target

# Rounding to float16 leaves about 70 dB; a weight that keeps less has values that overflow or vanish.
MIN_WEIGHT_SQNR_DB = 40.0
_FLOAT16_MAX = float(np.finfo(np.float16).max)
# A product with fewer weights costs less than the nodes around it.
MIN_WEIGHT_ELEMENTS = 256
# Smaller tables are not worth two more nodes.
MIN_EMBEDDING_ELEMENTS = 4096


@dataclass
class WeightStore:
    """Quantizes each weight once per layout; `config` gives the type and whether each channel has its own scale.

    Unless `target` says that products do not saturate, weights are kept from that (integers.saturation).
    """

    editor: Editor
    config: QuantizeConfig
    rounder: Rounder = field(default_factory=NearestRounder)
    target: Target = field(default_factory=Target)
    _stored: dict[tuple[object, ...], StoredWeight] = field(default_factory=dict)

    def matrix(self, node: onnx_ir.Node) -> StoredWeight:
        """The second factor of a MatMul or Gemm as `[..., K, N]`, with a scale per column where it has two axes."""
        source = required(node, 1)
        transposed = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
        alpha = float(attribute(node, "alpha", 1.0)) if node.op_type == "Gemm" else 1.0
        key = (source, graph_of(node), transposed, alpha)
        if key not in self._stored:
            weight = self.array(source)
            axis = int(not transposed) if self.config.per_channel and weight.ndim == 2 else None
            summation = of_node(node, weight.shape, axis)
            found = self.quantize(weight, summation, rounding=self.rounder.rounding(node))
            levels = found.levels.T if transposed else found.levels
            scale = np.asarray(found.scale * np.float32(alpha))
            found = replace(found, levels=levels, scale=scale, axis=None if axis is None else 1)
            self._stored[key] = self.store(node, source, found)
        return self._stored[key]

    def quantize(
        self,
        weight: NDArray[np.float32],
        summation: Summation,
        least_scale: NDArray[np.float64] | None = None,
        rounding: Rounding = nearest,
    ) -> QuantizedWeight:
        """In the type of the recipe, with a scale for each slice of the axis that `summation` names.

        What is rounded to nearest is balanced as well; other roundings know better.
        """
        axis, kind = summation.axis, self.config.weights
        unsafe = self._saturating(quantize_weight(weight, axis, kind, least_scale), summation)
        if unsafe is not None and unsafe.any():
            safe_scale = np.where(unsafe, least_squares_scale(weight, summation), 0.0)
            least_scale = safe_scale if least_scale is None else np.maximum(safe_scale, least_scale)
        found = quantize_weight(weight, axis, kind, least_scale, rounding)
        if rounding is nearest:
            found = balanced(found, weight, summation)
        if unsafe is None:
            return found
        aim = weight if rounding is nearest else found.dequantize()
        levels = within_limit(found.levels.astype(np.int8, copy=False), found.scale, aim, summation)
        return replace(found, levels=levels, reduced=int(unsafe.sum()))

    def _saturating(self, quantized: QuantizedWeight, summation: Summation) -> NDArray[np.bool_] | None:
        """Which slices can saturate; None: nothing can, or it does not matter."""
        if self.target.cpu == "vnni" or not summation.paired or quantized.levels.dtype != np.int8:
            return None
        found = bounds(quantized.levels.astype(np.int8, copy=False), summation)
        return np.asarray(found.saturates.any(axis=1))

    def store(self, node: onnx_ir.Node, source: onnx_ir.Value, quantized: QuantizedWeight) -> StoredWeight:
        """Puts one into the node's graph, with a note for its certificate."""
        stored = qdq.store(self.editor, graph_of(node), quantized, source.name or "weight")
        stored.values.meta[REDUCED] = quantized.reduced
        return stored

    def layer(self, node: onnx_ir.Node, least_scale: NDArray[np.float64] | None = None) -> QuantizedWeight:
        """The weight of a Conv, MatMul or Gemm in its own layout, with a scale per output channel."""
        weight = self.array(required(node, 1))
        return self.quantize(weight, self.summation(node), least_scale, self.rounder.rounding(node))

    def summation(self, node: onnx_ir.Node) -> Summation:
        """How a layer sums over its weight, and the axis of its scales."""
        weight = self.array(required(node, 1))
        # A stack of matrices has one scale: DequantizeLinear takes one axis, and MatMul's kernels one of two axes.
        per_channel = self.config.per_channel and (node.op_type == "Conv" or weight.ndim == 2)
        return of_node(node, weight.shape, output_axis(node, weight.ndim) if per_channel else None)

    @staticmethod
    def array(source: onnx_ir.Value | None) -> NDArray[np.float32]:
        """The data of a value that is known to be constant."""
        found = constant_array(source)
        if found is None:
            raise ValueError(f"{source.name if source is not None else 'a missing input'!r} is not constant.")
        return np.asarray(found, np.float32)


def why_not_weight(node: onnx_ir.Node, index: int, least: int = MIN_WEIGHT_ELEMENTS) -> str | None:
    """Why the input at `index` is no weight, of at least `least` elements, that can be quantized; None: it is one."""
    tensor = constant_tensor(input_of(node, index))
    if tensor is None:
        return "its weight is computed at run time"
    if tensor.dtype != onnx_ir.DataType.FLOAT:
        return f"its weight is {tensor.dtype}, not float32"
    if tensor.size < least:
        return f"its {tensor.size} weights are too few to pay for quantizing its input"
    if not is_finite(tensor):
        return "its weight holds infinite or NaN values"
    return None


def why_not_matrix(node: onnx_ir.Node) -> str | None:
    """Why a MatMul's or Gemm's product cannot be taken in 8 bits."""
    if is_constant(input_of(node, 0)) and not is_constant(input_of(node, 1)):
        return "its weight is the first factor; only the second can be quantized"
    if node.op_type == "MatMul" and not is_constant(input_of(node, 1)):
        return "both factors are activations"
    if reason := why_not_weight(node, 1):
        return reason
    weight = constant_tensor(node.inputs[1])
    if weight is not None and len(weight.shape) < 2:
        return "its weight is a vector"
    if node.op_type == "Gemm" and attribute(node, "transA", 0):
        return "its input is transposed (transA)"
    return None


def is_embedding(node: onnx_ir.Node) -> bool:
    """Whether a Gather looks up rows of a float32 table that is worth fewer bits."""
    table = constant_tensor(node.inputs[0])
    return (
        table is not None
        and not attribute(node, "axis", 0)
        and table.dtype == onnx_ir.DataType.FLOAT
        and len(table.shape) == 2
        and table.size >= MIN_EMBEDDING_ELEMENTS
    )


def is_finite(tensor: onnx_ir.TensorProtocol) -> bool:
    """Whether a tensor holds neither NaN nor infinities."""
    array: NDArray[Any] = tensor.numpy()
    # Extremes carry NaN and infinities through without a temporary of the weight's size.
    return bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def why_not_float16(weight: NDArray[np.float32]) -> str | None:
    """Why an array cannot be float16; None: it can."""
    if not weight.size:
        return None
    largest = float(np.abs(weight).max())
    if not largest <= _FLOAT16_MAX:  # NaN too
        return f"holds values up to {largest:.3g}, beyond float16's {_FLOAT16_MAX:.0f}"
    signal = float(np.square(weight, dtype=np.float64).sum())
    noise = float(np.square(weight - weight.astype(np.float16), dtype=np.float64).sum())
    if noise and 10 * np.log10(signal / noise) < MIN_WEIGHT_SQNR_DB:
        return "holds values too small for float16"
    return None
