"""Transposes between layouts: graphs of TensorFlow and Keras change from NHWC to NCHW and back around each Conv.

With T(x)[i] = x with axis i taken from axis p[i], and f elementwise:

    1. T'(f(T(x), T(y), c)) = f(x, y, T'(c))      T' after T is the identity; f any region of elementwise operators
    2. f(T(conv), c) = T(f(conv, T'(c)))          a constant behind a Transpose meets the Conv, and merges into it
    3. T(f(x, c)) = f(T(x), T(c)), then Conv      likewise in front of a Conv

1 fires where fewer Transposes remain: those in front of the region go, and one is written behind each of its values
that someone else reads. It looks at regions of bounded size. 2 and 3 move a Transpose and cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir

from modelpress_compression.graph.read import (
    constant_array,
    constant_tensor,
    graph_of,
    ints_attribute,
    is_op,
    only_consumer,
    rank,
)
from modelpress_compression.passes.fuse.rewriting import FIRED, Outcome, Scope

_UNARY = (
    "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "HardSigmoid", "HardSwish", "Elu", "Selu", "Celu", "Softplus",
    "Softsign", "Erf", "Exp", "Log", "Abs", "Neg", "Sqrt", "Reciprocal", "Gelu", "Mish", "Cast", "Identity",
)  # fmt: skip
_BINARY = ("Add", "Sub", "Mul", "Div", "Pow", "PRelu", "Max", "Min", "Sum")
_AFFINE = ("Add", "Sub", "Mul", "Div")
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_MAX_REGION = 64

Perm = tuple[int, ...]


class CancelTransposes:
    """Case 1: Transposes around a region of elementwise operators."""

    name: ClassVar[str] = "transposes_around"
    op_types: ClassVar[frozenset[str]] = frozenset({"Transpose"})

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:
        perm = ints_attribute(node, "perm")
        if perm is None or node.inputs[0] is None or rank(node.inputs[0]) != len(perm):
            return None
        region = _region(node, perm, scope)
        if not region.nodes or region.gain() <= 0:
            return None
        region.rewrite(scope)
        return FIRED


class MoveTransposes:
    """Cases 2 and 3: between a Conv and a constant."""

    name: ClassVar[str] = "transpose_moved"
    op_types: ClassVar[frozenset[str]] = frozenset({"Transpose"})

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:
        perm = ints_attribute(node, "perm")
        if perm is None:
            return None
        if scope.producer(node.inputs[0], *_CONVOLUTIONS) is not None and only_consumer(_source(node)) is node:
            return _move_down(node, perm, scope)
        follower = only_consumer(node.outputs[0])
        if is_op(follower, "Conv") and follower.inputs[0] is node.outputs[0]:
            return _move_up(node, perm, scope)
        return None


def _source(node: onnx_ir.Node) -> onnx_ir.Value:
    value = node.inputs[0]
    assert value is not None  # noqa: S101  # a Transpose has one input
    return value


def _move_down(node: onnx_ir.Node, perm: Perm, scope: Scope) -> Outcome:
    """Behind as many constants as follow."""
    fired: Outcome = None
    while (user := only_consumer(node.outputs[0])) is not None and user.graph is node.graph:
        position = _constant_beside(user, node.outputs[0], len(perm), scope)
        if position is None:
            return fired
        inputs = [_source(node), _source(node)]
        inputs[position] = _permuted(user.inputs[position], _inverse(perm), scope, graph_of(user))
        moved = scope.make_like(user, user.op_type, inputs, user.attributes.values())
        turned = scope.make_like(node, "Transpose", [moved.outputs[0]], node.attributes.values())
        scope.replace(user, [node, user], [moved, turned])
        node, fired = turned, FIRED
    return fired


def _move_up(node: onnx_ir.Node, perm: Perm, scope: Scope) -> Outcome:
    """In front of as many constants as there are."""
    fired: Outcome = None
    while (maker := scope.inner(node.inputs[0], *_AFFINE)) is not None and maker.graph is node.graph:
        varying = next((value for value in maker.inputs if value is not None and constant_tensor(value) is None), None)
        position = None if varying is None else _constant_beside(maker, varying, len(perm), scope)
        if varying is None or position is None or rank(varying) != len(perm):
            return fired
        turned = scope.make_like(node, "Transpose", [varying], node.attributes.values())
        inputs = [turned.outputs[0], turned.outputs[0]]
        inputs[position] = _permuted(maker.inputs[position], perm, scope, graph_of(maker))
        moved = scope.make_like(maker, maker.op_type, inputs, maker.attributes.values())
        scope.replace(node, [maker, node], [turned, moved])
        node, fired = turned, FIRED
    return fired


def _constant_beside(node: onnx_ir.Node, value: onnx_ir.Value, axes: int, scope: Scope) -> int | None:
    """At which input of an affine node its constant lies, where it adds no axes to the value beside it."""
    if not is_op(node, *_AFFINE) or scope.excluded(node):
        return None
    position = 1 if node.inputs[0] is value else 0
    tensor = constant_tensor(node.inputs[position])
    return position if tensor is not None and len(tensor.shape) <= axes and node.inputs[1 - position] is value else None


def _inverse(perm: Perm) -> Perm:
    return tuple(int(axis) for axis in np.argsort(perm))


def _permuted(value: onnx_ir.Value | None, perm: Perm, scope: Scope, graph: onnx_ir.Graph) -> onnx_ir.Value:
    """A constant with its axes in another order; one number stays as it is."""
    array = constant_array(value)
    assert value is not None  # noqa: S101  # the callers have looked
    assert array is not None  # noqa: S101
    if array.size == 1:
        return value
    full = array.reshape((1,) * (len(perm) - array.ndim) + array.shape)
    return scope.constant(graph, np.ascontiguousarray(full.transpose(perm)), value.name or "constant")


@dataclass
class _Region:
    """Elementwise `nodes` behind Transposes by `perm`; `cancelled`: Transposes behind it that undo them."""

    perm: Perm
    nodes: dict[onnx_ir.Node, None] = field(default_factory=dict)
    entries: dict[onnx_ir.Node, None] = field(default_factory=dict)
    cancelled: dict[onnx_ir.Node, None] = field(default_factory=dict)
    exits: dict[onnx_ir.Value, list[tuple[onnx_ir.Node, int]]] = field(default_factory=dict)

    def gain(self) -> int:
        """How many Transposes fewer there are afterwards."""
        gone = [entry for entry in self.entries if all(user in self.nodes for user in entry.outputs[0].consumers())]
        return len(gone) + len(self.cancelled) - len(self.exits)

    def rewrite(self, scope: Scope) -> None:
        turned = {entry.outputs[0]: _source(entry) for entry in self.entries}
        for node in self.nodes:
            for index, value in enumerate(node.inputs):
                if value in turned:
                    node.replace_input_with(index, turned[value])
                elif constant_tensor(value) is not None and (index == 0 or is_op(node, *_BINARY)):
                    node.replace_input_with(index, _permuted(value, _inverse(self.perm), scope, graph_of(node)))
            self._turn_shape(node.outputs[0])
        for node in self.cancelled:
            node.outputs[0].replace_all_uses_with(_source(node))
        for value, uses in self.exits.items():
            maker = value.producer()
            assert maker is not None  # noqa: S101  # a node of the region
            back = scope.make("Transpose", [value], value.name or "value", attributes={"perm": self.perm})
            graph_of(maker).insert_after(maker, back)
            for user, index in uses:
                user.replace_input_with(index, back.outputs[0])
        scope.remove_unused([*self.cancelled, *self.entries])

    def _turn_shape(self, value: onnx_ir.Value) -> None:
        if value.shape is not None and len(value.shape) == len(self.perm):
            value.shape = onnx_ir.Shape([value.shape[axis] for axis in _inverse(self.perm)])


def _region(start: onnx_ir.Node, perm: Perm, scope: Scope) -> _Region:
    """All elementwise nodes behind `start` that read nothing but such Transposes, each other, and constants."""
    region = _Region(perm)
    grown = True
    while grown and len(region.nodes) < _MAX_REGION:
        values = [start.outputs[0], *(node.outputs[0] for node in region.nodes)]
        found = [
            user
            for value in values
            for user in value.consumers()
            if user not in region.nodes and user.graph is start.graph and _joins(user, region, scope)
        ]
        region.nodes.update(dict.fromkeys(found))
        grown = bool(found)
    for node in region.nodes:
        region.entries.update(dict.fromkeys(_entries(node, perm)))
        _add_exits(node, region)
    return region


def _joins(node: onnx_ir.Node, region: _Region, scope: Scope) -> bool:
    """Whether all that it reads comes out of the region, of its Transposes, or is constant."""
    if not is_op(node, *_UNARY, *_BINARY) or scope.excluded(node) or node.outputs[0].is_graph_output():
        return False
    entries = {entry.outputs[0] for entry in _entries(node, region.perm)}
    operands = node.inputs if is_op(node, *_BINARY) else node.inputs[:1]
    for value in operands:
        tensor = constant_tensor(value)
        inside = value is not None and value.producer() in region.nodes
        if value in entries or inside:
            continue
        if tensor is None or len(tensor.shape) > len(region.perm) or (node.op_type == "PRelu" and tensor.size > 1):
            return False
    return True


def _entries(node: onnx_ir.Node, perm: Perm) -> Iterator[onnx_ir.Node]:
    for value in node.inputs:
        maker = None if value is None else value.producer()
        if is_op(maker, "Transpose") and ints_attribute(maker, "perm") == perm and maker.graph is node.graph:
            yield maker


def _add_exits(node: onnx_ir.Node, region: _Region) -> None:
    value = node.outputs[0]
    for use in value.uses():
        user = use.node
        if user in region.nodes:
            continue
        undone = _is_undone(user, region.perm)
        if undone and not user.outputs[0].is_graph_output():
            region.cancelled[user] = None
        else:
            region.exits.setdefault(value, []).append(use)


def _is_undone(node: onnx_ir.Node, perm: Sequence[int]) -> bool:
    """Whether a Transpose takes the axes back to where they were."""
    second = ints_attribute(node, "perm") if is_op(node, "Transpose") else None
    return second is not None and len(second) == len(perm) and tuple(second) == _inverse(tuple(perm))
