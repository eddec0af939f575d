"""Tracing a whole model, and reading the groups off the classes of labels."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx_ir

from modelpress_compression.channels.grids import Resolution
from modelpress_compression.channels.groups import Analysis, Frozen, Group, Indices, Kind, Member, Role
from modelpress_compression.channels.labels import NOT_FROZEN, Classes, Ints, Reason
from modelpress_compression.channels.ops import RULES
from modelpress_compression.channels.tracer import Mark, Tracer
from modelpress_compression.errors import CompressionError
from modelpress_compression.graph.read import label
from modelpress_compression.graph.shapes import sample_shapes, shape_of, static_shapes
from modelpress_compression.graph.synthetic import synthetic_inputs
from modelpress_compression.model import Model

_KINDS: tuple[Kind, ...] = ("channel", "group", "head", "hidden")


@dataclass(frozen=True)
class ConstantAxis:
    """One labelled axis of a constant; all that the analysis knows of it."""

    value: onnx_ir.Value
    number: int
    labels: Ints
    uses: tuple[tuple[Role, str], ...]

    def maker(self) -> str | None:
        """The node for which it makes channels."""
        return next((node for role, node in self.uses if role == "producer"), None)


@dataclass(frozen=True)
class Trace:
    """A traced model. `ir`: the copy that was traced, functions inlined, with concrete shapes.

    `roots`: for every group, by unit, the root of the unit's class.
    """

    ir: onnx_ir.Model
    tracer: Tracer
    classes: Classes
    analysis: Analysis
    roots: dict[str, Ints]


def trace(model: Model) -> Trace:
    """Labels of the whole model, and its groups."""
    ir = _with_shapes(model)
    tracer = Tracer(RULES)
    tracer.walk(ir.graph)
    for output in ir.graph.outputs:
        tracer.freeze_value(output, output.name or "", "The axis is one of the model's output.")
    _freeze_ambiguous_names(ir, tracer)
    classes = Resolution(tracer.labels, tracer.grids).run()
    axes = _axes(tracer)
    groups, roots = _groups(axes, tracer, classes)
    return Trace(ir, tracer, classes, Analysis(groups, _frozen(axes, tracer, classes)), roots)


def _with_shapes(model: Model) -> onnx_ir.Model:
    """A copy with concrete shapes: for dynamic extents of 1, or for ones that the model runs on where it refuses 1."""
    ir = static_shapes(model)
    if all(shape_of(output) is not None for node in ir.graph for output in node.outputs if output.uses()):
        return ir
    try:
        data = synthetic_inputs(model, 1)
    except CompressionError:
        return ir  # what has no shape is frozen
    return static_shapes(model, sample_shapes(data))


def find_groups(model: Model) -> Analysis:
    """The dependency groups of a model; see `groups`. Linear in nodes, and in the numbers of channels."""
    return trace(model).analysis


def _freeze_ambiguous_names(ir: onnx_ir.Model, tracer: Tracer) -> None:
    """Members name tensors, so that two constants of different subgraphs with one name cannot be told apart."""
    seen: dict[str, onnx_ir.Value] = {}
    for value in tracer.constants:
        other = seen.setdefault(value.name or "", value)
        if other is not value or not value.name:
            for one in (value, other):
                tracer.freeze_value(one, value.name or "", "Another constant has the same name.")


def _axes(tracer: Tracer) -> list[ConstantAxis]:
    """Every labelled axis of every constant, with the roles that nodes use it in."""
    found = [
        (value, number, labels)
        for value, axes in tracer.constants.items()
        for number, labels in enumerate(axes)
        if labels is not None
    ]
    owner = np.full(tracer.labels.solve().root.size, -1, np.int64)
    for index, (_, _, labels) in enumerate(found):
        owner[labels] = index
    uses: dict[int, dict[tuple[Role, str], None]] = defaultdict(dict)
    for mark in tracer.marks:
        for labels in _with_twins(mark.labels, tracer):
            for index in np.unique(owner[labels]).tolist():
                uses[index][mark.role, mark.node] = None
    axes = []
    for index, (value, number, labels) in enumerate(found):
        known = tuple(use for use in uses[index] if index >= 0 and use[0] != "passenger") or tuple(uses[index])
        user = next(iter(value.consumers()), None)
        follows: tuple[Role, str] = ("passenger", label(user) if user is not None else value.name or "")
        axes.append(ConstantAxis(value, number, labels, known or (follows,)))
    return axes


def _with_twins(labels: Ints, tracer: Tracer) -> list[Ints]:
    """These labels, and those of other constants that the same computed weight holds."""
    found, seen = [labels], {int(labels[0])} if labels.size else set()
    for one in found:
        for twin in tracer.twins.get(int(one[0]), []) if one.size else []:
            if int(twin[0]) not in seen:
                seen.add(int(twin[0]))
                found.append(twin)
    return found


def _groups(axes: list[ConstantAxis], tracer: Tracer, classes: Classes) -> tuple[tuple[Group, ...], dict[str, Ints]]:
    """Free classes with the same numbers of indices in the same axes and parts make a group."""
    signatures = _signatures(axes, tracer.parts, classes)
    kinds = _kinds(tracer.marks, classes)
    groups: list[tuple[int, Group, Ints]] = []
    names: dict[str, int] = defaultdict(int)
    for signature, members in sorted(signatures.items(), key=lambda item: item[0]):
        rows = [(axes[number], count) for number, count in signature if number < len(axes)]
        first = next(((axis, count, maker) for axis, count in rows if (maker := axis.maker()) is not None), None)
        if first is None or len(members) < 2 or all(role != "consumer" for axis, _ in rows for role, _ in axis.uses):
            continue
        axis, align, maker = first
        roots = _in_order(np.asarray(members, np.int64), axis, classes)
        made = tuple(member for axis, count in rows for member in _members(axis, count, roots, classes))
        names[maker] += 1
        identifier = maker if names[maker] == 1 else f"{maker}#{names[maker]}"
        kind = _KINDS[int(kinds[roots].max())]
        group = Group(identifier, roots.size, kind, made, _parameters(rows), align)
        groups.append((len(groups), group, roots))
    return tuple(group for _, group, _ in groups), {group.id: roots for _, group, roots in groups}


def _signatures(
    axes: list[ConstantAxis], parts: list[Ints], classes: Classes
) -> dict[tuple[tuple[int, int], ...], list[int]]:
    """(axis or part, number of indices) for every one that a free class has indices in -> classes."""
    entries: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, labels in enumerate([*(axis.labels for axis in axes), *parts]):
        free = classes.root[labels][classes.free(labels)]
        roots, counts = np.unique(free, return_counts=True)
        for root, count in zip(roots.tolist(), counts.tolist(), strict=True):
            entries[root].append((number, count))
    signatures: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for root, signature in entries.items():
        signatures[tuple(signature)].append(root)
    return signatures


def _in_order(roots: Ints, axis: ConstantAxis, classes: Classes) -> Ints:
    """Classes by their first index in the axis."""
    order = classes.root[axis.labels]
    _, first = np.unique(order, return_index=True)
    rank = {int(order[index]): int(index) for index in first}
    return np.asarray(sorted(roots.tolist(), key=lambda root: rank[root]), np.int64)


def _members(axis: ConstantAxis, count: int, roots: Ints, classes: Classes) -> list[Member]:
    """Indices of every unit in one axis, once for each use."""
    own = classes.root[axis.labels]
    order = np.argsort(roots)
    where = np.searchsorted(roots[order], own)
    where[where == roots.size] = 0
    inside = roots[order][where] == own
    unit = order[where][inside]
    positions = np.flatnonzero(inside)
    indices: Indices = positions[np.argsort(unit, kind="stable")].reshape(roots.size, count).astype(np.int64)
    return [Member(axis.value.name or "", axis.number, indices, role, node) for role, node in axis.uses]


def _parameters(rows: list[tuple[ConstantAxis, int]]) -> float:
    """Numbers that go with one unit, all else staying whole."""
    stays: dict[onnx_ir.Value, float] = defaultdict(lambda: 1.0)
    for axis, count in rows:
        stays[axis.value] *= 1 - count / axis.labels.size
    return float(sum(np.prod(shape_of(value) or (0,)) * (1 - share) for value, share in stays.items()))


def _kinds(marks: list[Mark], classes: Classes) -> Ints:
    """By root: the most telling kind that any node gave it."""
    kinds = np.zeros(classes.root.size, np.int64)
    for mark in marks:
        if mark.kind != "channel":
            np.maximum.at(kinds, classes.root[mark.labels], _KINDS.index(mark.kind))
    return kinds


def _frozen(axes: list[ConstantAxis], tracer: Tracer, classes: Classes) -> tuple[Frozen, ...]:
    """Producers whose channels stay, by reason."""
    counts: dict[tuple[str, Reason], int] = {}
    for axis in axes:
        maker = axis.maker()
        if maker is None:
            continue
        reasons, numbers = np.unique(classes.reason[axis.labels], return_counts=True)
        for reason, number in zip(reasons.tolist(), numbers.tolist(), strict=True):
            if reason != NOT_FROZEN:
                counts[maker, tracer.labels.reasons[reason]] = number
    return tuple(Frozen(node, number, f"{reason.text} ({reason.node})") for (node, reason), number in counts.items())
