"""Inner values that teacher and student have in common, and the channels of such values.

Values match by name, where they have the same shape and much the same numbers. Values that no trained constant reaches
are left out: training cannot change them.

Where channels were cut, the student's channels are a rising selection of the teacher's, since a cut keeps the order of
what stays. The selection with the largest sum of correlations is taken, by dynamic programming over (student, teacher)
channels:

    best[i, j] = max(best[i, j - 1], best[i - 1, j - 1] + correlation[i, j])

Correlations are those of the activations on some samples, so that nothing needs to be known about how the cut was made.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.executor import Selector
from modelpress_compression.graph.subgraphs import read_values
from modelpress_compression.graph.watch import observable, taps
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.model import Model

MAX_FEATURES = 8
# Larger magnitudes are those of masks, not of activations.
_LARGEST = 1e4
_SAME = 0.5
# Below this mean correlation the channels cannot be told from each other.
LEAST_CORRELATION = 0.4
_MAX_POSITIONS = 4096
_MOVING = frozenset(("Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Cast", "Slice", "Split"))
_FAKE = frozenset(("QuantizeLinear", "DequantizeLinear"))
Indices = NDArray[np.int64]


def common_values(original: Model, student: Model, selector: Selector) -> list[str]:
    """Names of float values of the main graph that both compute, in the student's order, without the outputs."""
    theirs = {value.name for node in original.graph for value in node.outputs if observable(value, original)}
    outputs = {value.name for value in student.graph.outputs}
    names = []
    for value in _reached_values(student, selector):
        producer = value.producer()
        kept = producer is not None and producer.op_type not in _MOVING | _FAKE
        if kept and value.name in theirs and value.name not in outputs:
            names.append(value.name or "")
    return names


def _reached_values(student: Model, selector: Selector) -> list[onnx_ir.Value]:
    """Values of the main graph that depend on a trained constant, in order."""
    reached: set[onnx_ir.Value] = set()
    found = []
    for node in student.graph:
        if any(value in reached or selector(value) for value in read_values(node)):
            reached.update(node.outputs)
            found += [value for value in node.outputs if value.name]
    return found


def agreeing(original: Model, student: Model, names: Sequence[str], inputs: Feeds) -> dict[str, Array]:
    """The original's values under those of these names that stand for much the same in both models.

    A pass may keep a name and change what it stands for, as smoothing does, which scales channels. So values whose mean
    squared difference is half of the original's variance or more do not match.
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


def cut_axis(student: tuple[int, ...], teacher: tuple[int, ...]) -> int | None:
    """The only axis on which the shapes differ, where the student has fewer channels; None: no cut explains them."""
    if len(student) != len(teacher):
        return None
    different = [axis for axis, pair in enumerate(zip(student, teacher, strict=True)) if pair[0] != pair[1]]
    if len(different) != 1 or different[0] == 0 or student[different[0]] > teacher[different[0]]:
        return None
    return different[0]


def corresponding(student: Sequence[Array], teacher: Sequence[Array], axis: int) -> Indices | None:
    """For each of the student's channels along `axis` the index of the teacher's, rising; None where they do not
    correlate. Both hold the values of one tensor, feed by feed, for the same feeds."""
    mine, theirs = (
        np.concatenate([_channels(array, axis) for array in arrays], axis=1) for arrays in (student, teacher)
    )
    correlation = _normalized(mine) @ _normalized(theirs).T
    selection = rising_selection(correlation)
    mean = float(correlation[np.arange(len(selection)), selection].mean())
    return selection if mean >= LEAST_CORRELATION else None


def rising_selection(gain: NDArray[np.float64]) -> Indices:
    """Columns j(0) < j(1) < ... of the largest sum of gain[i, j(i)]; `gain` is [rows, columns], rows <= columns."""
    rows, columns = gain.shape
    best = np.zeros(columns + 1)
    taken = np.empty((rows, columns), np.bool_)
    for row in range(rows):
        candidates = best[:-1] + gain[row]
        candidates[:row] = -np.inf  # the rows before need as many columns
        running = np.maximum.accumulate(candidates)
        taken[row] = candidates == running
        best = np.concatenate([[-np.inf], running])
    selection = np.empty(rows, np.int64)
    end = columns
    for row in reversed(range(rows)):
        # The last column before those taken by later rows at which this row reached its running best.
        end = int(np.flatnonzero(taken[row, :end])[-1])
        selection[row] = end
    return selection


def _channels(array: Array, axis: int) -> NDArray[np.float64]:
    """[channels, positions], with about 4096 of the positions."""
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    step = max(1, rows.shape[1] // _MAX_POSITIONS)
    return rows[:, ::step].astype(np.float64)


def _normalized(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = np.nan_to_num(rows - rows.mean(axis=1, keepdims=True))
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.where(norms > 0, norms, 1))
