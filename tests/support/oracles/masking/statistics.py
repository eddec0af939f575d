"""Statistics over channels without the elements that are silenced.

With the mask m (1 for what counts, 0 for silenced elements), n = sum(m) and sums over the axes of the statistic:

    LayerNormalization, InstanceNormalization, GroupNormalization
        mean = sum(m x) / n,  variance = sum(m (x - mean)^2) / n
        y = (x - mean) / sqrt(variance + epsilon) * scale + bias
    RMSNormalization, SimplifiedLayerNormalization
        y = x / sqrt(sum(m x^2) / n + epsilon) * scale
    ReduceMean                                      sum(m x) / n, as ReduceMean(m x) * extent / n
    ReduceSum, ReduceL1, ReduceL2, ReduceSumSquare  the operator on m x

A plain mean is a statistic like the others: parts of a normalization that an exporter has written out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir
from modelpress_compression.graph.read import (
    axes_of,
    float_attribute,
    int_attribute,
    ints_attribute,
    is_op,
    label,
)
from numpy.typing import NDArray

from oracles.masking.constants import constant_value

Dead = NDArray[np.bool_]
Attribute = int | Sequence[int] | onnx_ir.TensorProtocol

_CENTRED = ("LayerNormalization", "InstanceNormalization", "GroupNormalization")
_UNCENTRED = ("RMSNormalization", "SimplifiedLayerNormalization")
NORMALIZATIONS = (*_CENTRED, *_UNCENTRED)
REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare")


def axes_of_statistic(node: onnx_ir.Node, rank: int) -> tuple[int, ...]:
    """The axes of input 0 over which the node takes its statistic, counted from 0; for GroupNormalization all but 0."""
    if is_op(node, "LayerNormalization", *_UNCENTRED):
        return tuple(range(int_attribute(node, "axis", -1) % rank, rank))
    if is_op(node, "InstanceNormalization"):
        return tuple(range(2, rank))
    if is_op(node, "GroupNormalization"):
        return tuple(range(1, rank))
    axes = axes_of(node)
    if axes is None:
        return () if int_attribute(node, "noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(axis % rank for axis in axes))


def exclude(node: onnx_ir.Node, dead: Dead) -> None:
    """Rewrites the node, in its graph, to leave out the elements of input 0 where `dead` is true.

    `dead` has the shape of input 0, or extents 1 where the axis makes no difference.
    """
    writer = Writer(node)
    mask = (~dead).astype(np.float32)
    if is_op(node, *REDUCTIONS):
        _reduction(writer, mask)
    elif is_op(node, "GroupNormalization"):
        _group_normalization(writer, mask)
    else:
        _normalization(writer, mask)


class Writer:
    """Puts nodes before `node`, whose outputs' users and whose name they take over."""

    def __init__(self, node: onnx_ir.Node) -> None:
        graph = node.graph
        if not isinstance(graph, onnx_ir.Graph):
            raise TypeError(f"node {node.name!r} is in no graph")
        self.node, self._graph, self._count = node, graph, 0
        data = node.inputs[0]
        if data is None:
            raise ValueError(f"node {node.name!r} has no input")
        self.data = data

    def constant(self, array: np.ndarray) -> onnx_ir.Value:
        value = constant_value(onnx_ir.Tensor(np.ascontiguousarray(array), name=self._name()))
        self._graph.register_initializer(value)
        return value

    def __call__(self, op_type: str, *inputs: onnx_ir.Value, **attributes: Attribute) -> onnx_ir.Value:
        made = onnx_ir.node(op_type, inputs, attributes, name=self._name())
        made.outputs[0].name = self._name()
        made.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.INT64) if op_type == "Shape" else self.data.type
        self._graph.insert_before(self.node, made)
        return made.outputs[0]

    def sum(self, value: onnx_ir.Value, axes: Sequence[int]) -> onnx_ir.Value:
        return self("ReduceSum", value, self.constant(np.asarray(axes, np.int64)), keepdims=1)

    def finish(self, value: onnx_ir.Value) -> None:
        """`value` stands for the first output from here on; the node goes."""
        output = self.node.outputs[0]
        name, is_output = output.name, output.is_graph_output()
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        self._graph.remove(self.node, safe=True)
        if is_output:
            value.name = name

    def _name(self) -> str:
        self._count += 1
        return f"{label(self.node)}/masked_{self._count}"


