"""Reshape and Flatten: index maps in row-major order.

The extents before and after are matched into blocks of equal products, and each block is cut into atoms, the common
factors of both sides. First axes are split into atoms, then atoms are merged into the new axes:

    [64, 49] -> [32, 98]        atoms 32, 2, 49: 64 is split into 32 x 2, 98 merged of 2 x 49

Where one labelled atom stands among plain ones (Flatten after pooling), its labels are repeated; where an axis is
split, or several labelled atoms are merged, a grid is recorded (see `grids`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir

from modelpress_compression.channels.fixes import Extents
from modelpress_compression.channels.grids import Grid
from modelpress_compression.channels.labels import AxisLabels
from modelpress_compression.channels.ops.registry import rule
from modelpress_compression.channels.tracer import Tracer
from modelpress_compression.graph.read import label

_UNKNOWN = "The shapes before and after the Reshape are not known."


@dataclass(frozen=True)
class Atom:
    """A factor that both sides share."""

    axis: AxisLabels
    extent: int


@rule("Reshape", "Flatten")
def reshape(node: onnx_ir.Node, tracer: Tracer) -> str | None:
    axes, before, after = tracer.axes(node.inputs[0]), tracer.shape(node.inputs[0]), tracer.shape(node.outputs[0])
    if axes is None or before is None or after is None:
        return _UNKNOWN
    if all(axis is None for axis in axes):
        tracer.set(node.outputs[0], (None,) * len(after))
        _follow(node, tracer)
        return None
    if 0 in before or (node.op_type == "Reshape" and tracer.known(node.inputs[1]) is None):
        return _UNKNOWN
    for axis, extent in zip(axes, before, strict=True):
        if extent == 1:
            tracer.freeze(axis, node, "The axis of extent 1 is dropped.")
    output: list[AxisLabels] = [None] * len(after)
    for sources, targets in blocks(before, after):
        made = _block([(axes[i], before[i]) for i in sources], [after[j] for j in targets], node, tracer)
        for target, axis in zip(targets, made, strict=True):
            output[target] = axis
    tracer.set(node.outputs[0], tuple(output))
    _follow(node, tracer)
    return None


def _follow(node: onnx_ir.Node, tracer: Tracer) -> None:
    """The target must say what is left; it may be computed from extents of other values that are cut."""
    axes = tracer.axes(node.outputs[0]) or ()
    if node.op_type == "Reshape" and (any(axis is not None for axis in axes) or tracer.sources(node.inputs[1])):
        tracer.fixes.append(Extents(node, 1, axes))


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes of both sides, those of extent 1 left out, in runs of equal products."""
    left = [axis for axis, extent in enumerate(before) if extent != 1]
    right = [axis for axis, extent in enumerate(after) if extent != 1]
    found, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        sources, targets = [left[i]], [right[j]]
        one, other = before[left[i]], after[right[j]]
        i, j = i + 1, j + 1
        while one != other:
            if one < other:
                sources.append(left[i])
                one, i = one * before[left[i]], i + 1
            else:
                targets.append(right[j])
                other, j = other * after[right[j]], j + 1
        found.append((sources, targets))
    return found


def _block(
    sources: list[tuple[AxisLabels, int]], targets: list[int], node: onnx_ir.Node, tracer: Tracer
) -> list[AxisLabels]:
    """Labels of the new axes of one block."""
    if len(sources) == len(targets) == 1 or all(axis is None for axis, _ in sources):
        return [sources[0][0]] * len(targets) if len(targets) == 1 and len(sources) == 1 else [None] * len(targets)
    factors = common_factors([extent for _, extent in sources], targets)
    if factors is None:
        for axis, _ in sources:
            tracer.freeze(axis, node, "The Reshape cuts across the axis.")
        return [None] * len(targets)
    atoms: list[Atom] = []
    rest = list(factors)
    for axis, extent in sources:
        atoms += _split(axis, _take(rest, extent), node, tracer)
    made: list[AxisLabels] = []
    for extent in targets:
        count = len(_take_atoms(atoms, extent))
        made.append(_merge(atoms[:count], node, tracer))
        atoms = atoms[count:]
    return made


def common_factors(one: Sequence[int], other: Sequence[int]) -> list[int] | None:
    """Factors, outermost first, of which the extents of both sides are products; None where there are none."""
    points = sorted(set(np.cumprod(list(reversed(one))).tolist()) | set(np.cumprod(list(reversed(other))).tolist()))
    factors, last = [], 1
    for point in points:
        if point % last:
            return None
        factors.append(point // last)
        last = point
    return list(reversed(factors))


def _take(factors: list[int], extent: int) -> list[int]:
    taken, product = [], 1
    while product < extent:
        taken.append(factors.pop(0))
        product *= taken[-1]
    return taken


def _take_atoms(atoms: list[Atom], extent: int) -> list[Atom]:
    taken, product = [], 1
    for atom in atoms:
        if product >= extent:
            break
        taken.append(atom)
        product *= atom.extent
    return taken


def _split(axis: AxisLabels, factors: list[int], node: onnx_ir.Node, tracer: Tracer) -> list[Atom]:
    if axis is None or len(factors) == 1:
        return [Atom(axis, factors[0])] if len(factors) == 1 else [Atom(None, factor) for factor in factors]
    atoms = [Atom(tracer.labels.fresh(factor), factor) for factor in factors]
    tracer.grids.append(Grid(axis, tuple(atom.axis for atom in atoms), tuple(factors), label(node)))
    return atoms


def _merge(atoms: list[Atom], node: onnx_ir.Node, tracer: Tracer) -> AxisLabels:
    labelled = [number for number, atom in enumerate(atoms) if atom.axis is not None]
    extents = tuple(atom.extent for atom in atoms)
    if not labelled:
        return None
    if len(atoms) == 1:
        return atoms[0].axis
    axis = atoms[labelled[0]].axis
    if len(labelled) == 1 and axis is not None:
        view = axis.reshape([-1 if number == labelled[0] else 1 for number in range(len(atoms))])
        return np.ascontiguousarray(np.broadcast_to(view, extents)).reshape(-1)
    whole = tracer.labels.fresh(int(np.prod(extents)))
    tracer.grids.append(Grid(whole, tuple(atom.axis for atom in atoms), extents, label(node)))
    return whole
