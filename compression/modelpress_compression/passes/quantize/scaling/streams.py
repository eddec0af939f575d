"""Residual streams: values that can all be turned by one orthogonal matrix, which their weights take in.

    x [..., K]  becomes  (x * d) Q        Q [K, K] orthogonal, and 1^T Q = 1^T;  d [K]: of this value, none where 1

Q and means over the channels go together (mean(x Q) = mean(x)), and so do sums of squares. LayerNormalization and RMS
normalization up to their gain therefore answer x Q with n Q. Around them,

    writers     x = h W + b                  W diag(d) Q,  (b * d) Q      MatMul, Gemm, Conv, the table of a Gather
    sums        x = u + v                    u and v are turned alike; a constant v is a bias
    gains       y = n * g + b                g becomes 1, d of y is d of n / g, so that b becomes (b * d) Q
    readers     y W                          Q^T diag(1 / d) W            MatMul, Gemm, Conv
    statistics  sums over the channels of x, and of its squares: as they are, and whatever is made of them
    layout      what moves whole rows of channels about: Reshape, Transpose, Slice, Concat, ...

A stream is all that is reached from a normalization in this way, forwards and backwards. It has to end in writers and
readers everywhere; anything else on the way (a gain before a sum, an activation function, an output of the model)
leaves it as it is, and is the reason that is given. (Ashkboos et al., "QuaRot", arXiv:2404.00456; Liu et al.,
"SpinQuant", arXiv:2405.16406, whose rotations R1 these are. They rewrite LayerNormalization as RMS normalization first;
a Q that keeps the mean does not need that.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir

from modelpress_compression.graph.read import input_of, is_op
from modelpress_compression.graph.shapes import Shape
from modelpress_compression.model import Model
from modelpress_compression.passes.quantize.scaling.edges import Slot, turned_roots
from modelpress_compression.passes.quantize.scaling.extents import Shapes
from modelpress_compression.passes.quantize.scaling.walk import NORMALIZATIONS, SUMS, Fold, Walk, squares


@dataclass(frozen=True)
class Stream:
    """`name`: of the value that a normalization reads; `gains`: constants that become 1."""

    name: str
    channels: int
    folds: tuple[Fold, ...]
    gains: tuple[Slot, ...]


def find_streams(model: Model, input_shapes: Mapping[str, Shape] | None = None) -> tuple[list[Stream], dict[str, str]]:
    """The streams of the main graph, and of each that cannot be turned, by its name, what is in the way.

    `input_shapes`: as in `static_shapes`, which is asked only where something is normalized at all.
    """
    streams: list[Stream] = []
    blocked: dict[str, str] = {}
    seeds = [seed for node in model.graph if (seed := _normalized(node)) is not None]
    shapes = Shapes.of(model, input_shapes) if seeds else Shapes({})
    seen: dict[onnx_ir.Value, str] = {}
    shared = turned_roots(model.graph)
    for seed in seeds:
        if seed in seen:
            continue
        walk = Walk(model.graph, shapes, shared, seen, shapes.extent(seed, -1) or 0)
        reason = walk.all_from(seed) or walk.not_finite()
        seen.update(dict.fromkeys(walk.members, reason))
        if reason:
            blocked[seed.name or ""] = reason
        elif walk.folds:
            streams.append(Stream(seed.name or "", walk.channels, tuple(walk.folds.values()), tuple(walk.gains)))
    return streams, blocked


def _normalized(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """What the node normalizes: as an operator, or as the mean of squares of a normalization that is written out."""
    if is_op(node, *NORMALIZATIONS):
        return input_of(node, 0)
    power = input_of(node, 0) if is_op(node, *SUMS) else None
    maker = None if power is None else power.producer()
    return input_of(maker, 0) if maker is not None and squares(maker) else None
