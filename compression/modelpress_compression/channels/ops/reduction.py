"""Reduce* and Softmax. Over a labelled axis only the statistics of a normalization may be taken.

Mean and variance over what is left are those of the masked model, whose statistics leave masked channels out. Any other
reduction over channels would answer differently once some are cut, so it freezes them.
"""

from __future__ import annotations

import onnx_ir

from modelpress_compression.channels.labels import AxisLabels
from modelpress_compression.channels.ops.registry import rule
from modelpress_compression.channels.tracer import UNKNOWN_SHAPES, Tracer
from modelpress_compression.graph.read import axes_of, constant_scalar, input_of, int_attribute, is_op, other_operand

_REDUCTIONS = (
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceSumSquare",
)  # fmt: skip


@rule(*_REDUCTIONS)
def reduce(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    axes = tracer.axes(node.inputs[0])
    if axes is None:
        return UNKNOWN_SHAPES
    given = axes_of(node)
    if given is None and input_of(node, 1) is not None:
        known = tracer.known(node.inputs[1])
        if known is None:
            return "The axes of the reduction are computed."
        given = tuple(int(axis) for axis in known.reshape(-1))
    if given is None or (not given and not int_attribute(node, "noop_with_empty_axes", 0)):
        given = tuple(range(len(axes)))
    gone = {axis % len(axes) for axis in given}
    # A statistic of a computed weight is no statistic of channels: zero columns count in it.
    statistic = is_op(node, "ReduceMean") and is_statistic(node) and not tracer.is_derived(node.inputs[0])
    for axis in gone:
        if not statistic:
            tracer.freeze(axes[axis], node, f"{node.op_type} over the axis needs every index of it.")
    keep = bool(int_attribute(node, "keepdims", 1))
    output: list[AxisLabels] = [None if n in gone else axis for n, axis in enumerate(axes) if keep or n not in gone]
    tracer.set(node.outputs[0], tuple(output))
    return None


def is_statistic(node: onnx_ir.Node) -> bool:
    """Whether a ReduceMean is the mean or the variance of a normalization.

    A mean is subtracted from what it is the mean of: x - mean(x). A variance is the mean of a square that goes, with
    an epsilon, under a root: 1 / sqrt(mean(d * d) + epsilon).
    """
    source, output = node.inputs[0], node.outputs[0]
    users = output.consumers()
    if not users or output.is_graph_output() or source is None:
        return False
    centring = [
        user for user in users if is_op(user, "Sub") and _same(user.inputs[0], source) and user.inputs[1] is output
    ]
    if len(centring) == len(users):
        return True
    return _is_square(source.producer()) and all(_goes_under_root(user, output) for user in users)


def _same(one: onnx_ir.Value | None, other: onnx_ir.Value) -> bool:
    """Exporters may cast x between mean and difference."""
    producer = None if one is None else one.producer()
    return one is other or (
        producer is not None and is_op(producer, "Cast", "Identity") and producer.inputs[0] is other
    )


def _is_square(node: onnx_ir.Node | None) -> bool:
    if node is None:
        return False
    if is_op(node, "Mul"):
        return node.inputs[0] is node.inputs[1]
    return is_op(node, "Pow")


def _goes_under_root(user: onnx_ir.Node, value: onnx_ir.Value) -> bool:
    if is_op(user, "Sqrt"):
        return True
    if not is_op(user, "Add"):
        return False
    if constant_scalar(other_operand(user, value)) is None:
        return False
    after = user.outputs[0].consumers()
    return bool(after) and all(is_op(node, "Sqrt", "Pow") for node in after)


@rule("Softmax", "LogSoftmax")
def softmax(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    axes = tracer.axes(node.inputs[0])
    if axes is None:
        return UNKNOWN_SHAPES
    along = int_attribute(node, "axis", -1) % max(len(axes), 1)
    tracer.freeze(axes[along], node, "Softmax over the axis needs every index of it.")
    tracer.set(node.outputs[0], axes)
    return None
