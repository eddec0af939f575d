"""Tracing a whole model, and reading the groups off the classes of labels."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx_ir

from modelpress_compression.analysis.channels.grids import Resolution
from modelpress_compression.analysis.channels.groups import Analysis, Frozen, Group, Indices, Kind, Member, Role
from modelpress_compression.analysis.channels.labels import NOT_FROZEN, Classes, Ints, Reason
from modelpress_compression.analysis.channels.ops import RULES
from modelpress_compression.analysis.channels.tracer import Mark, Tracer
from modelpress_compression.analysis.shapes import static_shapes
from modelpress_compression.model import Model

_KINDS: tuple[Kind, ...] = ("channel", "group", "head", "hidden")


@dataclass(frozen=True)
class Axis:
    """One labelled axis of a constant; all that the analysis knows of it."""

    value: onnx_ir.Value
    number: int
    labels: Ints
    role: Role
    node: str


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
    ir = static_shapes(model)
    tracer = Tracer(RULES)
    tracer.walk(ir.graph)
    for output in ir.graph.outputs:
        tracer.freeze_value(output, output.name or "", "The axis is one of the model's output.")
    _freeze_ambiguous_names(ir, tracer)
    classes = Resolution(tracer.labels, tracer.grids).run()
    axes = _axes(tracer)
    groups, roots = _groups(axes, tracer, classes)
    return Trace(ir, tracer, classes, Analysis(groups, _frozen(axes, tracer, classes)), roots)


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


def _axes(tracer: Tracer) -> list[Axis]:
    """Every labelled axis of every constant, with the role of the first node that uses it for one."""
    count = tracer.labels.fresh(0).size + _last(tracer)
    number = np.full(count, -1, np.int64)
    for index in range(len(tracer.marks) - 1, -1, -1):
        number[tracer.marks[index].labels] = index
    found = []
    for value, axes in tracer.constants.items():
        for axis, labels in enumerate(axes):
            if labels is None:
                continue
            marks = number[labels]
            known = marks[marks >= 0]
            mark = tracer.marks[int(known.min())] if known.size else None
            user = next(iter(value.consumers()), None)
            node = mark.node if mark is not None else ((user.name if user is not None else None) or value.name or "")
            found.append(Axis(value, axis, labels, mark.role if mark is not None else "passenger", node))
    return found


def _last(tracer: Tracer) -> int:
    return int(tracer.labels.solve().root.size)


def _groups(axes: list[Axis], tracer: Tracer, classes: Classes) -> tuple[tuple[Group, ...], dict[str, Ints]]:
    """Free classes with the same numbers of indices in the same axes and parts make a group."""
    signatures = _signatures(axes, tracer.parts, classes)
    kinds = _kinds(tracer.marks, classes)
    groups: list[tuple[int, Group, Ints]] = []
    names: dict[str, int] = defaultdict(int)
    for signature, members in sorted(signatures.items(), key=lambda item: item[0]):
        rows = [(axes[number], count) for number, count in signature if number < len(axes)]
        producer = next((row for row in rows if row[0].role == "producer"), None)
        if producer is None or not any(axis.role == "consumer" for axis, _ in rows) or len(members) < 2:
            continue
        roots = _in_order(np.asarray(members, np.int64), producer[0], classes)
        made = tuple(_member(axis, count, roots, classes) for axis, count in rows)
        names[producer[0].node] += 1
        repeat = names[producer[0].node]
        identifier = producer[0].node if repeat == 1 else f"{producer[0].node}#{repeat}"
        kind = _KINDS[int(kinds[roots].max())]
        group = Group(identifier, roots.size, kind, made, _parameters(made, rows), producer[1])
        groups.append((len(groups), group, roots))
    return tuple(group for _, group, _ in groups), {group.id: roots for _, group, roots in groups}


def _signatures(axes: list[Axis], parts: list[Ints], classes: Classes) -> dict[tuple[tuple[int, int], ...], list[int]]:
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


def _in_order(roots: Ints, axis: Axis, classes: Classes) -> Ints:
    """Classes by their first index in the axis."""
    order = classes.root[axis.labels]
    _, first = np.unique(order, return_index=True)
    rank = {int(order[index]): int(index) for index in first}
    return np.asarray(sorted(roots.tolist(), key=lambda root: rank[root]), np.int64)


def _member(axis: Axis, count: int, roots: Ints, classes: Classes) -> Member:
    """Indices of every unit in one axis."""
    own = classes.root[axis.labels]
    order = np.argsort(roots)
    where = np.searchsorted(roots[order], own)
    where[where == roots.size] = 0
    inside = roots[order][where] == own
    unit = order[where][inside]
    positions = np.flatnonzero(inside)
    indices: Indices = positions[np.argsort(unit, kind="stable")].reshape(roots.size, count).astype(np.int64)
    return Member(axis.value.name or "", axis.number, indices, axis.role, axis.node)


def _parameters(members: tuple[Member, ...], rows: list[tuple[Axis, int]]) -> float:
    """Numbers that go with one unit, all else staying whole."""
    stays: dict[str, float] = defaultdict(lambda: 1.0)
    sizes: dict[str, int] = {}
    for member, (axis, count) in zip(members, rows, strict=True):
        shape = axis.value.const_value.shape.numpy() if axis.value.const_value is not None else axis.value.shape
        if shape is None:
            continue
        sizes[member.tensor] = int(np.prod([int(extent) for extent in shape]))
        stays[member.tensor] *= 1 - count / axis.labels.size
    return float(sum(size * (1 - stays[tensor]) for tensor, size in sizes.items()))


def _kinds(marks: list[Mark], classes: Classes) -> Ints:
    """By root: the most telling kind that any node gave it."""
    kinds = np.zeros(classes.root.size, np.int64)
    for mark in marks:
        if mark.kind != "channel":
            np.maximum.at(kinds, classes.root[mark.labels], _KINDS.index(mark.kind))
    return kinds


def _frozen(axes: list[Axis], tracer: Tracer, classes: Classes) -> tuple[Frozen, ...]:
    """Producers whose channels stay, by reason."""
    counts: dict[tuple[str, Reason], int] = {}
    for axis in axes:
        if axis.role != "producer":
            continue
        reasons, numbers = np.unique(classes.reason[axis.labels], return_counts=True)
        for reason, number in zip(reasons.tolist(), numbers.tolist(), strict=True):
            if reason != NOT_FROZEN:
                counts[axis.node, tracer.labels.reasons[reason]] = number
    return tuple(Frozen(node, number, f"{reason.text} ({reason.node})") for (node, reason), number in counts.items())
