"""torch.as_strided as the exporter writes it: a flat view, and a Gather of the places n * elements + 0, 1, 2, ...

It copies a value as it is (to change its strides, which ONNX does not have). The places are computed from the batch:

    x [N, C, H, W] -> Reshape [-1] -> Gather(Range(0, N) * (C * H * W) + constant [1, C, H, W])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir

from modelpress_compression.channels.fixes import Places
from modelpress_compression.channels.integers import Small
from modelpress_compression.channels.labels import ValueLabels
from modelpress_compression.channels.tracer import Tracer
from modelpress_compression.graph.read import axes_of, constant_array, is_op

_MAX_HOPS = 8
# Any number above 1 that shows by how much the places of one row lie behind those of the row before.
_ROWS = 3


@dataclass
class _Chain:
    """What the places are computed from: the one Range over rows."""

    rows: onnx_ir.Value | None = None


def identity_copy(node: onnx_ir.Node, tracer: Tracer) -> ValueLabels | None:
    """The axes of the value that the Gather copies as it is, or None where it does anything else."""
    flat = node.inputs[0].producer() if node.inputs[0] is not None else None
    if not is_op(flat, "Reshape") or len(tracer.shape(node.inputs[0]) or ()) != 1:
        return None
    source = flat.inputs[0]
    axes, shape = tracer.axes(source), tracer.shape(source)
    if axes is None or shape is None or len(shape) < 2 or axes[0] is not None or node.inputs[1] is None:
        return None
    chain = _Chain()
    places = _places(node.inputs[1], chain, 0)
    if places is None or chain.rows is None or places.shape != (_ROWS, *shape[1:]):
        return None
    if not np.array_equal(places.reshape(-1), np.arange(places.size)):
        return None
    tracer.fixes.append(Places(node, chain.rows, axes))
    return axes


def _places(value: onnx_ir.Value | None, chain: _Chain, hops: int) -> Small | None:  # noqa: PLR0911 - one an operator
    """The indices if the batch had _ROWS rows."""
    constant = constant_array(value)
    if constant is not None:
        return constant
    node = None if value is None else value.producer()
    if node is None or value is None or hops > _MAX_HOPS:
        return None
    if is_op(node, "Range"):
        start, step = constant_array(node.inputs[0]), constant_array(node.inputs[2])
        if start is None or step is None or int(start) != 0 or int(step) != 1 or chain.rows not in (None, value):
            return None
        chain.rows = value
        return np.arange(_ROWS, dtype=np.int64)
    first = _places(node.inputs[0], chain, hops + 1)
    if first is None:
        return None
    if is_op(node, "Unsqueeze") and (axes := axes_of(node)) is not None:
        return np.expand_dims(first, axes)
    second = _places(node.inputs[1], chain, hops + 1) if is_op(node, "Add", "Mul") else None
    if second is None:
        return None
    return np.asarray(first + second if node.op_type == "Add" else first * second)
