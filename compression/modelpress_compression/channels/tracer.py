"""The state of one analysis: labels of every axis of every value, and the walk that propagates them.

Rules (one for each operator, in `ops`) ask for the axes of their inputs, tie, freeze and pass on labels, and set the
axes of their outputs. What has no rule, or a shape that is not known, freezes all labels that reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir

from modelpress_compression.channels.fixes import Fix, Number
from modelpress_compression.channels.grids import Grid
from modelpress_compression.channels.groups import Kind, Role
from modelpress_compression.channels.integers import Small, evaluate, is_structural, small_constant
from modelpress_compression.channels.labels import AxisLabels, Ints, Labels, ValueLabels
from modelpress_compression.graph.read import constant_array, constant_tensor, is_op, label
from modelpress_compression.graph.shapes import shape_of
from modelpress_compression.graph.subgraphs import read_values

# A reason that many rules give.
UNKNOWN_SHAPES: Final = "The shapes at the node are not known."
# Answers None, or the reason why the node's labels are frozen.
Rule = Callable[[onnx_ir.Node, "Tracer"], str | None]
# Stands for the extent of a plain axis, which may differ between runs.
_PLAIN: Ints = np.zeros(0, np.int64)
# At these inputs integers are extents or bounds, which the rules and the cut look after.
_SHAPE_INPUTS: Mapping[str, frozenset[int]] = {
    "Reshape": frozenset({1}),
    "Expand": frozenset({1}),
    "ConstantOfShape": frozenset({0}),
    "Slice": frozenset({1, 2}),
    "Split": frozenset({1}),
    "Resize": frozenset({3}),
}


@dataclass(frozen=True)
class Mark:
    """What a node uses labels for: the role of the tensors that own them, and the kind of group they make."""

    labels: Ints
    role: Role
    node: str
    kind: Kind


class Tracer:
    """Axes of values, and all that the rules record."""

    def __init__(self, rules: Mapping[tuple[str, str], Rule]) -> None:
        self._rules = rules
        self._axes: dict[onnx_ir.Value, ValueLabels] = {}
        self._known: dict[onnx_ir.Value, Small] = {}
        # By element of a small tensor: the labels of axes whose extent it depends on.
        self._sources: dict[onnx_ir.Value, list[tuple[Ints, ...]]] = {}
        self._derived: set[onnx_ir.Value] = set()
        self.labels = Labels()
        self.constants: dict[onnx_ir.Value, ValueLabels] = {}
        self.grids: list[Grid] = []
        self.fixes: list[Fix] = []
        self.marks: list[Mark] = []
        # Labels of parts of axes: units of one group lie in the same parts, so that no part is ever empty.
        self.parts: list[Ints] = []
        # First label of an axis -> axes of other constants that one computed weight holds as well.
        self.twins: dict[int, list[Ints]] = {}

    # What is known of values

    def axes(self, value: onnx_ir.Value | None) -> ValueLabels | None:
        """Labels of every axis; None where the shape is not known."""
        if value is None:
            return None
        if value not in self._axes:
            if constant_tensor(value) is not None:
                self._axes[value] = self._constant(value)
            elif (shape := shape_of(value)) is not None:
                self._axes[value] = (None,) * len(shape)
            else:
                return None
        return self._axes[value]

    def _constant(self, value: onnx_ir.Value) -> ValueLabels:
        """Every index of a constant is free until something ties it; extents of 1 are broadcast and never cut."""
        shape = shape_of(value) or ()
        axes = tuple(self.labels.fresh(extent) if extent > 1 else None for extent in shape)
        if axes:
            self.constants[value] = axes
        return axes

    def shape(self, value: onnx_ir.Value | None) -> tuple[int, ...] | None:
        return shape_of(value)

    def known(self, value: onnx_ir.Value | None) -> Small | None:
        """The numbers of a small constant, or of a small tensor that is computed from shapes."""
        if value is None:
            return None
        return self._known[value] if value in self._known else small_constant(value)

    def is_fixed(self, value: onnx_ir.Value | None) -> bool:
        """Whether a known small tensor is the same in every run: no extent of a plain axis is in it."""
        return all(labels is not _PLAIN for source in self._sources_of(value) for labels in source)

    def indices(self, value: onnx_ir.Value | None) -> Small | None:
        """Numbers that are the same in every run: those of a constant of any size, or computed from fixed extents."""
        array = constant_array(value)
        return array if array is not None or not self.is_fixed(value) else self.known(value)

    def sources(self, value: onnx_ir.Value | None) -> list[Ints]:
        """Labels of the axes whose extents are in a small tensor."""
        return [labels for source in self._sources_of(value) for labels in source if labels.size]

    def is_derived(self, value: onnx_ir.Value | None) -> bool:
        """Whether the value depends on constants alone."""
        return value is not None and (value in self._derived or constant_tensor(value) is not None)

    # What rules do

    def set(self, value: onnx_ir.Value, axes: ValueLabels) -> None:
        self._axes[value] = axes

    def freeze(self, axis: AxisLabels, node: onnx_ir.Node, reason: str) -> None:
        if axis is not None:
            self.labels.freeze(axis, label(node), reason)

    def unify(self, one: AxisLabels, other: AxisLabels, node: onnx_ir.Node) -> AxisLabels:
        """Ties two axes of the same extent; one of them, which both are from now on."""
        if one is None or other is None:
            frozen = other if one is None else one
            self.freeze(frozen, node, "The axis meets one that cannot be cut, such as that of an input.")
            return None
        if one.size != other.size:
            self.freeze(one, node, "Axes of different extents meet.")
            self.freeze(other, node, "Axes of different extents meet.")
            return None
        self.labels.unify(one, other)
        return one

    def mark(self, axis: AxisLabels, role: Role, node: onnx_ir.Node, kind: Kind = "channel") -> None:
        if axis is not None:
            self.marks.append(Mark(axis, role, label(node), kind))

    def pair(self, made: AxisLabels, axis: AxisLabels) -> None:
        """A weight computed of several constants: what is marked on `made` is meant for `axis` as well."""
        if made is not None and axis is not None and made is not axis:
            self.twins.setdefault(int(made[0]), []).append(axis)

    def plain_outputs(self, node: onnx_ir.Node) -> None:
        for output in node.outputs:
            self.plain_output(output)

    def plain_output(self, output: onnx_ir.Value) -> None:
        shape = shape_of(output)
        if shape is not None:
            self._axes[output] = (None,) * len(shape)
        else:
            self._axes.pop(output, None)

    # The walk

    def walk(self, graph: onnx_ir.Graph) -> None:
        """All nodes of a graph in order; rules of control flow walk its subgraphs."""
        for node in graph:
            self._visit(node)

    def freeze_value(self, value: onnx_ir.Value | None, node: str, reason: str) -> None:
        for axis in self.axes(value) or ():
            if axis is not None:
                self.labels.freeze(axis, node, reason)

    def _visit(self, node: onnx_ir.Node) -> None:
        if is_op(node, "Constant") or self._small(node):
            return
        for position, value in enumerate(node.inputs):
            if value in self._sources and position not in _SHAPE_INPUTS.get(node.op_type, frozenset()):
                self.use(value, node)
        rule = self._rules.get((("" if node.domain == "ai.onnx" else node.domain), node.op_type))
        if rule is None:
            reason: str | None = f"No rule traces channels through {node.domain or ''} {node.op_type}.".replace(
                "  ", " "
            )
        else:
            reason = rule(node, self)
        if reason is not None or not self._fits(node):
            self._refuse(node, reason or UNKNOWN_SHAPES)
        if node.inputs and all(value is None or self.is_derived(value) for value in node.inputs):
            self._derived.update(node.outputs)

    def _refuse(self, node: onnx_ir.Node, reason: str) -> None:
        for value in (*node.inputs, *node.outputs):
            self.freeze_value(value, label(node), reason)
            if constant_tensor(value) is not None and len(axes := self.axes(value) or ()) > 1:
                # Frozen whatever it makes; the mark has it reported.
                self.mark(next((axis for axis in axes if axis is not None), None), "producer", node)
        for value in read_values(node):
            self.freeze_value(value, label(node), reason)
        self.plain_outputs(node)

    def _fits(self, node: onnx_ir.Node) -> bool:
        """Whether the outputs' labels are as many as the shapes say."""
        for output in node.outputs:
            axes, shape = self._axes.get(output), shape_of(output)
            if axes is None or shape is None:
                if output.uses() or output.is_graph_output():
                    return False
                continue
            if len(axes) != len(shape):
                return False
            if any(axis is not None and axis.size != extent for axis, extent in zip(axes, shape, strict=True)):
                return False
        return True

    # Small tensors computed from shapes

    def _small(self, node: onnx_ir.Node) -> bool:
        """Whether the node computes shapes; then it is done."""
        result = evaluate(node, [self.known(value) for value in node.inputs], self.shape)
        if result is None or not self._about_shapes(node):
            return False
        output = node.outputs[0]
        self._known[output] = result
        self._axes[output] = (None,) * result.ndim
        if sources := self._trace(node, result):
            self._sources[output] = sources
        if result.dtype.kind == "f" and sources:
            if self.is_fixed(output):
                self.fixes.append(Number(node, result, tuple(self.sources(output))))
                del self._sources[output]
            else:
                self.use(output, node)
        return True

    def _about_shapes(self, node: onnx_ir.Node) -> bool:
        if is_op(node, "Shape", "Size"):
            return True
        # Constants alone are data as well; integers among them are not worth labels.
        return any(value in self._known for value in node.inputs) or all(
            (array := self.known(value)) is None or array.dtype.kind in "iub" for value in node.inputs
        )

    def _trace(self, node: onnx_ir.Node, result: Small) -> list[tuple[Ints, ...]]:
        if is_op(node, "Shape", "Size"):
            axes = self.axes(node.inputs[0]) or ()
            by_axis: list[tuple[Ints, ...]] = [(_PLAIN,) if axis is None else (axis,) for axis in axes]
            if node.op_type == "Size":
                return [tuple(labels for axis in by_axis for labels in axis)]
            numbers = evaluate(node, [None], lambda value: tuple(range(len(by_axis))))
            return _some([by_axis[int(number)] for number in (() if numbers is None else numbers)])
        if not any(value in self._sources for value in node.inputs):
            return []
        every = [source for value in node.inputs for source in self._sources_of(value)]
        if is_structural(node):
            moved = self._moved(node)
            if moved is not None:
                return _some([every[int(number)] for number in moved.reshape(-1)])
        distinct = {id(labels): labels for source in every for labels in source}
        return _some([tuple(distinct.values())] * result.size)

    def _sources_of(self, value: onnx_ir.Value | None) -> list[tuple[Ints, ...]]:
        array = self.known(value)
        return self._sources.get(value, [()] * array.size) if value is not None and array is not None else []

    def _moved(self, node: onnx_ir.Node) -> Small | None:
        """Which element, of all inputs' elements in a row, each element of the output is."""
        numbered: list[Small | None] = []
        start = 0
        for position, value in enumerate(node.inputs):
            array = self.known(value)
            moves = array is not None and (position == 0 or node.op_type == "Concat")
            numbered.append(
                np.arange(start, start + array.size).reshape(array.shape) if array is not None and moves else array
            )
            start += 0 if array is None else array.size
        if node.op_type == "Cast":
            return numbered[0]
        return evaluate(node, numbered, self.shape)

    def use(self, value: onnx_ir.Value | None, node: onnx_ir.Node) -> None:
        """Numbers computed from extents become data: those extents stay."""
        for labels in self.sources(value):
            self.freeze(labels, node, "The graph calculates with the extent of the axis.")


def _some(sources: list[tuple[Ints, ...]]) -> list[tuple[Ints, ...]]:
    return sources if any(sources) else []
