"""The proof, layer by layer, that 8-bit products are the same with and without VNNI.

It is read off the finished model, whatever rounded its weights: each weight whose products run in 8 bits, the most that
a pair of them can reach, and whether that fits. Layers that onnxruntime leaves in float32 after all are none the worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir

from modelpress_compression.encodings.read import stored_weights
from modelpress_compression.encodings.weight import StoredWeight
from modelpress_compression.graph.edit import replace_numbers
from modelpress_compression.graph.read import constant_array, is_op, label
from modelpress_compression.model import Model
from modelpress_compression.passes.base import PassResult
from modelpress_compression.passes.integers.products import Summation, of_matrix, of_node, output_axis
from modelpress_compression.passes.integers.saturation import SumBounds, bounds, within_limit
from modelpress_compression.target import Target

# Key in `Value.meta` of a quantized weight: how many of its scales were raised, or pairs moved, against saturation.
REDUCED = "modelpress.reduced_channels"
_INT16, _INT32 = np.iinfo(np.int16).max, np.iinfo(np.int32).max
# Besides what onnxruntime makes integers of: Conv, MatMul and Gemm between DequantizeLinear.
_INTEGER_OPERATORS = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeLSTM", "QAttention")


@dataclass(frozen=True)
class Certificate:
    """What is proved of one weight. `channels` have a scale each; `reduced` of them gave up resolution for it.

    `reach`: the largest magnitude of a pair's sum; 0: the kernel adds no pairs. `certified`: nothing can saturate.
    """

    node: str
    operator: str
    channels: int
    reduced: int
    reach: int
    certified: bool
    reason: str

    def row(self) -> dict[str, str | int | float]:
        """For the report."""
        return {
            "node": self.node,
            "operator": self.operator,
            "channels": self.channels,
            "channels_reduced": self.reduced,
            "without_vnni": self.reason,
        }


def certify(model: Model) -> tuple[Certificate, ...]:
    """One for every weight whose products run in 8 bits, subgraphs included."""
    return tuple(product.certificate() for node in model.nodes() for product in _products(node))


def keep_within_limits(model: Model) -> int:
    """Moves pairs of weights that saturate without VNNI to the nearest levels that do not, in place; scales stay.

    Returns in how many weights there were some.
    """
    moved = 0
    for product in (product for node in model.nodes() for product in _products(node)):
        weight, summation = product.stored.weight, product.summation
        by_slice = weight.scale.size in (1, summation.slices(weight.levels.shape))
        if weight.levels.dtype != np.int8 or not summation.paired or not by_slice:
            continue
        levels = weight.levels.astype(np.int8, copy=False)
        if bounds(levels, summation).saturates.any():
            kept = within_limit(levels, weight.scale.astype(np.float32), weight.dequantize(), summation)
            replace_numbers(product.stored.values, kept)
            moved += 1
    return moved


def certified(result: PassResult, target: Target) -> PassResult:
    """The result with a row for every certificate of its model, and one sentence on all."""
    found = certify(result.model)
    if not found:
        return result
    rows = tuple(item.row() for item in found)
    return replace(result, details=(*result.details, *rows), notes=(*result.notes, summary(found, target)))


def summary(certificates: tuple[Certificate, ...], target: Target) -> str:
    """One sentence for people."""
    count = f"{sum(item.certified for item in certificates)} of {len(certificates)} layers certified"
    if not target.saturates:
        why = "target.cpu: vnni" if target.cpu == "vnni" else f"target.device: {target.device}"
        return f"Saturation without VNNI was allowed ({why}): {count} to be free of it"
    reduced = sum(item.reduced for item in certificates)
    channels = sum(item.channels for item in certificates)
    given_up = f"; {reduced} of {channels} channels gave up resolution for it" if reduced else ""
    return f"No saturation without VNNI: {count}{given_up}"


@dataclass(frozen=True)
class _Product:
    """One weight of a node, in integers; `bias` is int32 or None."""

    node: onnx_ir.Node
    stored: StoredWeight
    summation: Summation
    bias: onnx_ir.Value | None = None

    def certificate(self) -> Certificate:
        levels = self.stored.weight.levels
        reach, certified = 0, True
        if levels.dtype != np.int8:
            reason = "exact: unsigned weights are multiplied in 16 bits and added in 32"
        elif not self.summation.paired:
            reason = "exact: single products of a depthwise convolution are added in 32 bits"
        else:
            found = bounds(levels.astype(np.int8, copy=False), self.summation)
            reach = int(np.maximum(found.high, -found.low).max(initial=0))
            reason = self._flaw(found) or f"exact: pairs of products reach {reach} of {_INT16}"
            certified = reason.startswith("exact")
        channels = self.stored.weight.scale.size
        reduced = int(self.stored.values.meta.get(REDUCED, 0))
        return Certificate(label(self.node), self.node.op_type, channels, reduced, reach, certified, reason)

    def _flaw(self, found: SumBounds) -> str:
        """What can go wrong; empty: nothing."""
        bias = constant_array(self.bias)
        offset = 0 if bias is None else int(np.abs(bias.astype(np.int64)).max(initial=0))
        overflowing = int((found.total + offset > _INT32).sum())
        if overflowing:
            return f"sums of {overflowing} of {found.total.size} outputs can leave 32 bits"
        saturating = int(found.saturates.sum())
        return f"pairs of products saturate in {saturating} of {found.low.size} outputs" if saturating else ""


def _products(node: onnx_ir.Node) -> Iterator[_Product]:
    if is_op(node, "Conv", "MatMul", "Gemm"):
        yield from _between_dequantized(node)
    elif node.op_type in _INTEGER_OPERATORS:
        for stored in stored_weights(node):
            rank = stored.weight.levels.ndim
            yield _Product(node, stored, of_matrix(rank, rank - 1))


def _between_dequantized(node: onnx_ir.Node) -> Iterator[_Product]:
    """A node whose activation and weight come out of DequantizeLinear is what onnxruntime computes in integers."""
    sources = [value.producer() if value is not None else None for value in node.inputs]
    if any(source is None or source.op_type != "DequantizeLinear" for source in sources[:2]) or sources[1] is None:
        return
    bias = sources[2].inputs[0] if len(sources) > 2 and sources[2] is not None else None
    for stored in stored_weights(sources[1]):
        shape = stored.weight.levels.shape
        yield _Product(node, stored, of_node(node, shape, output_axis(node, len(shape))), bias)
