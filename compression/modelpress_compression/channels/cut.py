"""The cut: constants lose the indices of units that go, and all that holds an extent is mended.

Constants that hold extents, bounds or indices may be shared, so a fix never changes one: it gives its node a copy. A
target of Reshape or Expand that the graph computes is computed once more with the extents that are left. Where it
follows them by itself it stays; else the elements that do not are scaled by what is left of their axis, which is right
for every extent of the dynamic axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.channels.find import Trace, trace
from modelpress_compression.channels.fixes import (
    Count,
    Extents,
    Fix,
    Number,
    Parts,
    Places,
    Positions,
    SliceBounds,
    labels_of,
)
from modelpress_compression.channels.groups import Indices
from modelpress_compression.channels.integers import Small, evaluate, small_constant
from modelpress_compression.channels.labels import AxisLabels, Ints
from modelpress_compression.errors import CompressionError
from modelpress_compression.graph.edit import Editor, Inputs, replace_numbers, set_input
from modelpress_compression.graph.read import constant_array, constant_tensor, is_op, label
from modelpress_compression.model import Model


def cut(model: Model, kept: Mapping[str, Indices]) -> Model:
    """The model with the units `kept` (group id -> indices of units, rising); groups that are not named stay whole.

    Raises KeyError for an unknown group, ValueError for indices that are out of range, not rising, or none at all.
    """
    traced = trace(model)
    nodes = list(traced.ir.graph.all_nodes())
    result = replace(model, ir=traced.ir)
    mending = _Cut(traced, _mask(traced, kept), Editor(result))
    mending.cut_constants()
    for fix in traced.tracer.fixes:
        mending.apply(fix)
    _restore_shapes(model, traced.ir, nodes, mending)
    return result


def _mask(traced: Trace, kept: Mapping[str, Indices]) -> NDArray[np.bool_]:
    """By label: whether it stays."""
    stays = np.ones(traced.classes.root.size, np.bool_)
    for identifier, units in kept.items():
        group = traced.analysis.group(identifier)
        chosen = np.asarray(units, np.int64)
        if not chosen.size or chosen[0] < 0 or chosen[-1] >= group.units or np.any(np.diff(chosen) <= 0):
            raise ValueError(
                f"units to keep of {identifier!r} must be rising indices below {group.units}, at least one"
            )
        stays[np.delete(traced.roots[identifier], chosen)] = False
    mask: NDArray[np.bool_] = stays[traced.classes.root]
    return mask


class _Cut:
    """Changes the traced graph. `stays`: by label."""

    def __init__(self, traced: Trace, stays: NDArray[np.bool_], editor: Editor) -> None:
        self._tracer = traced.tracer
        self._stays = stays
        self._editor = editor
        self._after: dict[onnx_ir.Value, Small | None] = {}

    def left(self, axis: Ints) -> int:
        return int(np.count_nonzero(self._stays[axis]))

    def changed(self, axis: AxisLabels) -> bool:
        return axis is not None and not bool(self._stays[axis].all())

    def extents(self, value: onnx_ir.Value) -> tuple[int, ...] | None:
        """The shape that is left."""
        shape, axes = self._tracer.shape(value), self._tracer.axes(value)
        if shape is None or axes is None:
            return None
        return tuple(extent if axis is None else self.left(axis) for axis, extent in zip(axes, shape, strict=True))

    def shape_left(self, value: onnx_ir.Value, given: onnx_ir.Shape | None) -> onnx_ir.Shape | None:
        """The stored shape `given` after the cut; symbolic extents stay."""
        axes = self._tracer.axes(value)
        if given is None or axes is None or len(axes) != len(given):
            return None
        dims = [
            self.left(axis) if axis is not None and isinstance(dim, int) else dim
            for axis, dim in zip(axes, given, strict=True)
        ]
        return onnx_ir.Shape(dims)

    def cut_constants(self) -> None:
        for value, axes in self._tracer.constants.items():
            if not any(self.changed(axis) for axis in axes):
                continue
            array = constant_array(value)
            if array is None:
                raise TypeError(f"{value.name} is not constant")
            for number, axis in enumerate(axes):
                if axis is not None and self.changed(axis):
                    array = np.compress(self._stays[axis], array, axis=number)
            replace_numbers(value, array)

    def apply(self, fix: Fix) -> None:
        sources = self._tracer.sources(fix.node.inputs[fix.position]) if isinstance(fix, Extents) else []
        if not any(self.changed(axis) for axis in (*labels_of(fix), *sources)):
            return
        if isinstance(fix, Count):
            fix.node.attributes[fix.attribute] = onnx_ir.AttrInt64(fix.attribute, self.left(fix.labels))
        elif isinstance(fix, Number):
            self._number(fix)
        elif isinstance(fix, Extents):
            self._target(fix)
        elif isinstance(fix, Parts):
            self._parts(fix)
        elif isinstance(fix, SliceBounds):
            self._bounds(fix)
        elif isinstance(fix, Places):
            self._places(fix)
        else:
            self._positions(fix)

    # Constants that hold numbers of channels

    def _constant(self, like: str, array: Small) -> onnx_ir.Value:
        """Always of the main graph, which every subgraph sees."""
        return self._editor.constant(self._editor.ir.graph, array, like)

    def _replace(self, node: onnx_ir.Node, position: int, array: Small) -> None:
        old = node.inputs[position]
        node.replace_input_with(position, self._constant(f"{(old.name if old else None) or label(node)}_cut", array))

    def _number(self, fix: Number) -> None:
        (made,) = fix.node.outputs
        made.replace_all_uses_with(self._constant(f"{made.name}_kept", fix.number))

    def _parts(self, fix: Parts) -> None:
        sizes = np.asarray([self.left(part) for part in fix.parts], np.int64)
        if fix.attribute in fix.node.attributes:
            fix.node.attributes[fix.attribute] = onnx_ir.AttrInt64s(fix.attribute, sizes.tolist())
            return
        fix.node.attributes.pop("num_outputs", None)
        set_input(fix.node, 1, self._constant(f"{label(fix.node)}_sizes", sizes))

    def _bounds(self, fix: SliceBounds) -> None:
        starts, ends = (np.array(self._tracer.known(fix.node.inputs[position])) for position in (1, 2))
        for number, (whole, start, end) in fix.slices.items():
            starts[number] = self.left(whole[:start])
            ends[number] = self.left(whole[:end])
        self._replace(fix.node, 1, starts)
        self._replace(fix.node, 2, ends)

    def _positions(self, fix: Positions) -> None:
        """Indices keep their order; those of labels that go are left out."""
        indices = self._tracer.indices(fix.node.inputs[1])
        if indices is None:
            raise CompressionError(f"The indices that {label(fix.node)} picks are not known.")
        indices = np.where(indices < 0, indices + fix.whole.size, indices)
        new = np.cumsum(self._stays[fix.whole]) - 1
        self._replace(fix.node, 1, new[indices[self._stays[fix.picked]]].astype(indices.dtype))

    def _places(self, fix: Places) -> None:
        """rows * elements + 0, 1, 2, ... for the elements of one row that are left."""
        shape = self._tracer.shape(fix.node.inputs[1]) or ()
        row = [extent if axis is None else self.left(axis) for axis, extent in zip(fix.axes, shape, strict=True)][1:]
        size, name = int(np.prod(row)), f"{label(fix.node)}_cut"
        behind = self._constant(f"{name}_behind", np.arange(1, len(row) + 1, dtype=np.int64))
        rows = self._emit(fix.node, "Unsqueeze", [fix.rows, behind], name)
        starts = self._emit(fix.node, "Mul", [rows, self._constant(f"{name}_size", np.asarray(size, np.int64))], name)
        places = self._constant(f"{name}_places", np.arange(size, dtype=np.int64).reshape(1, *row))
        fix.node.replace_input_with(1, self._emit(fix.node, "Add", [starts, places], name))

    # Targets of Reshape, Expand, Resize, ConstantOfShape

    def _target(self, fix: Extents) -> None:
        value = fix.node.inputs[fix.position]
        before = self._tracer.known(value)
        now = self._value_after(value)
        if value is None or before is None or now is None or now.size != len(fix.axes):
            raise CompressionError(f"The shape that {label(fix.node)} needs after the cut cannot be computed.")
        factors = [self._factor(axis, int(old), int(new)) for axis, old, new in zip(fix.axes, before, now, strict=True)]
        if all(factor == (1, 1) for factor in factors):
            return
        if constant_tensor(value) is not None:
            made = [int(number) * up // down for number, (up, down) in zip(now, factors, strict=True)]
            self._replace(fix.node, fix.position, np.asarray(made, now.dtype))
        else:
            self._scale(fix, value, factors)

    def _factor(self, axis: AxisLabels, old: int, new: int) -> tuple[int, int]:
        """What an element must be multiplied with, as a fraction."""
        if new in (0, -1) or (new == 1 and old == 1):
            return 1, 1  # the extent comes from the data
        if axis is None or new != old:
            # A plain axis keeps its extent, whatever it was computed from.
            left, whole = old if axis is None else self.left(axis), new
        else:
            left, whole = self.left(axis), axis.size
        common = gcd(left, whole)
        return left // common, whole // common

    def _scale(self, fix: Extents, value: onnx_ir.Value, factors: list[tuple[int, int]]) -> None:
        """Puts target * numerators / denominators before the node; pieces of a Concat are replaced where possible."""
        if self._pieces(fix, value, factors):
            return
        up, down = (np.asarray(column, np.int64) for column in zip(*factors, strict=True))
        name = f"{value.name}_cut"
        product = self._emit(fix.node, "Mul", [value, self._constant(f"{name}_up", up)], name)
        quotient = self._emit(fix.node, "Div", [product, self._constant(f"{name}_down", down)], name)
        fix.node.replace_input_with(fix.position, quotient)

    def _pieces(self, fix: Extents, value: onnx_ir.Value, factors: list[tuple[int, int]]) -> bool:
        """Whether all numbers to change are constants that a Concat joins; then a copy of it joins the new ones."""
        concat = value.producer()
        if not is_op(concat, "Concat"):
            return False
        inputs: list[onnx_ir.Value | None] = []
        start = 0
        for piece in concat.inputs:
            array = self._tracer.known(piece)
            if array is None:
                return False
            own = factors[start : start + array.size]
            start += array.size
            if all(factor == (1, 1) for factor in own):
                inputs.append(piece)
                continue
            if constant_tensor(piece) is None:
                return False
            made = [int(number) * up // down for number, (up, down) in zip(array.reshape(-1), own, strict=True)]
            inputs.append(self._constant(f"{piece.name if piece else ''}_cut", np.asarray(made, array.dtype)))
        joined = self._emit(fix.node, "Concat", inputs, f"{value.name}_cut", axis=0)
        fix.node.replace_input_with(fix.position, joined)
        return True

    def _emit(self, before: onnx_ir.Node, op_type: str, inputs: Inputs, name: str, **attributes: int) -> onnx_ir.Value:
        """A node that makes int64, as all of those do that extents and places are computed with."""
        (made,) = self._editor.emit(before, op_type, inputs, name, attributes=attributes)
        made.type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
        return made

    def _value_after(self, value: onnx_ir.Value | None) -> Small | None:
        """A small tensor as the cut graph computes it; constants that hold extents are those of before."""
        if value is None:
            return None
        if value not in self._after:
            constant = small_constant(value)
            producer = value.producer()
            if constant is not None or producer is None:
                self._after[value] = constant
            else:
                inputs = [self._value_after(source) for source in producer.inputs]
                self._after[value] = evaluate(producer, inputs, self.extents)
        return self._after[value]


def _restore_shapes(model: Model, ir: onnx_ir.Model, nodes: list[onnx_ir.Node], mending: _Cut) -> None:
    """Stored shapes are those of the given model again (symbolic where they were), with the extents that are left.

    `nodes`: those of the traced graph before any was inserted.
    """
    before = list(model.ir.graph.all_nodes())
    same = not model.ir.functions and len(before) == len(nodes)
    for mine, theirs in zip(nodes, before if same else [None] * len(nodes), strict=True):
        for number, output in enumerate(mine.outputs):
            output.shape = mending.shape_left(output, None if theirs is None else theirs.outputs[number].shape)
    for value, given in (
        *zip(ir.graph.inputs, model.graph.inputs, strict=True),
        *zip(ir.graph.outputs, model.graph.outputs, strict=True),
    ):
        value.shape = None if given.shape is None else given.shape.copy()
        value.type = given.type
