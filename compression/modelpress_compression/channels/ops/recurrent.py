"""LSTM, GRU, RNN: hidden units go as a whole, with all of their gates, in both directions at once."""

from __future__ import annotations

import numpy as np
import onnx_ir

from modelpress_compression.channels.fixes import Count
from modelpress_compression.channels.labels import ValueLabels
from modelpress_compression.channels.ops.registry import rule
from modelpress_compression.channels.tracer import Tracer

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_DIRECTIONS = "The axis is one of directions, time or batch of a recurrent layer."
# Further inputs whose last axis holds the hidden units, and how many times (the bias is counted by gates).
_INITIAL = {5: 1, 6: 1, 7: 3}


@rule("LSTM", "GRU", "RNN")
def recurrent(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    """X [T, B, I], W [D, gates * H, I], R [D, gates * H, H], B [D, 2 * gates * H], states [D, B, H], P [D, 3 * H]."""
    data, weight, again = (tracer.axes(value) for value in node.inputs[:3])
    shape, recurrence = tracer.shape(node.inputs[1]), tracer.shape(node.inputs[2])
    if not data or not weight or not again or shape is None or recurrence is None:
        return "The shapes of the recurrent layer are not known."
    gates, size = _GATES[node.op_type], recurrence[2]
    if size < 2 or weight[1] is None or again[1] is None or again[2] is None:
        return "The layer has one hidden unit, or its weights are computed."
    for axes in (data[:2], weight[:1], again[:1]):
        for axis in axes:
            tracer.freeze(axis, node, _DIRECTIONS)
    hidden = tracer.labels.fresh(size)
    tracer.unify(data[2], weight[2], node)
    tracer.mark(weight[2], "consumer", node)
    for axes in (weight, again):
        tracer.unify(axes[1], np.tile(hidden, gates), node)
        tracer.mark(axes[1], "producer", node, "hidden")
    tracer.unify(again[2], hidden, node)
    tracer.mark(again[2], "consumer", node, "hidden")
    times = {3: 2 * gates, **_INITIAL}
    for position, count in times.items():
        if position < len(node.inputs) and node.inputs[position] is not None:
            axes_or_none = tracer.axes(node.inputs[position])
            if not axes_or_none:
                return "The shape of a bias or of a state is not known."
            for axis in axes_or_none[:-1]:
                tracer.freeze(axis, node, _DIRECTIONS)
            tracer.unify(np.tile(hidden, count), axes_or_none[-1], node)
    tracer.fixes.append(Count(node, "hidden_size", hidden))
    for number, output in enumerate(node.outputs):
        made: ValueLabels = (None,) * (3 if number == 0 else 2)
        tracer.set(output, (*made, hidden))
    return None