def _reduction(writer: Writer, mask: NDArray[np.float32]) -> None:
    node = writer.node
    axes = axes_of_statistic(node, mask.ndim)
    data = writer.data
    node.replace_input_with(0, writer("Mul", data, writer.constant(mask)))
    if not is_op(node, "ReduceMean"):
        return
    scale = (1 / _mean(mask, axes)).astype(np.float32)
    if not int_attribute(node, "keepdims", 1):
        scale = scale.squeeze(axes)
    output = node.outputs[0]
    users = list(output.uses())
    scaled = onnx_ir.node("Mul", [output, writer.constant(scale)], name=f"{label(node)}/masked_scale")
    scaled.outputs[0].name = f"{output.name}/masked"
    graph = node.graph
    if isinstance(graph, onnx_ir.Graph):
        graph.insert_after(node, scaled)
    for user, position in users:
        user.replace_input_with(position, scaled.outputs[0])


def _mean(mask: NDArray[np.float32], axes: Sequence[int]) -> NDArray[np.float32]:
    """The share that counts; where nothing is left any finite number will do, since nobody reads the result."""
    share = mask.mean(axis=tuple(axes), keepdims=True)
    return np.where(share == 0, np.float32(1), share).astype(np.float32)


def _normalization(writer: Writer, mask: NDArray[np.float32]) -> None:
    node = writer.node
    axes = axes_of_statistic(node, mask.ndim)
    normalized = _normalized(writer, writer.data, mask, axes)
    inner = (-1, *[1] * (mask.ndim - 2)) if is_op(node, "InstanceNormalization") else None
    writer.finish(_affine(writer, normalized, inner))


def _normalized(writer: Writer, data: onnx_ir.Value, mask: NDArray[np.float32], axes: Sequence[int]) -> onnx_ir.Value:
    node = writer.node
    epsilon = writer.constant(np.asarray(float_attribute(node, "epsilon", 1e-5), np.float32))
    constant = writer.constant(mask)
    # Over the data's own extents: the mask has 1 where an axis makes no difference.
    whole = writer("Expand", constant, writer("Shape", data))
    number = writer("Max", writer.sum(whole, axes), writer.constant(np.ones(1, np.float32)))
    if is_op(node, *_CENTRED):
        mean = writer("Div", writer.sum(writer("Mul", data, constant), axes), number)
        data = writer("Sub", data, mean)
    counted = writer("Mul", data, constant)
    variance = writer("Div", writer.sum(writer("Mul", counted, counted), axes), number)
    return writer("Div", data, writer("Sqrt", writer("Add", variance, epsilon)))


def _affine(writer: Writer, data: onnx_ir.Value, shape: tuple[int, ...] | None) -> onnx_ir.Value:
    """Times scale plus bias, both in `shape` where they do not broadcast by themselves."""
    for op_type, operand in zip(("Mul", "Add"), writer.node.inputs[1:3], strict=False):
        if operand is None:
            continue
        shaped = operand
        if shape is not None:
            shaped = writer("Reshape", operand, writer.constant(np.asarray(shape, np.int64)))
        data = writer(op_type, data, shaped)
    return data


def _group_normalization(writer: Writer, mask: NDArray[np.float32]) -> None:
    """On [N, groups, channels of a group and positions], as the operator is defined."""
    groups = int_attribute(writer.node, "num_groups", 1)
    shape = writer("Shape", writer.data)
    grouped = writer("Reshape", writer.data, writer.constant(np.asarray([0, groups, -1], np.int64)))
    normalized = _normalized(writer, grouped, mask.reshape(mask.shape[0], groups, -1), (2,))
    back = writer("Reshape", normalized, shape)
    writer.finish(_affine(writer, back, (-1, *[1] * (mask.ndim - 2))))


def without_statistic(node: onnx_ir.Node) -> None:
    """Rewrites the node, in its graph, so that no element of its output depends on more than one of its input.

    A normalization passes its input on, a reduction becomes 1: for runs that follow elements, not values.
    """
    writer = Writer(node)
    if is_op(node, *REDUCTIONS):
        reduced = writer(
            node.op_type, *(value for value in node.inputs if value is not None), **_reduction_options(node)
        )
        one = onnx_ir.Tensor(np.ones(1, np.float32))
        writer.finish(writer("ConstantOfShape", writer("Shape", reduced), value=one))
        return
    writer.finish(writer("Identity", writer.data))


def _reduction_options(node: onnx_ir.Node) -> dict[str, Attribute]:
    options: dict[str, Attribute] = {"keepdims": int_attribute(node, "keepdims", 1)}
    if (axes := ints_attribute(node, "axes")) is not None:
        options["axes"] = axes
    if "noop_with_empty_axes" in node.attributes:
        options["noop_with_empty_axes"] = int_attribute(node, "noop_with_empty_axes", 0)
    return options
