"""Fused attention: whole heads are cut, and where keys and values have fewer heads, each with its query heads."""

from __future__ import annotations

import numpy as np
import onnx_ir

from modelpress_compression.channels.fixes import Count, Parts
from modelpress_compression.channels.labels import Axes, Axis, Ints
from modelpress_compression.channels.ops.registry import rule
from modelpress_compression.channels.tracer import Tracer
from modelpress_compression.graph.read import MICROSOFT, input_of, int_attribute, ints_attribute

_UNKNOWN = "The shapes of the attention are not known."
_TIME = "The axis is one of batch or time of an attention."
_INSIDE = "The axis lies inside of attention heads."


def _flat(axis: Axis, heads: Ints, node: onnx_ir.Node, tracer: Tracer) -> None:
    """Ties a hidden axis [heads * size] to its heads."""
    if axis is None or axis.size % heads.size:
        tracer.freeze(axis, node, "The axis does not consist of whole heads.")
        tracer.freeze(heads, node, "The heads read a value that cannot be cut.")
        return
    tracer.unify(axis, np.repeat(heads, axis.size // heads.size), node)
    tracer.mark(heads, "passenger", node, "head")


def _freeze_all(axes: Axes | None, node: onnx_ir.Node, tracer: Tracer, reason: str, *, but: int | None = None) -> None:
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
    return np.repeat(labels, width // labels.size)


@rule("MultiHeadAttention", domain=MICROSOFT)
def multi_head(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Query, key, value [B, T, heads * size] and a bias of all three; the output is [B, T, heads * size of values]."""
    shapes = [tracer.shape(value) for value in node.inputs[:3]]
    axes = [tracer.axes(value) for value in node.inputs[:3]]
    count = int_attribute(node, "num_heads", 0)
    if len(axes) < 3 or any(shape is None or len(shape) != 3 for shape in shapes) or count < 1:
        return "Query, key and value of the attention are packed."
    heads = tracer.labels.fresh(count)
    widths = []
    for own, shape in zip(axes, shapes, strict=True):
        if own is None or shape is None:
            return _UNKNOWN
        _freeze_all(own, node, tracer, _TIME, but=2)
        _flat(own[2], heads, node, tracer)
        widths.append(shape[2])
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        bias = tracer.axes(node.inputs[3])
        if bias is None or len(bias) != 1:
            return _UNKNOWN
        tracer.unify(bias[0], np.concatenate([_times(heads, width) for width in widths]), node)
    if len(node.inputs) > 4:
        _freeze_all(tracer.axes(node.inputs[4]), node, tracer, _TIME)
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
    if len(node.outputs) > 1 or any(value is not None for value in node.inputs[4:5]) or len(node.inputs) > 6:
        return "The attention has a cache whose layout is not traced."
    sizes = ints_attribute(node, "qkv_hidden_sizes") or (shape[1] // 3,) * 3
    heads = tracer.labels.fresh(count)
    parts = tuple(_times(heads, size) for size in sizes)
    _freeze_all(data, node, tracer, _TIME, but=2)
    tracer.unify(data[2], weight[0], node)
    tracer.mark(weight[0], "consumer", node)
    tracer.unify(np.concatenate(parts), weight[1], node)
    tracer.mark(weight[1], "producer", node, "head")
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = tracer.axes(node.inputs[2])
        if bias is None or len(bias) != 1:
            return _UNKNOWN
        tracer.unify(bias[0], np.concatenate(parts), node)
    if len(node.inputs) > 3:
        _freeze_all(tracer.axes(node.inputs[3]), node, tracer, _TIME)
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
    shared = tracer.labels.fresh(fewer)
    heads = np.repeat(shared, count // fewer)
    for value, labels in zip(node.inputs[:3], (heads, shared, shared), strict=True):
        axes, shape = tracer.axes(value), tracer.shape(value)
        if axes is None or shape is None or len(axes) != 3:
            return _UNKNOWN
        _freeze_all(axes, node, tracer, _TIME, but=2)
        size = shape[2] // labels.size
        if axes[2] is None:
            tracer.freeze(shared, node, "The heads read a value that cannot be cut.")
        else:
            tracer.unify(axes[2], np.repeat(labels, size), node)
    for value in node.inputs[5:]:
        _freeze_all(tracer.axes(value), node, tracer, _INSIDE)
    tracer.plain_outputs(node)
    _caches(node, (3, 4), shared, tracer)
    tracer.mark(shared, "passenger", node, "head")
    tracer.fixes += [Count(node, "num_heads", heads), Count(node, "kv_num_heads", shared)]
    query = tracer.shape(node.inputs[0]) or (0, 0, 0)
    tracer.set(node.outputs[0], (None, None, _times(heads, query[2])))
    return None


@rule("Attention")
def standard(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """Q, K, V [B, heads, T, size], or [B, T, heads * size] with the numbers of heads as attributes."""
    axes, shapes = [tracer.axes(v) for v in node.inputs[:3]], [tracer.shape(v) for v in node.inputs[:3]]
    flat = len(shapes[0] or ()) == 3
    if any(
        own is None or shape is None or len(shape) != (3 if flat else 4)
        for own, shape in zip(axes, shapes, strict=True)
    ):
        return _UNKNOWN
    if len(node.outputs) > 3:
        return "The scores of the attention are an output."
    given = [own for own in axes if own is not None]
    widths = [shape for shape in shapes if shape is not None]
    count = int_attribute(node, "q_num_heads", 0) if flat else widths[0][1]
    fewer = int_attribute(node, "kv_num_heads", 0) if flat else widths[1][1]
    if count < 1 or fewer < 1 or count % fewer:
        return _UNKNOWN
    shared = tracer.labels.fresh(fewer)
    heads = np.repeat(shared, count // fewer)
    for number, (own, labels) in enumerate(zip(given, (heads, shared, shared), strict=True)):
        where = 2 if flat else 1
        for axis, inner in enumerate(own):
            if axis != where and not (number == 2 and axis == 3):
                tracer.freeze(inner, node, _INSIDE if axis == 3 else _TIME)
        tracer.unify(_times(labels, widths[number][2]) if flat else labels, own[where], node)
    _bias(node, 3, heads, tracer)
    tracer.plain_outputs(node)
    _caches(node, (4, 5), shared, tracer)
    tracer.mark(shared, "passenger", node, "head")
    if flat:
        tracer.fixes += [Count(node, "q_num_heads", heads), Count(node, "kv_num_heads", shared)]
        tracer.set(node.outputs[0], (None, None, np.repeat(heads, widths[2][2] // fewer)))
    else:
        tracer.set(node.outputs[0], (None, heads, None, given[2][3]))
    return None


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
