"""Fused attention: whole heads are cut, and where keys and values have fewer heads, each with its query heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir

from modelpress_compression.channels.fixes import Count, Parts
from modelpress_compression.channels.labels import AxisLabels, Ints, ValueLabels
from modelpress_compression.channels.ops.registry import rule
from modelpress_compression.channels.tracer import Tracer
from modelpress_compression.graph.read import MICROSOFT, input_of, int_attribute, ints_attribute

_UNKNOWN = "The shapes of the attention are not known."
_TIME = "The axis is one of batch or time of an attention."
_INSIDE = "The axis lies inside of attention heads."


@dataclass(frozen=True)
class _Operand:
    """Query, key or value of an attention: labels and extents of its axes."""

    axes: ValueLabels
    shape: tuple[int, ...]


def _operands(node: onnx_ir.Node, tracer: Tracer) -> tuple[_Operand, _Operand, _Operand] | None:
    """Query, key and value; None where one is missing or not known, or where their ranks differ."""
    found: list[_Operand] = []
    for position in range(3):
        value = input_of(node, position)
        axes, shape = tracer.axes(value), tracer.shape(value)
        if axes is None or shape is None or len(shape) != len(found[0].shape if found else shape):
            return None
        found.append(_Operand(axes, shape))
    return found[0], found[1], found[2]


def _flat(axis: AxisLabels, heads: Ints, node: onnx_ir.Node, tracer: Tracer) -> None:
    """Ties a hidden axis [heads * size] to its heads."""
    if axis is None or axis.size % heads.size:
        tracer.freeze(axis, node, "The axis does not consist of whole heads.")
        tracer.freeze(heads, node, "The heads read a value that cannot be cut.")
        return
    tracer.unify(axis, np.repeat(heads, axis.size // heads.size), node)
    tracer.mark(heads, "passenger", node, "head")


def _freeze_all(
    axes: ValueLabels | None, node: onnx_ir.Node, tracer: Tracer, reason: str, *, but: int | None = None
) -> None:
    for number, axis in enumerate(axes or ()):
        if number != but:
            tracer.freeze(axis, node, reason)


def _caches(node: onnx_ir.Node, positions: tuple[int, ...], heads: Ints, tracer: Tracer) -> None:
    """Past keys and values [B, heads, T, size], and those that come out."""
    for position in positions:
        axes = tracer.axes(node.inputs[position]) if position < len(node.inputs) else None
        if axes is not None and len(axes) == 4:
            tracer.unify(heads, axes[1], node)
            _freeze_all(axes, node, tracer, _INSIDE, but=1)
    for output in node.outputs[1:]:
        if len(tracer.shape(output) or ()) == 4:
            tracer.set(output, (None, heads, None, None))


def _bias(node: onnx_ir.Node, position: int, heads: Ints, tracer: Tracer) -> None:
    """What is added to the scores: [.., heads or 1, S, T]."""
    value = input_of(node, position)
    axes, shape = tracer.axes(value), tracer.shape(value)
    if axes is None or shape is None:
        return
    by_head = len(shape) - 3 if len(shape) >= 3 and shape[-3] == heads.size else None
    _freeze_all(axes, node, tracer, _TIME, but=by_head)
    if by_head is not None:
        tracer.unify(heads, axes[by_head], node)


def _times(labels: Ints, width: int) -> Ints:
    """Labels of a hidden axis [heads * size] of this width: each head's, for all of its indices."""
    return np.repeat(labels, width // labels.size)


@rule("MultiHeadAttention", domain=MICROSOFT)
def multi_head(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Query, key, value [B, T, heads * size] and a bias of all three; the output is [B, T, heads * size of values]."""
    operands, count = _operands(node, tracer), int_attribute(node, "num_heads", 0)
    if operands is None or len(operands[0].shape) != 3 or count < 1:
        return "Query, key and value of the attention are packed."
    heads = tracer.labels.fresh(count)
    for operand in operands:
        _freeze_all(operand.axes, node, tracer, _TIME, but=2)
        _flat(operand.axes[2], heads, node, tracer)
    widths = [operand.shape[2] for operand in operands]
    if (added := input_of(node, 3)) is not None:
        bias = tracer.axes(added)
        if bias is None or len(bias) != 1:
            return _UNKNOWN
        tracer.unify(bias[0], np.concatenate([_times(heads, width) for width in widths]), node)
    _freeze_all(tracer.axes(input_of(node, 4)), node, tracer, _TIME)
    _bias(node, 5, heads, tracer)
    if len(node.outputs) > 3 or len(node.inputs) > 8:
        return "The attention keeps its scores or caches in a way that is not traced."
    tracer.plain_outputs(node)
    _caches(node, (6, 7), heads, tracer)
    tracer.fixes.append(Count(node, "num_heads", heads))
    tracer.set(node.outputs[0], (None, None, _times(heads, widths[2])))
    return None


@rule("Attention", domain=MICROSOFT)
def packed(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """X [B, T, I], weight [I, q + k + v], bias [q + k + v], mask, past, bias of the scores."""
    data, weight, shape = tracer.axes(node.inputs[0]), tracer.axes(node.inputs[1]), tracer.shape(node.inputs[1])
    count = int_attribute(node, "num_heads", 0)
    if data is None or weight is None or shape is None or len(data) != 3 or count < 1:
        return _UNKNOWN
    if len(node.outputs) > 1 or input_of(node, 4) is not None or len(node.inputs) > 6:
        return "The attention has a cache whose layout is not traced."
    sizes = ints_attribute(node, "qkv_hidden_sizes") or (shape[1] // 3,) * 3
    heads = tracer.labels.fresh(count)
    parts = tuple(_times(heads, size) for size in sizes)
    _freeze_all(data, node, tracer, _TIME, but=2)
    tracer.unify(data[2], weight[0], node)
    tracer.mark(weight[0], "consumer", node)
    tracer.unify(np.concatenate(parts), weight[1], node)
    tracer.mark(weight[1], "producer", node, "head")
    if (added := input_of(node, 2)) is not None:
        bias = tracer.axes(added)
        if bias is None or len(bias) != 1:
            return _UNKNOWN
        tracer.unify(bias[0], np.concatenate(parts), node)
    _freeze_all(tracer.axes(input_of(node, 3)), node, tracer, _TIME)
    _bias(node, 5, heads, tracer)
    tracer.fixes.append(Count(node, "num_heads", heads))
    if "qkv_hidden_sizes" in node.attributes:
        tracer.fixes.append(Parts(node, parts, "qkv_hidden_sizes"))
    tracer.set(node.outputs[0], (None, None, parts[2]))
    return None


@rule("GroupQueryAttention", domain=MICROSOFT)
def grouped(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Query [B, T, heads * size], key and value [B, T, fewer heads * size], caches, lengths, tables of rotations."""
    count, fewer = int_attribute(node, "num_heads", 0), int_attribute(node, "kv_num_heads", 0)
    if count < 1 or fewer < 1 or any(value is None for value in node.inputs[:3]):
        return "Query, key and value of the attention are packed."
    operands = _operands(node, tracer)
    if operands is None or len(operands[0].shape) != 3:
        return _UNKNOWN
    shared, heads = _shared_heads(count, fewer, tracer)
    for operand, labels in zip(operands, (heads, shared, shared), strict=True):
        _freeze_all(operand.axes, node, tracer, _TIME, but=2)
        if operand.axes[2] is None:
            tracer.freeze(shared, node, "The heads read a value that cannot be cut.")
        else:
            tracer.unify(operand.axes[2], _times(labels, operand.shape[2]), node)
    for value in node.inputs[5:]:
        _freeze_all(tracer.axes(value), node, tracer, _INSIDE)
    tracer.plain_outputs(node)
    _caches(node, (3, 4), shared, tracer)
    tracer.mark(shared, "passenger", node, "head")
    tracer.fixes += [Count(node, "num_heads", heads), Count(node, "kv_num_heads", shared)]
    tracer.set(node.outputs[0], (None, None, _times(heads, operands[0].shape[2])))
    return None


@rule("Attention")
def standard(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Q, K, V [B, heads, T, size], or [B, T, heads * size] with the numbers of heads as attributes."""
    operands = _operands(node, tracer)
    if operands is None or len(operands[0].shape) not in (3, 4):
        return _UNKNOWN
    if len(node.outputs) > 3:
        return "The scores of the attention are an output."
    query, key, value = operands
    flat = len(query.shape) == 3
    count = int_attribute(node, "q_num_heads", 0) if flat else query.shape[1]
    fewer = int_attribute(node, "kv_num_heads", 0) if flat else key.shape[1]
    if count < 1 or fewer < 1 or count % fewer:
        return _UNKNOWN
    shared, heads = _shared_heads(count, fewer, tracer)
    for operand, labels in zip(operands, (heads, shared, shared), strict=True):
        if flat:
            _freeze_all(operand.axes, node, tracer, _TIME, but=2)
            tracer.unify(_times(labels, operand.shape[2]), operand.axes[2], node)
            continue
        _freeze_all(operand.axes[:3], node, tracer, _TIME, but=1)
        if operand is not value:
            # The scores sum over the sizes of queries and keys; those of values go through to the output.
            tracer.freeze(operand.axes[3], node, _INSIDE)
        tracer.unify(labels, operand.axes[1], node)
    _bias(node, 3, heads, tracer)
    tracer.plain_outputs(node)
    _caches(node, (4, 5), shared, tracer)
    tracer.mark(shared, "passenger", node, "head")
    if flat:
        tracer.fixes += [Count(node, "q_num_heads", heads), Count(node, "kv_num_heads", shared)]
        tracer.set(node.outputs[0], (None, None, np.repeat(heads, value.shape[2] // fewer)))
    else:
        tracer.set(node.outputs[0], (None, heads, None, value.axes[3]))
    return None


def _shared_heads(count: int, fewer: int, tracer: Tracer) -> tuple[Ints, Ints]:
    """Labels of `fewer` heads of keys and values, and of `count` heads of queries, several of which share one."""
    shared = tracer.labels.fresh(fewer)
    return shared, np.repeat(shared, count // fewer)


@rule("RotaryEmbedding")
@rule("RotaryEmbedding", domain=MICROSOFT)
def rotary(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """X [B, heads, T, size]; or [B, T, heads * size]: there the number of heads must be an attribute."""
    axes = tracer.axes(node.inputs[0])
    if axes is None:
        return _UNKNOWN
    for value in node.inputs[1:]:
        _freeze_all(tracer.axes(value), node, tracer, _INSIDE)
    if len(axes) == 4:
        _freeze_all(axes, node, tracer, _INSIDE, but=1)
        tracer.set(node.outputs[0], axes)
        return None
    count = int_attribute(node, "num_heads", 0)
    if len(axes) != 3 or count < 1 or axes[2] is None:
        return "The number of heads that are rotated is not known."
    heads = tracer.labels.fresh(count)
    _freeze_all(axes, node, tracer, _TIME, but=2)
    _flat(axes[2], heads, node, tracer)
    tracer.fixes.append(Count(node, "num_heads", heads))
    tracer.set(node.outputs[0], axes)
    return None
