"""Operators that move whole axes: Transpose, Squeeze, Unsqueeze, Concat, Tile, Expand, DepthToSpace."""

from __future__ import annotations

import numpy as np
import onnx_ir

from modelpress_compression.channels.fixes import Extents
from modelpress_compression.channels.labels import AxisLabels
from modelpress_compression.channels.ops.registry import rule
from modelpress_compression.channels.tracer import UNKNOWN_SHAPES, Tracer
from modelpress_compression.graph.read import axes_of, input_of, int_attribute, ints_attribute, string_attribute


@rule("Transpose")
def transpose(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    axes = tracer.axes(node.inputs[0])
    if axes is None:
        return UNKNOWN_SHAPES
    order = ints_attribute(node, "perm") or tuple(reversed(range(len(axes))))
    tracer.set(node.outputs[0], tuple(axes[axis] for axis in order))
    return None


@rule("Squeeze", "Unsqueeze")
def squeeze(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Axes of extent 1 come or go."""
    axes, shape, result = tracer.axes(node.inputs[0]), tracer.shape(node.inputs[0]), tracer.shape(node.outputs[0])
    if axes is None or shape is None or result is None:
        return UNKNOWN_SHAPES
    given = axes_of(node)
    if given is None and input_of(node, 1) is not None:
        known = tracer.known(node.inputs[1])
        given = None if known is None else tuple(int(axis) for axis in known.reshape(-1))
    if node.op_type == "Squeeze":
        if given is None:
            given = tuple(axis for axis, extent in enumerate(shape) if extent == 1)
        gone = {axis % len(shape) for axis in given}
        for axis in gone:
            tracer.freeze(axes[axis], node, "The axis is removed.")
        tracer.set(node.outputs[0], tuple(axis for number, axis in enumerate(axes) if number not in gone))
        return None
    if given is None:
        return UNKNOWN_SHAPES
    new, rest = {axis % len(result) for axis in given}, iter(axes)
    tracer.set(node.outputs[0], tuple(None if number in new else next(rest) for number in range(len(result))))
    return None


@rule("Concat")
def concat(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Along the axis labels stand one after the other; all other axes are tied."""
    values = [value for value in node.inputs if value is not None]
    entries = [(tracer.axes(value), tracer.shape(value)) for value in values]
    known = [(axes, shape) for axes, shape in entries if axes is not None and shape is not None]
    if len(known) != len(values):
        return UNKNOWN_SHAPES
    rank = len(known[0][0])
    along = int_attribute(node, "axis", 0) % rank
    result: list[AxisLabels] = []
    for axis in range(rank):
        column = [(axes[axis], shape[axis]) for axes, shape in known]
        if axis == along:
            result.append(_join(column, node, tracer))
            continue
        tied = column[0][0]
        for other, _ in column[1:]:
            tied = tracer.unify(tied, other, node)
        if tied is None:
            for other, _ in column:
                tracer.freeze(other, node, "The axis meets one that cannot be cut, such as that of an input.")
        result.append(tied)
        if all(tracer.is_derived(value) for value in values):
            for other, _ in column:
                tracer.pair(tied, other)
    tracer.set(node.outputs[0], tuple(result))
    return None


def _join(column: list[tuple[AxisLabels, int]], node: onnx_ir.Node, tracer: Tracer) -> AxisLabels:
    if all(axis is None for axis, _ in column):
        return None
    pieces = []
    for axis, extent in column:
        piece = axis
        if piece is None:
            piece = tracer.labels.fresh(extent)
            tracer.freeze(piece, node, "A part of the concatenated axis cannot be cut.")
        elif len(column) > 1:
            tracer.parts.append(piece)
        pieces.append(piece)
    return np.concatenate(pieces)


@rule("Expand")
def expand(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Axes that are made wider hold one value for all indices: they may be cut with what they meet."""
    axes, shape, result = tracer.axes(node.inputs[0]), tracer.shape(node.inputs[0]), tracer.shape(node.outputs[0])
    target = tracer.known(node.inputs[1])
    if axes is None or shape is None or result is None or target is None:
        return UNKNOWN_SHAPES
    added = len(result) - len(shape)
    output: list[AxisLabels] = []
    for number, extent in enumerate(result):
        own = number - added
        if own >= 0 and shape[own] == extent:
            output.append(axes[own])
            continue
        if own >= 0:
            tracer.freeze(axes[own], node, "The axis of extent 1 is broadcast.")
        output.append(tracer.labels.fresh(extent) if extent > 1 else None)
    tracer.set(node.outputs[0], tuple(output))
    # The target may name the last axes alone.
    tracer.fixes.append(Extents(node, 1, tuple(output[len(output) - target.size :])))
    return None


@rule("ConstantOfShape")
def constant_of_shape(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """One value everywhere: every axis may be cut with what it meets."""
    shape = tracer.shape(node.outputs[0])
    if shape is None or tracer.known(node.inputs[0]) is None:
        return UNKNOWN_SHAPES
    axes = tuple(tracer.labels.fresh(extent) if extent > 1 else None for extent in shape)
    tracer.set(node.outputs[0], axes)
    tracer.fixes.append(Extents(node, 0, axes))
    return None


@rule("Tile")
def tile(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    axes, shape, result = tracer.axes(node.inputs[0]), tracer.shape(node.inputs[0]), tracer.shape(node.outputs[0])
    if axes is None or shape is None or result is None:
        return UNKNOWN_SHAPES
    output: list[AxisLabels] = []
    for axis, extent, wide in zip(axes, shape, result, strict=True):
        output.append(None if axis is None else np.tile(axis, wide // extent))
    tracer.set(node.outputs[0], tuple(output))
    return None


@rule("DepthToSpace", "SpaceToDepth")
def depth_space(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """[N, C, H, W]: blocks of pixels move into channels or out of them, and go with their channel."""
    axes = tracer.axes(node.inputs[0])
    if axes is None or len(axes) != 4:
        return UNKNOWN_SHAPES
    for axis in axes[2:]:
        tracer.freeze(axis, node, "The axis is one of space: blocks of it become channels.")
    channels, pixels = axes[1], int_attribute(node, "blocksize", 1) ** 2
    if channels is not None and node.op_type == "SpaceToDepth":
        channels = np.tile(channels, pixels)
    elif channels is not None:
        made = channels.size // pixels
        blocks_first = string_attribute(node, "mode", "DCR") == "DCR"
        grid = channels.reshape(pixels, made) if blocks_first else channels.reshape(made, pixels).T
        one = np.ascontiguousarray(grid[0])
        for other in grid[1:]:
            tracer.labels.unify(one, np.ascontiguousarray(other))
        channels = one
        tracer.parts.append(one)
    tracer.set(node.outputs[0], (axes[0], channels, None, None))
    return None


def axis_of(node: onnx_ir.Node, default: int, rank: int) -> int:
    """The attribute `axis`, counted from 0."""
    return int_attribute(node, "axis", default) % max(rank, 1)
