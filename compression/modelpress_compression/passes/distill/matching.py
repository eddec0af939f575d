"""Intermediate values that teacher and student have in common: the same name, the same shape, and much the same values.

Where channels were cut the shapes differ, and such values are left out; what a residual stream or an embedding keeps is
compared. Values that no trained constant reaches are left out as well: they cannot differ, or cannot be helped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir

from modelpress_compression.executor import Selector
from modelpress_compression.graph.subgraphs import read_values
from modelpress_compression.graph.watch import observable, taps
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.model import Model

MAX_FEATURES = 8
# Larger magnitudes are those of masks, not of activations.
_LARGEST = 1e4
_SAME = 0.5
_MOVING = frozenset(("Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Cast", "Slice", "Split"))
_FAKE = frozenset(("QuantizeLinear", "DequantizeLinear"))


def common_values(original: Model, student: Model, selector: Selector) -> list[str]:
    """Names of float values of the main graph that both compute, in the student's order, without the outputs."""
    theirs = {value.name for node in original.graph for value in node.outputs if observable(value, original)}
    outputs = {value.name for value in student.graph.outputs}
    names = []
    for value in reached_values(student, selector):
        producer = value.producer()
        kept = producer is not None and producer.op_type not in _MOVING | _FAKE
        if kept and value.name in theirs and value.name not in outputs:
            names.append(value.name or "")
    return names


def reached_values(student: Model, selector: Selector) -> list[onnx_ir.Value]:
    """Values of the main graph that depend on a trained constant, in order."""
    reached: set[onnx_ir.Value] = set()
    found = []
    for node in student.graph:
        if any(value in reached or selector(value) for value in read_values(node)):
            reached.update(node.outputs)
            found += [value for value in node.outputs if value.name]
    return found


def agreeing(original: Model, student: Model, names: Sequence[str], inputs: Feeds) -> dict[str, Array]:
    """Of these names those whose values are alike in both models, with what the original's are.

    A pass may keep a name and change what it stands for, as smoothing does, which scales channels: values further apart
    than half of the original's variance are not taken for the same.
    """
    if not names:
        return {}
    with taps(original, names) as observe:
        theirs = observe(inputs)
    with taps(student, names) as observe:
        mine = observe(inputs)
    return {name: theirs[name] for name in names if _are_alike(mine[name], theirs[name])}


def spread(names: Sequence[str], limit: int = MAX_FEATURES) -> list[str]:
    """At most `limit` of them, evenly over the graph, the last one included."""
    if len(names) <= limit:
        return list(names)
    places = np.linspace(0, len(names) - 1, limit + 1)[1:].round().astype(int)
    return [names[place] for place in dict.fromkeys(places.tolist())]


def _are_alike(mine: Array, theirs: Array) -> bool:
    if mine.shape != theirs.shape or theirs.dtype.kind != "f" or theirs.ndim < 2 or not theirs.size:
        return False
    expected, got = theirs.astype(np.float64), mine.astype(np.float64)
    if not np.isfinite(expected).all() or np.abs(expected).max() >= _LARGEST:
        return False
    return bool(np.square(got - expected).mean() < _SAME * expected.var())
