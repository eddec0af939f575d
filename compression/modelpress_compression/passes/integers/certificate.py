"""The proof, layer by layer, that 8-bit products are the same with and without VNNI.

It is read off the finished model, whatever rounded its weights: each weight whose products run in 8 bits, the most that
a pair of them can reach, and whether that fits. Layers that onnxruntime leaves in float32 after all are none the worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import onnx_ir

from modelpress_compression.graph.edit import replace_numbers
from modelpress_compression.graph.read import constant_array, input_of, is_constant, is_op, label
from modelpress_compression.model import Model
from modelpress_compression.passes.base import PassResult
from modelpress_compression.passes.integers.products import Summation, of_matrix, of_node, output_axis
from modelpress_compression.passes.integers.saturation import Bounds, bounds, within_limit
from modelpress_compression.target import Target

# Key in `Value.meta` of a quantized weight: how many of its scales were raised, or pairs moved, against saturation.
REDUCED = "modelpress.reduced_channels"
_INT16, _INT32 = np.iinfo(np.int16).max, np.iinfo(np.int32).max
# Indices of a weight, and of an input that has an entry for each of its scales.
_INTEGER_OPERATORS: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType(
    {
        "MatMulInteger": ((1, 3),),
        "MatMulIntegerToFloat": ((1, 3),),
        "DynamicQuantizeLSTM": ((1, 8), (2, 10)),
        "QAttention": ((1, 4),),
    }
)


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
        stored, scales = constant_array(product.values), constant_array(product.scales)
        if stored is None or scales is None or stored.dtype != np.int8 or not product.summation.paired:
            continue
        levels, scale = stored.astype(np.int8, copy=False), scales.astype(np.float32, copy=False)
        if not bounds(levels, product.summation).saturates.any():
            continue
        axis = product.summation.axis
        shape = [-1 if scale.size > 1 and index == axis else 1 for index in range(levels.ndim)]
        weight = levels * scale.reshape(shape)
        replace_numbers(product.values, within_limit(levels, scale, weight, product.summation))
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
    if target.cpu == "vnni":
        return f"Saturation without VNNI was allowed (target.cpu: vnni): {count} to be free of it"
    reduced = sum(item.reduced for item in certificates)
    channels = sum(item.channels for item in certificates)
    given_up = f"; {reduced} of {channels} channels gave up resolution for it" if reduced else ""
    return f"No saturation without VNNI: {count}{given_up}"


@dataclass(frozen=True)
class _Product:
    """One weight of a node, in integers. `scales` has an entry for each scale, `bias` is int32 or None."""

    node: onnx_ir.Node
    values: onnx_ir.Value
    scales: onnx_ir.Value
    summation: Summation
    bias: onnx_ir.Value | None = None

    def certificate(self) -> Certificate:
        levels = np.asarray(constant_array(self.values))
        reach, certified = 0, True
        if levels.dtype != np.int8:
            reason = "exact: unsigned weights are multiplied in 16 bits and added in 32"
        elif not self.summation.paired:
            reason = "exact: single products of a depthwise convolution are added in 32 bits"
        else:
            found = bounds(levels, self.summation)
            reach = int(np.maximum(found.high, -found.low).max(initial=0))
            reason = self._flaw(found) or f"exact: pairs of products reach {reach} of {_INT16}"
            certified = reason.startswith("exact")
        channels = math.prod(_shape(self.scales))
        reduced = int(self.values.meta.get(REDUCED, 0))
        return Certificate(label(self.node), self.node.op_type, channels, reduced, reach, certified, reason)

    def _flaw(self, found: Bounds) -> str:
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
    for weight, scales in _INTEGER_OPERATORS.get(node.op_type, ()):
        values, per_channel = input_of(node, weight), input_of(node, scales)
        if values is not None and per_channel is not None and is_constant(values):
            rank = len(_shape(values))
            yield _Product(node, values, per_channel, of_matrix(rank, rank - 1))


def _between_dequantized(node: onnx_ir.Node) -> Iterator[_Product]:
    """A node whose activation and weight come out of DequantizeLinear is what onnxruntime computes in integers."""
    sources = [value.producer() if value is not None else None for value in node.inputs]
    if any(source is None or source.op_type != "DequantizeLinear" for source in sources[:2]):
        return
    weight = sources[1]
    values, scales = (weight.inputs[0], weight.inputs[1]) if weight is not None else (None, None)
    if values is None or scales is None or not is_constant(values):
        return
    shape = _shape(values)
    summation = of_node(node, shape, output_axis(node, len(shape)))
    bias = sources[2].inputs[0] if len(sources) > 2 and sources[2] is not None else None
    yield _Product(node, values, scales, summation, bias)


def _shape(value: onnx_ir.Value) -> tuple[int, ...]:
    """Of a constant."""
    return tuple(extent for extent in value.shape or () if isinstance(extent, int))
