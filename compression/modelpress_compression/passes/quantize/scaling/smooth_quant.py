"""SmoothQuant: outliers of single channels go from the activation, which has one scale, into the weights, which have
one for each output (Xiao et al., arXiv:2211.10438).

    s = max|X|^a / max|W|^(1 - a)       per channel of X [..., K] and W [K, O]

The strength `a` is chosen edge by edge: the one that leaves the least error in 8 bits on rows of the data,

    | Q(X / s) Q(diag(s) W) - X W |^2

Extremes come from every second sample, and rows from the others: what a channel has not shown yet it may show in use,
and a scale that made it loud would cut it off there. An edge is left alone where the error is hardly less than without
a scale, and where the gain would not pay for a Mul.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.linear import drawn, rows_at
from modelpress_compression.graph.read import constant_array, required
from modelpress_compression.graph.watch import stream
from modelpress_compression.graph.watch.portions import portions
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.plan import Plan
from modelpress_compression.passes.quantize.rounding.affine import Range, activation_parameters, quantize_weight
from modelpress_compression.passes.quantize.scaling.edges import Edge, Scale, Slot, find_edges

STRENGTHS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MAX_SAMPLES = 64
MIN_SAMPLES = 8  # with fewer, all of them tell extremes, and judge
ROWS = 256  # of an edge's activation, over all samples that judge
COLUMNS = 512  # of its weights: enough to tell strengths apart
# Share of the error that must go where the scale costs nothing, and where it costs a Mul.
_LEAST_GAIN, _LEAST_GAIN_OF_MUL = 0.05, 0.2
# A Mul costs a few products for each of its elements; products with fewer outputs would feel that.
_LEAST_OUTPUTS_OF_MUL = 256
# A channel that is nearly silent in these samples may be loud in others: no scale goes further from the mean than this.
_MOST = 8.0
_SMALLEST = 1e-5  # of the largest: keeps logarithms finite

Matrix = NDArray[np.float32]


@dataclass
class Channels:
    """The extremes of each channel of an edge's activation, and some of its rows."""

    low: Matrix  # [K]
    high: Matrix
    rows: list[Matrix]  # [R, K] of each sample

    def stretch(self, array: Array, axis: int) -> None:
        """The extremes cover this activation, whose channels lie along `axis`, as well."""
        others = tuple(np.delete(np.arange(array.ndim), axis).tolist())
        self.low = np.minimum(self.low, array.min(axis=others))
        self.high = np.maximum(self.high, array.max(axis=others))

    def keep(self, array: Array, axis: int, count: int, seed: int) -> None:
        """Keeps `count` of its rows, drawn at random."""
        places = drawn(array.size // array.shape[axis], count, seed)
        self.rows.append(rows_at(array, axis, places).astype(np.float32, copy=False))


def smooth(model: Model, plan: Plan, editor: Editor, context: Context) -> int:
    """Applies the best scale to every edge of the plan that gains by one, in place; returns how many did."""
    edges = [edge for edge in find_edges(model.graph, plan.layers) if _can_smooth(edge, plan)]
    seen = _observe(model, edges, context) if edges else {}
    smoothed = 0
    for edge in edges:
        context.check_time()
        scale = best_scale(edge, seen[edge.name])
        if scale is not None:
            edge.apply(scale, editor)
            smoothed += 1
    return smoothed


def best_scale(edge: Edge, channels: Channels) -> Scale | None:
    """The scale of the least error; None: the edge gains too little."""
    rows = np.concatenate(channels.rows)
    weights = [_matrix(slot) for slot in edge.weights]
    if not np.isfinite(rows).all() or not np.isfinite(channels.low).all() or not np.isfinite(channels.high).all():
        return None
    largest = np.maximum(-channels.low, channels.high).astype(np.float64)
    if not largest.any():
        return None
    # Silent channels, and those whose weights are all zero, would have a scale of 0 or infinity.
    largest = np.maximum(largest, _SMALLEST * largest.max())
    of_weights = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0).astype(np.float64)
    of_weights = np.maximum(of_weights, max(_SMALLEST * of_weights.max(), np.finfo(np.float32).tiny))
    before = _error(rows, weights, np.ones(edge.channels), channels)
    scales = [_normalized(largest**strength / of_weights ** (1 - strength)) for strength in STRENGTHS]
    errors = [_error(rows, weights, scale, channels) for scale in scales]
    best = int(np.argmin(errors))
    gain = _LEAST_GAIN if edge.makers else _LEAST_GAIN_OF_MUL
    return scales[best] if errors[best] < (1 - gain) * before else None


def _observe(model: Model, edges: Sequence[Edge], context: Context) -> dict[str, Channels]:
    seen = {
        edge.name: Channels(np.full(edge.channels, np.inf, np.float32), np.full(edge.channels, -np.inf, np.float32), [])
        for edge in edges
    }
    samples = context.data.spread(MAX_SAMPLES)
    halves = samples.feed_count >= MIN_SAMPLES
    each = -(-ROWS // max(1, len(samples) // (2 if halves else 1)))
    for part in portions(model, [(edge.name,) for edge in edges], samples):
        together = [edges[place] for place in part]
        names = [edge.name for edge in together]
        for number, tensors in enumerate(stream(model, names, samples, context.check_time, padding=False)):
            for edge in together:
                if not halves or number % 2 == 0:
                    seen[edge.name].stretch(tensors[edge.name], edge.axis)
                if not halves or number % 2:
                    seen[edge.name].keep(tensors[edge.name], edge.axis, each, number)
    return seen


def _matrix(slot: Slot) -> Matrix:
    """The weight as [K, O]; every position of a Conv's kernel is a column of its own."""
    weight = np.asarray(constant_array(required(slot.node, slot.index)), np.float32)
    matrix = np.moveaxis(weight, slot.axis, 0).reshape(weight.shape[slot.axis], -1)
    return matrix[:, :: max(1, matrix.shape[1] // COLUMNS)]


def _can_smooth(edge: Edge, plan: Plan) -> bool:
    """Depthwise weights have a scale for each of their inputs already; a Mul would end a chain in 8 bits, or cost more
    than small products can pay."""
    outputs = sum(_matrix(slot).shape[1] for slot in edge.weights)
    depthwise = any(slot.node.op_type == "Conv" and slot.axis == 0 for slot in edge.weights)
    activation = plan.activations.get(edge.value)
    may_divide = outputs >= _LEAST_OUTPUTS_OF_MUL and (activation is None or not activation.all_consumers)
    return not depthwise and (bool(edge.makers) or may_divide)


def _normalized(scale: Scale) -> Scale:
    """With a geometric mean of one, since only ratios between channels matter, and within bounds."""
    return np.asarray(np.clip(scale / np.exp(np.log(scale).mean()), 1 / _MOST, _MOST), np.float64)


def _error(rows: Matrix, weights: Sequence[Matrix], scale: Scale, channels: Channels) -> float:
    """Sum of the squared errors of all products, both factors in 8 bits."""
    factor = scale.astype(np.float32)
    parameters = activation_parameters(
        Range(float((channels.low / factor).min()), float((channels.high / factor).max())), "uint8"
    )
    quantized = parameters.fake_quantize(rows / factor)
    total = 0.0
    for weight in weights:
        rounded = quantize_weight(weight * factor[:, None], 1, "int8").dequantize()
        difference = quantized @ rounded - rows @ weight
        total += float(np.square(difference, dtype=np.float64).sum())
    return total
